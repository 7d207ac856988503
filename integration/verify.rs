//! `cargo verify`: every check of the repository, from set-up to VM tests.
//!
//! Owns the order of the steps and the summary. Steps run one after the other, because each may use every core; only the
//! set-up, which mostly waits, runs beside the first ones. It never continues after a failed step.

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use strata_integration::daemon::workspace;
use strata_integration::guest::GuestKit;
use strata_integration::machine::Accelerator;
use strata_integration::picture;
use strata_integration::steps::Steps;
use strata_integration::{command, setup};

/// Checks everything: format, clippy, all tests, the VM tests, deliberate breakages, the fuzz targets, the loom models. Installs what it needs (as root, on Debian).
#[derive(Parser)]
#[command(name = "cargo verify")]
struct Options {
    /// Install nothing; missing tools are an error
    #[arg(long)]
    no_install: bool,
    /// The daemon under the VM tests: strata or qemu-storage-daemon
    #[arg(long, default_value = "strata")]
    backend: strata_integration::daemon::Backend,
}

/// The targets that are run once more with tiny bounds: those that find wrong contents, lost data or damage, and neither
/// are about a bound's value nor take long (tests/README.md, "Tiny bounds").
const TINY_BOUNDS_TARGETS: [&str; 14] = [
    "crash_random",
    "faults",
    "engine_model",
    "disk_model",
    "disk_cases",
    "disk_damage",
    "data_file",
    "guard",
    "bitmaps",
    "compressed",
    "header_features",
    "resize",
    "snapshots",
    "zeroes",
];

/// A folder in memory, where the host has it.
const MEMORY: &str = "/dev/shm";

fn main() -> ExitCode {
    let options = Options::parse();
    let mut steps = Steps::new();
    let result = run(&options, &mut steps);
    print!("{}", picture::steps(steps.times(), steps.colours()));
    match result {
        Ok(()) => {
            println!("\n{}", steps.colours().paint("1;32", "Everything passed."));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\n{} {error:#}", steps.colours().paint("1;31", "Not verified:"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, steps: &mut Steps) -> Result<()> {
    if !options.no_install {
        steps.run("Rust components", |line| setup::ensure_rust_components(&mut |text| line.now(text)))?;
    }
    std::thread::scope(|scope| {
        // Mostly waits for the network and the disk, so the compiler works meanwhile.
        let prepared = scope.spawn(|| prepare(options));
        check_and_build(options, steps)?;
        steps.run("set-up", |line| {
            let (kit, said) = prepared.join().expect("the set-up does not panic");
            said.iter().for_each(|text| line.keep(text));
            // Alone: a trial boot that takes too long counts as failed.
            let kit = kit?;
            let accelerator = Accelerator::choose(&kit)?;
            line.keep(&format!("guest kernel {}, accelerator {accelerator:?}", kit.release));
            Ok(())
        })
    })?;
    run_tests(options, steps)
}

/// Installs the tools and prepares the guest. Also returns the progress messages.
fn prepare(options: &Options) -> (Result<GuestKit>, Vec<String>) {
    let mut said = Vec::new();
    let say = &mut |text: &str| said.push(text.to_owned());
    let missing = setup::missing_tools();
    let tools = match options.no_install {
        true if missing.is_empty() => Ok(()),
        true => Err(anyhow!("missing: {missing:?}")),
        false => setup::ensure_tools(say),
    };
    (tools.and_then(|()| GuestKit::prepare(say)), said)
}

/// Needs nothing but Rust.
fn check_and_build(options: &Options, steps: &mut Steps) -> Result<()> {
    steps.run("format", |_| cargo(options, &["fmt", "--all", "--check"]))?;
    steps.run("clippy", |_| {
        cargo(options, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])
    })?;
    let build = if nextest_works() { &["nextest", "run"][..] } else { &["test", "--quiet"] };
    steps.run("build tests", |_| cargo(options, &[build, &["--workspace", "--no-run"]].concat()))
}

fn run_tests(options: &Options, steps: &mut Steps) -> Result<()> {
    // One more than processors: some tests wait for the host's disk or for other programs.
    let threads =
        std::thread::available_parallelism().map_or(2, |processors| processors.get() + 1).to_string();
    // The dev profile is quick to build, partly optimised, and has every check enabled.
    let run: &[&str] = if nextest_works() {
        &["nextest", "run", "--workspace", "--no-fail-fast", "--test-threads", &threads]
    } else {
        // The same targets as with `--no-run` and with nextest: no benchmarks, which clippy has checked.
        &["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"]
    };
    steps.run("tests and VM tests", |_| all_tests(options, run))?;
    // After the tests: a pass of the crash tests means something only if a broken rule makes them fail.
    steps.run("deliberate breakages", |_| {
        some_tests(options, &["--features", "strata-crash/mutations", "--test", "mutations"], &[])
    })?;
    steps.run("tests with tiny bounds", |_| tiny_bounds(options))?;
    steps.run("fuzz targets, one minute", |_| fuzz(options))?;
    steps.run("documentation tests", |_| cargo(options, &["test", "--quiet", "--workspace", "--doc"]))?;
    steps.run("interleavings (loom)", |_| interleavings(options))
}

/// Runs the tests that were built before. `STRATA_BIN` gives them the daemon's path: if they built the daemon alone,
/// cargo would choose other features of its dependencies and rebuild most of them.
fn all_tests(options: &Options, arguments: &[&str]) -> Result<()> {
    let mut build = cargo_command(options, &["test", "--quiet", "--workspace", "--no-run"]);
    let messages = command::output(build.args(["--message-format", "json-render-diagnostics"]))?;
    let strata = command::built_program(&messages, "bin", "strata").context("cargo built no daemon")?;
    let mut cargo = cargo_command(options, arguments);
    cargo.env("STRATA_BIN", strata);
    run_through(cargo)
}

/// Runs some test targets. `--workspace` selects all packages, so that the features of dependencies stay the same and
/// cargo reuses what it has built.
fn some_tests(options: &Options, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let mut cargo = cargo_command(options, &["test", "--quiet", "--workspace"]);
    cargo.args(arguments).envs(environment.iter().copied());
    run_through(cargo)
}

/// Runs tests with tiny bounds (src/engine/bounds.rs), so that they go past every bound. Requests then take many times
/// as many steps, so the tests with random input get less of it. Almost each step is a small request to the host, so the
/// images are in memory: on a disk the tests would mostly wait for it.
fn tiny_bounds(options: &Options) -> Result<()> {
    let run: &[&str] = if nextest_works() { &["nextest", "run"] } else { &["test", "--quiet"] };
    let mut cargo = cargo_command(options, run);
    cargo.args([
        "--workspace",
        "--no-fail-fast",
        "--features",
        "strata-crash/tiny-bounds,strata-tests/tiny-bounds",
    ]);
    cargo.args(TINY_BOUNDS_TARGETS.iter().flat_map(|target| ["--test", target]));
    cargo.envs([("STRATA_CRASH_SECONDS", "10"), ("STRATA_MODEL_CASES", "1")]);
    if Path::new(MEMORY).is_dir() {
        cargo.env("TMPDIR", MEMORY);
    }
    run_through(cargo)
}

/// Runs the loom models of the engine's lock-free and waiting code (src/engine/loom_tests.rs): bounded, some ten
/// seconds without the build. Their build flags differ from all others, so they have their own target directory.
fn interleavings(options: &Options) -> Result<()> {
    let mut cargo =
        cargo_command(options, &["test", "--package", "engine", "--profile", "loom", "--lib", "loom"]);
    cargo.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", target_folder().join("loom"));
    run_through(cargo)
}

/// Runs the fuzz targets on random mutations of their seeds (tests/README.md), and checks that the targets for
/// cargo-fuzz compile. Those are in their own package; the check needs no libFuzzer.
fn fuzz(options: &Options) -> Result<()> {
    some_tests(options, &["--test", "fuzz", "--", "--nocapture"], &[("STRATA_FUZZ_SECONDS", "60")])?;
    let check = ["check", "--quiet", "--manifest-path", "tests/fuzz/Cargo.toml", "--no-default-features"];
    let mut cargo = cargo_command(options, &check);
    // The profile is the workspace's, so the dependencies are built already.
    cargo.env("CARGO_TARGET_DIR", target_folder());
    run_through(cargo)
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn nextest_works() -> bool {
    let mut probe = Command::new("cargo");
    probe.args(["nextest", "--version"]);
    command::capture(&mut probe).is_ok_and(|output| output.status.success())
}

/// Runs cargo with its output passed through, so that the user sees why a test fails.
fn cargo(options: &Options, arguments: &[&str]) -> Result<()> {
    run_through(cargo_command(options, arguments))
}

fn cargo_command(options: &Options, arguments: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(arguments).current_dir(workspace());
    cargo.env("STRATA_REQUIRE_TOOLS", "1").env("STRATA_TEST_BACKEND", options.backend.to_string());
    // Incremental builds cost time, and a full check rarely follows a small change. A failed test names its line
    // without debug information.
    cargo.env("CARGO_INCREMENTAL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
    cargo
}

fn run_through(mut command: Command) -> Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{} ended with {status}", command::shown(&command));
    }
    Ok(())
}
