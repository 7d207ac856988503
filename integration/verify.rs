//! `cargo verify`: the whole check of the repository, from set-up to VM tests.
//!
//! Owns the order of the steps and the summary. Steps run one after the other, as each may use every core. It never
//! goes on after a failed step.

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::path::PathBuf;
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
    /// Check with what is installed; missing tools are an error
    #[arg(long)]
    no_install: bool,
    /// The daemon under the VM tests: strata or qemu-storage-daemon
    #[arg(long, default_value = "strata")]
    backend: strata_integration::daemon::Backend,
}

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
    steps.run("set-up", |line| {
        let say = &mut |text: &str| line.now(text);
        if options.no_install {
            let missing = setup::missing_tools();
            if !missing.is_empty() {
                bail!("missing: {missing:?}");
            }
        } else {
            setup::ensure_tools(say)?;
            setup::ensure_rust_components(say)?;
        }
        let kit = GuestKit::prepare(say)?;
        let accelerator = Accelerator::choose(&kit)?;
        line.keep(&format!("guest kernel {}, QEMU runs it by {accelerator:?}", kit.release));
        Ok(())
    })?;
    steps.run("format", |_| cargo(options, &["fmt", "--all", "--check"]))?;
    steps.run("clippy", |_| {
        cargo(options, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"])
    })?;
    // the dev profile: quick to build, half optimised, and with every check on
    if nextest_works() {
        steps.run("build tests", |_| cargo(options, &["nextest", "run", "--workspace", "--no-run"]))?;
        steps.run("tests and VM tests", |_| {
            all_tests(options, &["nextest", "run", "--workspace", "--no-fail-fast"])
        })?;
    } else {
        steps.run("build tests", |_| cargo(options, &["test", "--quiet", "--workspace", "--no-run"]))?;
        steps.run("tests and VM tests", |_| {
            // as `--no-run` built them, and as nextest takes them: no benchmarks, which clippy saw
            all_tests(options, &["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"])
        })?;
    }
    // after the tests: that the crash machine says yes is worth something only if it can say no
    steps.run("deliberate breakages", |_| {
        one_test(options, &["--features", "strata-tests/mutations", "--test", "mutations"], &[])
    })?;
    steps.run("fuzz targets, for a minute", |_| fuzz(options))?;
    steps.run("documentation tests", |_| cargo(options, &["test", "--quiet", "--workspace", "--doc"]))?;
    steps.run("interleavings (loom)", |_| interleavings(options))
}

/// The tests that were built before. Those that run the daemon are told where it is: if they asked cargo for it alone, the
/// features of what it depends on were others, and most of that would be built once more.
fn all_tests(options: &Options, arguments: &[&str]) -> Result<()> {
    let mut build = cargo_command(options, &["test", "--quiet", "--workspace", "--no-run"]);
    let messages = command::output(build.args(["--message-format", "json-render-diagnostics"]))?;
    let strata = command::built_program(&messages, "bin", "strata").context("cargo built no daemon")?;
    let mut cargo = cargo_command(options, arguments);
    cargo.env("STRATA_BIN", strata);
    run_through(cargo)
}

/// One test target of strata-tests. All packages are named, as the features of what they depend on are then those of the
/// whole, and what is built already is used: for one package alone, most would be built once more.
fn one_test(options: &Options, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let mut cargo = cargo_command(options, &["test", "--quiet", "--workspace"]);
    cargo.args(arguments).envs(environment.iter().copied());
    run_through(cargo)
}

/// The engine's models of its lock-free and waiting parts (src/engine/loom_tests.rs): bounded, some ten seconds once
/// they are built. The build is another than everyone else's, so it has a target directory of its own.
fn interleavings(options: &Options) -> Result<()> {
    let mut cargo =
        cargo_command(options, &["test", "--package", "engine", "--profile", "loom", "--lib", "loom"]);
    cargo.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", target_folder().join("loom"));
    run_through(cargo)
}

/// The fuzz targets on what chance makes of their seeds (tests/README.md), and that those for cargo-fuzz can be built:
/// they are in a package of their own, and it needs no libFuzzer for that.
fn fuzz(options: &Options) -> Result<()> {
    one_test(options, &["--test", "fuzz", "--", "--nocapture"], &[("STRATA_FUZZ_SECONDS", "60")])?;
    let check = ["check", "--quiet", "--manifest-path", "tests/fuzz/Cargo.toml", "--no-default-features"];
    let mut cargo = cargo_command(options, &check);
    // Its profile is the workspace's, so what the packages of others gave is there already.
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

/// Runs cargo with its output on ours: a failing test's words are what a person needs.
fn cargo(options: &Options, arguments: &[&str]) -> Result<()> {
    run_through(cargo_command(options, arguments))
}

fn cargo_command(options: &Options, arguments: &[&str]) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(arguments).current_dir(workspace());
    cargo.env("STRATA_REQUIRE_TOOLS", "1").env("STRATA_TEST_BACKEND", options.backend.to_string());
    // What one build remembers for the next costs time, and a whole check is seldom of a small change. A failed test says
    // where it failed without the lines of a backtrace.
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
