//! `cargo bench-peers`: compares Strata with qemu-storage-daemon, or two builds of Strata, in alternating turns, as
//! ratios.
//!
//! Owns the command line and the order of places and cases. The client sets no CPU affinity: on a machine with two
//! cores it shares them with the server, as a guest would.
#![forbid(unsafe_code)]

mod bench;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::time::Duration;
use strata_integration::command;
use strata_integration::daemon::{Backend, Profile, Program};

use bench::case::{CASES, Case, chosen};
use bench::contest::Rules;
use bench::gallery::{Gallery, Place, Sizes};
use bench::measure::Times;
use bench::report::{self, PlaceReport};

/// Measures Strata against qemu-storage-daemon, or another build of Strata: the same client, the same images, turn by turn.
#[derive(Parser)]
#[command(name = "cargo bench-peers", args_conflicts_with_subcommands = true)]
struct Options {
    #[command(flatten)]
    run: Run,
    #[command(subcommand)]
    hidden: Option<Hidden>,
}

#[derive(Args)]
struct Run {
    /// Run only the cases whose name matches; `*` stands for any text. May be given more than once
    #[arg(long = "case", value_name = "GLOB")]
    cases: Vec<String>,
    /// List the cases and exit
    #[arg(long)]
    list: bool,
    /// Measured turns; one turn before them verifies the data and does not count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    turns: u16,
    /// Where to put the images: /dev/shm, or a folder under target/
    #[arg(long = "where", value_name = "PLACE", default_value = "both")]
    places: Where,
    /// Use small images and short loads
    #[arg(long)]
    quick: bool,
    /// Duration of a load without a fixed amount of work, in seconds [default: 2, with --quick 0.5]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Before each turn wait at most S seconds for other processes to leave the machine idle
    #[arg(long, value_name = "S", default_value_t = 0)]
    wait_for_quiet: u32,
    /// How long the client busy-polls for completions before it sleeps, in microseconds; 0 to sleep at once. The client
    /// shares the machine's cores with the server
    #[arg(long, value_name = "US", default_value_t = 50)]
    client_polls: u32,
    /// Leave out the bare loop on the file, the stock rust-vmm backend and the null device
    #[arg(long)]
    no_limits: bool,
    /// The daemon to measure: `strata`, `qemu-storage-daemon`, or the path of another build of Strata
    #[arg(long, value_name = "DAEMON", default_value = "strata")]
    subject: Contestant,
    /// The daemon to compare with. Another build of Strata shows the effect of a change; the same daemon on both sides
    /// shows the random variation of the ratios
    #[arg(long, value_name = "DAEMON", default_value = "qemu-storage-daemon")]
    rival: Contestant,
    /// Also write all results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A daemon as named on the command line.
#[derive(Clone, Debug)]
enum Contestant {
    /// Named: Strata, which is built first, or an installed program.
    Known(Backend),
    /// The path of another build of Strata.
    Build(PathBuf),
}

impl FromStr for Contestant {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        if name.contains('/') { Ok(Self::Build(PathBuf::from(name))) } else { name.parse().map(Self::Known) }
    }
}

impl Contestant {
    fn program(&self) -> Result<Program> {
        match self {
            Self::Known(backend) => backend.program(Profile::Release),
            Self::Build(path) => Ok(Program { backend: Backend::Strata, path: path.clone() }),
        }
    }
}

#[derive(Subcommand)]
enum Hidden {
    /// Serve a null device, by which this program measures its own limit
    #[command(hide = true)]
    NullDevice {
        /// Path of the socket
        socket: PathBuf,
        /// Number of queues
        queues: u16,
        /// Virtual size in bytes
        bytes: u64,
    },
    /// Serve a raw file with vhost-user-backend and virtio-queue alone, as a peer
    #[command(hide = true)]
    StockBackend {
        /// Path of the socket
        socket: PathBuf,
        /// Path of the raw file
        file: PathBuf,
        /// Number of queues
        queues: u16,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// /dev/shm
    Shm,
    /// A folder under target/
    Disk,
    /// Both, one after the other
    Both,
}

impl Where {
    fn places(self) -> &'static [Place] {
        match self {
            Self::Shm => &[Place::Shm],
            Self::Disk => &[Place::Disk],
            Self::Both => &[Place::Shm, Place::Disk],
        }
    }
}

impl Run {
    fn sizes(&self) -> Sizes {
        if self.quick {
            Sizes { full: 256 << 20, allocated: 8 << 30, fresh: 1 << 30, sequential: 256 << 20 }
        } else {
            Sizes { full: 1 << 30, allocated: 32 << 30, fresh: 4 << 30, sequential: 1 << 30 }
        }
    }

    fn times(&self) -> Result<Times> {
        let (load, rest) = if self.quick { (0.5, 1.0) } else { (2.0, 3.0) };
        let load = self.seconds.unwrap_or(load);
        if !(0.05..=3600.0).contains(&load) {
            bail!("--seconds {load}: must be between 0.05 and 3600");
        }
        Ok(Times { load: Duration::from_secs_f64(load), rest: Duration::from_secs_f64(rest) })
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match options.hidden {
        Some(Hidden::NullDevice { socket, queues, bytes }) => {
            bench::null::serve(&socket, queues, bytes).map(|()| true)
        }
        Some(Hidden::StockBackend { socket, file, queues }) => {
            strata_integration::stock::serve(&socket, &file, queues).map(|()| true)
        }
        None => run(&options.run),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns true if there were no problems.
fn run(options: &Run) -> Result<bool> {
    let cases = chosen(&options.cases);
    if options.list {
        CASES.iter().for_each(|case| println!("{}", listed(case)));
        return Ok(true);
    }
    if cases.is_empty() {
        bail!("no case matches {}; --list shows all cases", options.cases.join(" or "));
    }
    let sizes = options.sizes();
    let rules = Rules {
        subject: options.subject.program()?,
        rival: options.rival.program()?,
        judge: Backend::QemuStorageDaemon.program(Profile::Release)?,
        turns: usize::from(options.turns),
        times: options.times()?,
        limits: !options.no_limits,
        null_bytes: sizes.full,
        client_polls: Duration::from_micros(u64::from(options.client_polls)),
        patience: Duration::from_secs(u64::from(options.wait_for_quiet)),
    };
    let versions = versions(&rules)?;
    println!("{versions}");
    let mut reports = Vec::new();
    for place in options.places.places() {
        let report = visit(*place, sizes, &rules, &cases)?;
        print!("{}", report::table(&report));
        reports.push(report);
    }
    conclude(options, &versions, &reports)
}

fn listed(case: &Case) -> String {
    let queues = if case.queues == 1 { "1 queue" } else { "2 queues" };
    format!("{:<22} {:?}, {queues}, depth {}, {:?}", case.name, case.image, case.depth, case.unit())
}

fn visit(place: Place, sizes: Sizes, rules: &Rules, cases: &[Case]) -> Result<PlaceReport> {
    eprintln!("{}: creating a full image of {} MiB", place.name(), sizes.full >> 20);
    let mut gallery = Gallery::open(place, sizes)?;
    let mut outcomes = Vec::new();
    for case in cases {
        eprintln!("{} {}", place.name(), case.name);
        let outcome = rules.run(&mut gallery, case, &mut |text| eprintln!("    {text}"));
        for problem in outcome.rows.iter().flat_map(|row| &row.problems) {
            eprintln!("    PROBLEM: {problem}");
        }
        outcomes.push(outcome);
    }
    Ok(PlaceReport { place, file_system: gallery.file_system()?, outcomes })
}

fn conclude(options: &Run, versions: &str, reports: &[PlaceReport]) -> Result<bool> {
    let others = report::others(reports);
    if let Some(others) = others {
        println!(
            "\nOthers on this machine (the kernel's own threads too) took {:.2} cores in the median sample, \
             {:.2} in the worst.",
            others.median, others.max
        );
    }
    if let Some(path) = &options.json {
        let value = json!({
            "versions": versions.lines().collect::<Vec<_>>(),
            "turns": options.turns,
            "quick": options.quick,
            "cpu-of-others": others.map_or(Value::Null, |others| json!([others.min, others.median, others.max])),
            "places": reports.iter().map(report::json).collect::<Vec<_>>(),
        });
        std::fs::write(path, serde_json::to_string_pretty(&value)?)
            .with_context(|| path.display().to_string())?;
    }
    let remarks: Vec<String> = reports.iter().flat_map(report::remarks).collect();
    if !remarks.is_empty() {
        println!("\nProblems and omissions:");
        remarks.iter().for_each(|line| println!("  {line}"));
    }
    let troubled = |row: &bench::contest::Row| !row.problems.is_empty();
    Ok(!reports.iter().flat_map(|report| &report.outcomes).any(|outcome| outcome.rows.iter().any(troubled)))
}

fn versions(rules: &Rules) -> Result<String> {
    let mut lines = Vec::new();
    for (role, program) in [("subject", &rules.subject), ("rival", &rules.rival)] {
        lines.push(format!("{role}: {}", version(program)?));
    }
    let kernel = command::output(Command::new("uname").args(["-sr"]))?;
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    lines.push(format!("{}, {cores} cores, load average before: {}", kernel.trim(), load.trim()));
    Ok(lines.join("\n"))
}

fn version(program: &Program) -> Result<String> {
    let text = command::output(Command::new(&program.path).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
