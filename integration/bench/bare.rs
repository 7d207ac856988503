//! The bare limit: a loop on a file by io_uring and O_DIRECT, with no image format and no protocol.
//!
//! fio is that loop: a program that everybody has, and not ours. It spends some CPU on itself, so it is a limit for a
//! server only as far as that goes; what it says of itself goes with the figures.

use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use strata_integration::command;

/// What the loop did.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Requests a second.
    pub rate: f64,
    /// CPU seconds of fio's own threads a second; the kernel's io workers are not among them.
    pub cpu: f64,
}

/// Whether fio is installed.
pub fn available() -> bool {
    command::find("fio").is_some()
}

/// What the loop does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// Writes, instead of reads. They change the file's contents and nothing else.
    pub write: bool,
    /// One after the other, instead of at random.
    pub sequential: bool,
    /// Bytes a request.
    pub block: u32,
    /// Threads with a ring each.
    pub jobs: usize,
    /// Requests in flight a thread.
    pub depth: usize,
}

impl Pattern {
    fn direction(&self) -> &'static str {
        match (self.sequential, self.write) {
            (false, false) => "randread",
            (false, true) => "randwrite",
            (true, false) => "read",
            (true, true) => "write",
        }
    }
}

/// The loop on `file` for a time.
pub fn run(file: &Path, pattern: &Pattern, time: Duration) -> Result<Bare> {
    let depth = pattern.depth;
    let mut fio = Command::new("fio");
    fio.args(["--name=bare", "--direct=1", "--ioengine=io_uring", "--thread", "--time_based"]);
    fio.args(["--norandommap", "--random_generator=tausworthe64", "--gtod_reduce=1", "--output-format=json"]);
    fio.args(["--overwrite=1", "--iodepth_batch_complete_min=1", "--group_reporting"]);
    fio.arg(format!("--filename={}", file.display())).arg(format!("--rw={}", pattern.direction()));
    fio.arg(format!("--bs={}", pattern.block)).arg(format!("--numjobs={}", pattern.jobs));
    fio.arg(format!("--iodepth={depth}")).arg(format!("--iodepth_batch_submit={depth}"));
    // It takes such a suffix, and no fractions of seconds.
    fio.arg(format!("--runtime={}ms", time.as_millis()));
    let text = command::output(&mut fio)?;
    // Warnings may come before the JSON.
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's report")?;
    let job = &report["jobs"][0];
    let number = |value: &Value| value.as_f64().context("a number in fio's report");
    let rate = number(&job[if pattern.write { "write" } else { "read" }]["iops"])?;
    // Of the group, fio tells the mean of its threads.
    let cpu = (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0 * pattern.jobs as f64;
    Ok(Bare { rate, cpu })
}
