//! `cargo bench-paths`: the cost of single operations of the data path, in instructions.
//!
//! Owns the command line, callgrind and the table. The operations are in `benches/`, a file for each crate, and
//! `benches/harness.rs` runs them. It counts instructions because their number is the same in each run; times of some
//! nanoseconds mean nothing on a shared machine.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::Command;
use strata_integration::command;
use strata_integration::daemon::workspace;

/// The benchmarks, by their crate, from the map to the ring. A crate with two kinds of ring has two.
const BENCHMARKS: [&str; 4] = ["engine", "disk", "vhost_blk", "vhost_blk-packed"];
/// The function of `benches/harness.rs` whose instructions callgrind counts.
const COUNTED: &str = "counted_run";

/// Counts the instructions of single operations of the data path, under callgrind. For times: cargo bench --bench paths.
#[derive(Parser)]
#[command(name = "cargo bench-paths")]
struct Options {
    /// Only the operations whose name contains this
    name: Option<String>,
    /// How often each operation runs, in groups of some dozens
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Keep callgrind's outputs in this folder, for callgrind_annotate
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(valgrind) = command::find("valgrind") else {
        println!(
            "SKIPPED: valgrind is not installed (apt-get install valgrind), so instructions cannot be counted."
        );
        println!("For times, which are less precise: cargo bench --bench 'paths-*'");
        return Ok(());
    };
    let folder = tempfile::tempdir().context("a folder for callgrind")?;
    let folder = options.keep.as_deref().unwrap_or(folder.path());
    eprintln!("building the benchmarks with the release profile: takes minutes the first time");
    let programs = programs()?;
    println!("| crate | operation | instructions |\n|---|---|---|");
    for (name, program) in programs {
        for case in cases(&program)? {
            if options.name.as_ref().is_some_and(|name| !case.name.contains(name)) {
                continue;
            }
            let total = count(&valgrind, &program, &case.name, options.runs, folder)?;
            let each = total as f64 / (case.operations * u64::from(options.runs)) as f64;
            println!("| {name} | {} | {each:.0} |", case.name);
        }
    }
    Ok(())
}

/// A benchmark in its program's list.
struct Case {
    name: String,
    /// Operations per run.
    operations: u64,
}

/// Builds the benchmarks. Returns the program of each.
fn programs() -> Result<Vec<(&'static str, PathBuf)>> {
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--quiet", "--no-run", "--package", "strata-benches", "--bench", "paths-*"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    let messages = command::output(cargo.current_dir(workspace()))?;
    let program = |name: &'static str| {
        let built = command::built_program(&messages, "bench", &format!("paths-{name}"));
        Ok((name, built.with_context(|| format!("cargo built no benchmark of {name}"))?))
    };
    BENCHMARKS.into_iter().map(program).collect()
}

fn cases(program: &Path) -> Result<Vec<Case>> {
    let listed = command::output(Command::new(program).arg("--cases"))?;
    let case = |line: &str| {
        let (operations, name) = line.split_once('\t').context("a line of a number and a name")?;
        Ok(Case { name: name.to_owned(), operations: operations.parse()? })
    };
    listed.lines().map(case).collect()
}

/// The instructions of all runs of a case.
fn count(valgrind: &Path, program: &Path, case: &str, runs: u32, folder: &Path) -> Result<u64> {
    let plain: String = case.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let out = folder.join(format!("{plain}.callgrind"));
    let mut run = Command::new(valgrind);
    run.args(["--tool=callgrind", &format!("--toggle-collect=*{COUNTED}*")]);
    run.arg(format!("--callgrind-out-file={}", out.display()));
    run.arg(program).args(["--count", case, &runs.to_string()]);
    command::output(&mut run)?;
    let text = std::fs::read_to_string(&out).with_context(|| out.display().to_string())?;
    match total(&text) {
        Some(0) | None => bail!("callgrind counted nothing in {COUNTED} of {}", program.display()),
        Some(total) => Ok(total),
    }
}

/// The total in an output of callgrind.
fn total(output: &str) -> Option<u64> {
    output.lines().find_map(|line| line.strip_prefix("summary:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrinds_total_is_found() {
        let output =
            "# callgrind format\nevents: Ir\nsummary: 1234\n\nob=(1) /x\nfn=(1) f\n1 1234\n\ntotals: 1234\n";
        assert_eq!(total(output), Some(1234));
        assert_eq!(total("events: Ir\n"), None);
        assert_eq!(total("summary: many\n"), None);
    }
}
