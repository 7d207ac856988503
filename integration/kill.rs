//! Kills the daemon at random moments under load, some hundred times, and starts it again on the same image. Flushed
//! data must be there, no sector may hold data of another, and the image may have leaks but no errors.
//!
//! A killed process loses nothing from the host's page cache and disk. This tests the daemon's logic and the order of
//! its writes to the host. The simulated host of tests/ covers power loss.
//!
//! `STRATA_KILL_ROUNDS` sets the number of rounds of all cases together (500), `STRATA_KILL_SEED` the random choices.
//! `STRATA_TEST_BACKEND=qemu-storage-daemon` shows that the test can fail.

mod restarts;
mod survival;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use strata_integration::command;
use strata_integration::daemon::{Backend, Daemon, Profile, Program, ServeSpec};
use strata_integration::image::{self, Backing, Health};
use strata_kit::Qemu;
use strata_kit::client::{Client, Options};
use strata_kit::random::Random;
use tempfile::TempDir;

use survival::guest::{Failure, Guest, Tally};
use survival::ledger::Ledger;
use survival::stamp::{SECTOR, Value, fill};

type Trouble = Box<dyn std::error::Error>;

/// Default number of rounds of all cases together.
const ROUNDS: u64 = 500;
/// Number of cases that share the rounds.
const CASES: u64 = 4;
/// Rounds between two checks by QEMU's tools.
const LOOK_EVERY: u64 = 25;
/// A daemon reserves clusters ahead, at most this many bytes; a kill may leak them.
const RESERVED_BYTES_MAX: u64 = 16 << 20;
/// How long a search for leaks may take.
const SEARCH_PATIENCE: Duration = Duration::from_secs(60);
/// The generation of the stamps in the backing file.
const BASE_GENERATION: u64 = 1;
/// Bit of VIRTIO_BLK_F_CONFIG_WCE.
const CONFIG_WCE: u32 = 11;

/// One kind of image.
struct Case {
    name: &'static str,
    cluster_size: u64,
    /// Virtual size in bytes.
    size: u64,
    /// The format of the backing file, if the image has one.
    backing: Option<&'static str>,
}

impl Case {
    /// The contents of the backing file: three clusters in four are written.
    fn base(&self, sector: u64) -> Value {
        let written = self.backing.is_some() && !(sector * SECTOR / (64 << 10)).is_multiple_of(4);
        if written { Value::Written(BASE_GENERATION) } else { Value::Zero }
    }

    fn sectors(&self) -> u64 {
        self.size / SECTOR
    }

    /// Creates the image and its backing file.
    fn create(&self, folder: &Path) -> Result<PathBuf, Trouble> {
        let top = folder.join("top.qcow2");
        let options = format!("cluster_size={}", self.cluster_size);
        let Some(format) = self.backing else {
            image::create(&top, "qcow2", self.size, None, &options)?;
            return Ok(top);
        };
        let raw = folder.join("base.raw");
        let mut bytes = vec![0; self.size as usize];
        for (sector, place) in bytes.chunks_mut(SECTOR as usize).enumerate() {
            if let Value::Written(generation) = self.base(sector as u64) {
                fill(place, sector as u64 * SECTOR, generation);
            }
        }
        std::fs::write(&raw, bytes)?;
        let base =
            if format == "raw" { raw } else { convert(&raw, "raw", folder.join("base.qcow2"), format)? };
        image::create(&top, "qcow2", self.size, Some(Backing { image: &base, format }), &options)?;
        Ok(top)
    }
}

fn convert(from: &Path, format: &str, to: PathBuf, into: &str) -> Result<PathBuf, Trouble> {
    let mut command = Command::new("qemu-img");
    command::output(command.args(["convert", "-f", format, "-O", into]).arg(from).arg(&to))?;
    Ok(to)
}

/// A number from the environment.
fn setting(name: &str, fallback: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {text}")),
        Err(_) => fallback,
    }
}

/// The state of a running case.
struct Run {
    case: Case,
    program: Program,
    folder: TempDir,
    image: PathBuf,
    ledger: Ledger,
    random: Random,
    generation: u64,
    total: Tally,
    /// Kills since leaks were last repaired.
    kills: u64,
    leaks_max: u64,
}

impl Run {
    /// `None` if QEMU's tools are missing; a message about it has been printed.
    fn new(case: Case, seed: u64) -> Result<Option<Self>, Trouble> {
        if Qemu::find().is_none() {
            return Ok(None);
        }
        let program = Backend::from_environment()?.program(Profile::Dev)?;
        let folder = TempDir::new()?;
        let image = case.create(folder.path())?;
        let ledger = Ledger::new((0..case.sectors()).map(|sector| case.base(sector)));
        let (random, generation) = (Random::new(seed), BASE_GENERATION + 1);
        let total = Tally::default();
        let run =
            Self { case, program, folder, image, ledger, random, generation, total, kills: 0, leaks_max: 0 };
        Ok(Some(run))
    }

    fn serve(&self) -> Result<(Daemon, Client), Trouble> {
        let socket = self.folder.path().join("disk.sock");
        let spec = ServeSpec {
            image: self.image.clone(),
            format: "qcow2".into(),
            socket: socket.clone(),
            queues: 2,
            serial: "kill-test".into(),
            io_thread: false,
        };
        if self.program.backend == Backend::QemuStorageDaemon {
            // Unlike Strata, this daemon does not wait for its predecessor's lock, which lasts until the last I/O is
            // done. The check does wait.
            image::check(&self.image)?;
        }
        let daemon = Daemon::start(&self.program, &spec, &self.folder.path().join("daemon.log"))?;
        let mut options = Options {
            queues: 2,
            queue_size: 64,
            slots_max: 16,
            data_capacity: 256 << 10,
            ..Options::default()
        };
        if self.program.backend.offers_a_wrong_cache_switch() {
            options = options.without(&[CONFIG_WCE]);
        }
        Ok((daemon, Client::connect(&socket, &options)?))
    }

    /// One round: checks the disk that the last daemon left, applies load, kills the daemon.
    fn round(&mut self) -> Result<(), Trouble> {
        let (daemon, client) = self.serve()?;
        let requests = self.random.below(400);
        let time = Duration::from_micros(self.random.below(2000));
        let cluster_sectors = self.case.cluster_size / SECTOR;
        let mut guest =
            Guest::new(client, &mut self.ledger, &mut self.random, &mut self.generation, cluster_sectors);
        let explain = |failure: Failure, daemon: &Daemon| format!("{}\n{}", failure.0, daemon.log_tail());
        guest.settle().map_err(|failure| explain(failure, &daemon))?;
        guest.work(requests, time).map_err(|failure| explain(failure, &daemon))?;
        daemon.kill()?;
        let tally = guest.leave().map_err(|failure| failure.0)?;
        self.kills += 1;
        let total = &mut self.total;
        total.requests += tally.requests;
        total.changes += tally.changes;
        total.changes_sent += tally.changes_sent;
        total.unmaps += tally.unmaps;
        total.flushes += tally.flushes;
        total.cut_off += tally.cut_off;
        Ok(())
    }

    /// Checks the image with QEMU's tools: no errors, few leaks, correct contents. The next daemon must read the same
    /// contents.
    fn check(&mut self, repair: bool) -> Result<(), Trouble> {
        match image::check(&self.image)? {
            Health::Clean => {}
            Health::Leaks(leaks) => {
                self.leaks_max = self.leaks_max.max(leaks);
                let cluster = self.case.cluster_size;
                // Reserved clusters, clusters allocated and freed without a flush, and some tables.
                let most = self.kills * (RESERVED_BYTES_MAX + 2 * self.case.size) / cluster + 64;
                if leaks > most {
                    return Err(
                        format!("{leaks} clusters leaked in {} kills: more than {most}", self.kills).into()
                    );
                }
            }
            Health::Broken(text) => return Err(text.into()),
        }
        let raw = convert(&self.image, "qcow2", self.folder.path().join("seen.raw"), "raw")?;
        let seen = std::fs::read(&raw)?;
        self.ledger.settle(&seen).map_err(|wrong| format!("read by QEMU: {wrong}"))?;
        if repair {
            self.recover()?;
            self.kills = 0;
        }
        Ok(())
    }

    /// A round without a kill: however much the kills leaked, the daemon must give all of it back before it stops.
    fn recover(&self) -> Result<(), Trouble> {
        if self.program.backend == Backend::QemuStorageDaemon {
            let mut command = Command::new("qemu-img");
            command.args(["check", "-q", "-f", "qcow2", "-r", "leaks"]);
            command::output(command.arg(&self.image))?;
            return Ok(());
        }
        let leaks = !matches!(image::check(&self.image)?, Health::Clean);
        let (daemon, client) = self.serve()?;
        if leaks {
            daemon.wait_for_log("an earlier crash left counted is given back", SEARCH_PATIENCE)?;
        }
        client.abandon();
        daemon.stop()?;
        image::expect_clean(&self.image)?;
        Ok(())
    }

    fn rounds(&mut self, rounds: u64) -> Result<(), Trouble> {
        let place =
            |round: u64| move |trouble: Trouble| -> Trouble { format!("round {round}: {trouble}").into() };
        for round in 1..=rounds {
            self.round().map_err(place(round))?;
            if round % LOOK_EVERY == 0 || round == rounds {
                // Leaks are left to add up every second time, and then given back.
                self.check(round / LOOK_EVERY % 2 == 1).map_err(place(round))?;
            }
        }
        // The last one ends in good order: then nothing is wrong at all.
        self.recover()?;
        self.check(false)?;
        image::expect_clean(&self.image)?;
        Ok(())
    }
}

fn survive(number: u64, case: Case) {
    let rounds = setting("STRATA_KILL_ROUNDS", ROUNDS);
    let rounds = rounds / CASES + u64::from(number < rounds % CASES);
    let seed = setting("STRATA_KILL_SEED", 1).wrapping_mul(CASES).wrapping_add(number);
    let fail = |what: &dyn Display| -> ! { panic!("case {}, seed {seed}: {what}", number) };
    let Some(mut run) = Run::new(case, seed).unwrap_or_else(|trouble| fail(&trouble)) else { return };
    let began = Instant::now();
    if let Err(trouble) = run.rounds(rounds) {
        let kept = run.folder.keep();
        fail(&format!("{trouble}\nthe image is kept in {}", kept.display()));
    }
    let Tally { requests, changes, unmaps, changes_sent, flushes, cut_off, .. } = run.total;
    println!(
        "{}: {rounds} kills in {:.1} s: {requests} requests, {changes} changes answered ({} % of those sent unmap), \
         {flushes} flushes answered, {cut_off} requests cut off, at most {} clusters leaked",
        run.case.name,
        began.elapsed().as_secs_f64(),
        unmaps * 100 / changes_sent.max(1),
        run.leaks_max,
    );
}

#[test]
fn flushed_data_survives_kills_with_small_clusters() {
    survive(0, Case { name: "4 KiB", cluster_size: 4 << 10, size: 8 << 20, backing: None });
}

#[test]
fn flushed_data_survives_kills_with_small_clusters_over_qcow2() {
    survive(
        1,
        Case { name: "4 KiB over qcow2", cluster_size: 4 << 10, size: 8 << 20, backing: Some("qcow2") },
    );
}

#[test]
fn flushed_data_survives_kills_with_64_kib_clusters() {
    survive(2, Case { name: "64 KiB", cluster_size: 64 << 10, size: 16 << 20, backing: None });
}

#[test]
fn flushed_data_survives_kills_with_64_kib_clusters_over_raw() {
    survive(
        3,
        Case { name: "64 KiB over raw", cluster_size: 64 << 10, size: 16 << 20, backing: Some("raw") },
    );
}
