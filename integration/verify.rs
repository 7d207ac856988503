//! `cargo verify`: the whole check of the repository, from set-up to VM tests.
//!
//! Owns the order of the steps and the summary. Steps run one after the other, as each may use every core. It never
//! goes on after a failed step.

use anyhow::{Result, bail};
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
            cargo(options, &["nextest", "run", "--workspace", "--no-fail-fast"])
        })?;
    } else {
        steps.run("build tests", |_| cargo(options, &["test", "--quiet", "--workspace", "--no-run"]))?;
        steps.run("tests and VM tests", |_| {
            cargo(options, &["test", "--workspace", "--all-targets", "--no-fail-fast"])
        })?;
    }
    // after the tests: that the crash machine says yes is worth something only if it can say no
    steps.run("deliberate breakages", |_| {
        cargo(
            options,
            &["test", "--quiet", "-p", "strata-tests", "--features", "mutations", "--test", "mutations"],
        )
    })?;
    steps.run("fuzz targets, for a minute", |_| fuzz(options))?;
    steps.run("documentation tests", |_| cargo(options, &["test", "--quiet", "--workspace", "--doc"]))?;
    steps.run("interleavings (loom)", |_| interleavings(options))
}

/// The engine's models of its lock-free and waiting parts (src/engine/loom_tests.rs): bounded, some ten seconds once
/// they are built. The build is another than everyone else's, so it has a target directory of its own.
fn interleavings(options: &Options) -> Result<()> {
    let mut cargo = cargo_command(options, &["test", "--package", "engine", "--release", "--lib", "loom"]);
    cargo.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", target_folder().join("loom"));
    // Optimised, but not to the last: the models take seconds, and a release's build takes minutes.
    for (name, value) in [("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "false")] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
    }
    run_through(cargo)
}

/// The fuzz targets on what chance makes of their seeds (tests/README.md), and that those for cargo-fuzz can be built:
/// they are in a package of their own, and it needs no libFuzzer for that.
fn fuzz(options: &Options) -> Result<()> {
    let mut cargo = cargo_command(options, &["test", "--quiet", "-p", "strata-tests", "--test", "fuzz"]);
    cargo.args(["--", "--nocapture"]).env("STRATA_FUZZ_SECONDS", "60");
    run_through(cargo)?;
    let check = ["check", "--quiet", "--manifest-path", "tests/fuzz/Cargo.toml", "--no-default-features"];
    let mut cargo = cargo_command(options, &check);
    cargo.env("CARGO_TARGET_DIR", target_folder().join("fuzz"));
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
    cargo
}

fn run_through(mut command: Command) -> Result<()> {
    let status = command.status()?;
    if !status.success() {
        bail!("{} ended with {status}", command::shown(&command));
    }
    Ok(())
}
