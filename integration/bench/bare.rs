//! The bare limit: a loop on a file with io_uring and O_DIRECT, without an image format or a protocol.
//!
//! The loop is fio, which is independent of Strata. As fio uses some CPU time itself, the limit is approximate.
//! That CPU time is reported too.

use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use strata_integration::command;

/// The result of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Requests a second.
    pub rate: f64,
    /// CPU seconds per second of fio's own threads, without the kernel's io workers.
    pub cpu: f64,
}

/// True if fio is installed.
pub fn available() -> bool {
    command::find("fio").is_some()
}

/// The requests of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// True for writes, false for reads. Writes change the file's contents and nothing else.
    pub write: bool,
    /// True for sequential, false for random requests.
    pub sequential: bool,
    /// Bytes per request.
    pub block: u32,
    /// Threads, each with its own ring.
    pub jobs: usize,
    /// Requests in flight per thread.
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

/// Runs the loop on `file` for `time`.
pub fn run(file: &Path, pattern: &Pattern, time: Duration) -> Result<Bare> {
    let depth = pattern.depth;
    let mut fio = Command::new("fio");
    fio.args(["--name=bare", "--direct=1", "--ioengine=io_uring", "--thread", "--time_based"]);
    fio.args(["--norandommap", "--random_generator=tausworthe64", "--gtod_reduce=1", "--output-format=json"]);
    fio.args(["--overwrite=1", "--iodepth_batch_complete_min=1", "--group_reporting"]);
    fio.arg(format!("--filename={}", file.display())).arg(format!("--rw={}", pattern.direction()));
    fio.arg(format!("--bs={}", pattern.block)).arg(format!("--numjobs={}", pattern.jobs));
    fio.arg(format!("--iodepth={depth}")).arg(format!("--iodepth_batch_submit={depth}"));
    // fio accepts this suffix, but no fractions of seconds.
    fio.arg(format!("--runtime={}ms", time.as_millis()));
    let text = command::output(&mut fio)?;
    // fio may print warnings before the JSON.
    let start = text.find('{').context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's report")?;
    let job = &report["jobs"][0];
    let number = |value: &Value| value.as_f64().context("a number in fio's report");
    let rate = number(&job[if pattern.write { "write" } else { "read" }]["iops"])?;
    // For a group fio reports the mean over its threads.
    let cpu = (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0 * pattern.jobs as f64;
    Ok(Bare { rate, cpu })
}
