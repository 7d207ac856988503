//! `cargo demo`: shows the main job. A virtual machine runs on an overlay that the daemon serves, boots a second
//! time and finds all its files. A summary shows times, requests and space.
//!
//! Owns the order of the steps and their texts. `scenario` owns the guest's work and the conditions that must hold.

use anyhow::{Context, Result};
use clap::Parser;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use strata_integration::daemon::{Backend, Profile, Program, ServeSpec};
use strata_integration::guest::GuestKit;
use strata_integration::image::{self, Backing};
use strata_integration::machine::{self, Accelerator};
use strata_integration::picture::{bytes, seconds};
use strata_integration::scenario::{self, FirstVisit, Throughput, Work};
use strata_integration::stand::{self, Checkpoint, Stand, Visit};
use strata_integration::steps::{Colours, Line, Steps};
use strata_integration::{command, picture, setup};

/// Shows a virtual machine running on a qcow2 disk. Installs what it needs (as root, on Debian).
#[derive(Parser)]
#[command(name = "cargo demo")]
struct Options {
    /// Leave the files in ./demo-out and print the commands for a run by hand
    #[arg(long)]
    keep: bool,
    /// The daemon to run: strata or qemu-storage-daemon
    #[arg(long, default_value = "strata")]
    backend: Backend,
}

/// The disk's size in bytes.
const DISK: u64 = 1 << 30;
/// MiB of the base image that have contents.
const BASE_MIB: u64 = 48;
/// MiB of the disk that are compared by checksum, in addition to all files: checksums are slow in an emulated machine.
const SUM_MIB: u64 = 64;
/// MiB that each of fio's two jobs writes.
const FIO_MIB: u64 = 24;

fn main() -> ExitCode {
    let options = Options::parse();
    let mut steps = Steps::new();
    match show(&options, &mut steps) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\n{} {error:#}", steps.colours().paint("1;31", "The demo failed:"));
            ExitCode::FAILURE
        }
    }
}

/// The folder of the demo's files.
enum Place {
    Kept(PathBuf),
    Passing(tempfile::TempDir),
}

impl Place {
    fn choose(keep: bool) -> Result<Self> {
        if !keep {
            return Ok(Self::Passing(stand::scratch()?));
        }
        let folder = std::env::current_dir()?.join("demo-out");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self::Kept(folder))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Passing(folder) => folder.path(),
        }
    }

    /// Keeps the files after a failure, for its analysis.
    fn keep(self) -> PathBuf {
        match self {
            Self::Kept(path) => path,
            Self::Passing(folder) => folder.keep(),
        }
    }
}

fn show(options: &Options, steps: &mut Steps) -> Result<()> {
    let kit = steps.run("set-up", |line| {
        let say = &mut |text: &str| line.now(text);
        setup::ensure_tools(say)?;
        GuestKit::prepare(say)
    })?;
    let accelerator = Accelerator::choose(&kit)?;
    let building = match options.backend {
        Backend::Strata => "build strata",
        Backend::QemuStorageDaemon => "find qemu-storage-daemon",
    };
    let program = steps.run(building, |line| {
        if options.backend == Backend::Strata {
            line.now("cargo build --release, takes some minutes the first time");
        }
        options.backend.program(Profile::Release)
    })?;
    let place = Place::choose(options.keep)?;
    let serve = ServeSpec {
        image: place.path().join("overlay.qcow2"),
        format: "qcow2".to_owned(),
        socket: place.path().join("disk.sock"),
        queues: 2,
        serial: "strata-demo".to_owned(),
        io_thread: false,
    };
    let stand = Stand { kit, accelerator, program, serve, packed: false, folder: place.path().join("runs") };
    let shown = visits(&stand, place.path(), steps);
    match shown {
        Ok(told) => {
            print!("{told}");
            if let Place::Kept(folder) = &place {
                print!("{}", by_hand(&stand, folder)?);
            }
            Ok(())
        }
        Err(error) => Err(error.context(format!("consoles and logs are in {}", place.keep().display()))),
    }
}

/// Runs all steps from the images to the last comparison. Returns the summary.
fn visits(stand: &Stand, folder: &Path, steps: &mut Steps) -> Result<String> {
    let base = steps.run("base image and overlay", |line| make_images(stand, folder, line))?;
    let empty = image::allocated_bytes(&stand.serve.image)?;
    let work = Work { fio_mib: FIO_MIB, mkfs_options: String::new(), base_mib: BASE_MIB };
    let first = steps.run("first boot: format, use, trim", |line| {
        line.now(&format!("booting ({:?})", stand.accelerator));
        let first =
            scenario::first_visit(stand, "first-boot", &work, &base, &mut |point| report(line, point))?;
        line.keep(&disk_in_words(&first.visit)?);
        Ok(first)
    })?;
    let second = steps.run("second boot: new daemon, new machine", |line| {
        let second = scenario::second_visit(stand, "second-boot", SUM_MIB, &first.files)?;
        line.keep(&format!("{} files found, every SHA-256 correct, e2fsck clean", first.files.len()));
        Ok(second)
    })?;
    steps.run("qemu-img check and comparison", |line| {
        scenario::host_agrees(stand, &second, SUM_MIB, &first.files, folder)?;
        line.keep("image clean; qemu-img reads the same disk and the same files as the guest");
        Ok(())
    })?;
    draw(stand, empty, &first, &second, steps)
}

/// Creates a base image with contents and an empty overlay. Returns the checksum that a guest must read.
fn make_images(stand: &Stand, folder: &Path, line: &Line) -> Result<String> {
    let base = folder.join("base.qcow2");
    image::create(&base, "qcow2", DISK, None, "")?;
    for piece in 0..BASE_MIB / 4 {
        let byte = u8::try_from(piece + 1).expect("a handful of pieces");
        image::write_pattern(&base, "qcow2", piece * (4 << 20), 4 << 20, byte)?;
    }
    let below = Backing { image: &base, format: "qcow2" };
    image::create(&stand.serve.image, "qcow2", DISK, Some(below), "")?;
    line.keep(&format!("{} disk, {BASE_MIB} MiB of it in the base image, empty overlay", bytes(DISK)));
    let flat = folder.join("flat.raw");
    image::flatten(&base, "qcow2", &flat)?;
    let sum = image::md5(&flat, BASE_MIB)?;
    std::fs::remove_file(&flat)?;
    Ok(sum)
}

/// The text for a checkpoint of the first visit.
fn in_words(checkpoint: &str) -> &str {
    match checkpoint {
        "base" => "base read through the overlay",
        "mkfs" => "mkfs.ext4 and mount",
        "fio" => "fio, every block verified",
        "files" => "files written",
        "trim" => "deleted and trimmed",
        other => other,
    }
}

fn report(line: &Line, point: &Checkpoint) {
    let (words, space) = (in_words(&point.name), bytes(point.allocated));
    line.keep(&format!("{:>7}  {words}: the image occupies {space}", seconds(point.at)));
}

fn disk_in_words(visit: &Visit) -> Result<String> {
    Ok(format!(
        "the guest's disk: {}, {} queues, serial {}, {} B blocks, {}, discards up to {} in steps of {}",
        bytes(visit.number("disk.bytes")?),
        visit.number("disk.queues")?,
        visit.fact("disk.serial")?,
        visit.number("disk.block")?,
        visit.fact("disk.cache")?,
        bytes(visit.number("disk.discard_max")?),
        bytes(visit.number("disk.discard_granularity")?),
    ))
}

fn draw(stand: &Stand, empty: u64, first: &FirstVisit, second: &Visit, steps: &Steps) -> Result<String> {
    let colours = steps.colours();
    let mut text = picture::steps(steps.times(), colours);
    let last = first.visit.checkpoints.last().context("the first visit had no checkpoints")?;
    text += &picture::requests(last.requests, colours);
    text += &throughput(first, colours)?;
    text += &daemon_totals(stand, &first.visit);
    let mut moments = vec![("new overlay".to_owned(), empty)];
    for point in &first.visit.checkpoints {
        moments.push((in_words(&point.name).to_owned(), point.allocated));
    }
    moments.push(("daemon ended".to_owned(), first.visit.allocated_at_end));
    moments.push(("after the second boot".to_owned(), second.allocated_at_end));
    text += &picture::space(&moments, colours);
    let verdict = format!(
        "A virtual machine ran on {} twice without losing data; {} were given back to the host.",
        stand.program.backend,
        bytes(first.visit.checkpoint("files")?.allocated.saturating_sub(first.visit.allocated_at_end))
    );
    text += &format!("\n{}\n", colours.paint("1;32", &verdict));
    Ok(text)
}

fn throughput(first: &FirstVisit, colours: Colours) -> Result<String> {
    let mut text = picture::heading("fio in the guest, two jobs, 4–64 KiB, random", colours);
    let row = |name: &str, side: Throughput| {
        let rate = bytes(side.bytes_per_second as u64);
        (name.to_owned(), side.bytes_per_second, format!("{rate}/s, {:.0} requests/s", side.iops))
    };
    let rows = [row("write", first.fio.write), row("read and verify", first.fio.read)];
    text += &picture::bars(&rows, "34", colours);
    let interrupts = scenario::queue_interrupts(&first.visit)?;
    let each: Vec<String> =
        interrupts.iter().enumerate().map(|(queue, count)| format!("queue {queue}: {count}")).collect();
    text += &format!("  interrupts  {}\n", each.join(", "));
    Ok(text)
}

/// The daemon's own counters, if it logs them.
fn daemon_totals(stand: &Stand, visit: &Visit) -> String {
    if visit.totals.is_empty() {
        return String::new();
    }
    let in_words = |(name, count): (&String, &u64)| {
        if name.ends_with("_bytes") { format!("{name} {}", bytes(*count)) } else { format!("{name} {count}") }
    };
    let pairs: Vec<String> = visit.totals.iter().map(in_words).collect();
    format!("\n{} counted: {}\n", stand.program.backend, pairs.join(", "))
}

/// The kept files and the commands to use them by hand.
fn by_hand(stand: &Stand, folder: &Path) -> Result<String> {
    let (kernel, initramfs) = (folder.join("vmlinuz"), folder.join("initramfs.cpio"));
    std::fs::copy(&stand.kit.kernel, &kernel).context("cannot copy the kernel")?;
    machine::write_initramfs(&stand.kit, None, &initramfs)?;
    let program = Program { backend: stand.program.backend, path: stand.program.path.clone() };
    let serve = program.command(&stand.serve);
    let mut qemu = stand.machine("").command(&kernel, &initramfs);
    qemu.args(["-serial", "mon:stdio"]);
    let mut check = Command::new("qemu-img");
    check.args(["check"]).arg(&stand.serve.image);
    Ok(format!(
        "\nThe files are in {}. Run these by hand, the first two in a terminal each:\n\n{}\n\n{}\n\n{}\n\n\
         The machine starts a shell; the disk is /dev/vda (mount /dev/vda /mnt), \"exit\" powers it off.\n",
        folder.display(),
        command::shown_in_lines(&serve),
        command::shown_in_lines(&qemu),
        command::shown_in_lines(&check),
    ))
}
