//! Kills the daemon again and again while one client lives on: it starts the daemon on the same socket and connects
//! again with its in-flight region. Each request must be answered exactly once: none is lost, none is answered twice,
//! and none is answered that was not sent (the client fails on such an answer).
//!
//! The guest turns its write cache off once, on its first connection. So whatever was answered must be there later,
//! which also shows that the daemons keep that setting.
//!
//! `STRATA_RESTART_ROUNDS` sets the number of kills of all cases together (100), `STRATA_KILL_SEED` the random choices.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use strata_integration::command;
use strata_integration::daemon::{self, Backend, Daemon, Profile, Program, ServeSpec};
use strata_integration::image::{self, Backing, Health};
use strata_kit::Qemu;
use strata_kit::client::{Client, Options};
use strata_kit::random::Random;
use tempfile::TempDir;

use crate::setting;
use crate::survival::guest::{Guest, Tally};
use crate::survival::ledger::Ledger;
use crate::survival::stamp::{SECTOR, Value};

type Trouble = Box<dyn std::error::Error>;

/// Default number of kills.
const ROUNDS: u64 = 100;
/// Number of cases that share them.
const CASES: u64 = 2;
/// Virtual size of the disk in bytes.
const SIZE: u64 = 8 << 20;
/// Rounds between two reads of the whole disk.
const READ_EVERY: u64 = 10;
/// The offset of the `writeback` byte in the configuration space.
const WRITEBACK: u32 = 32;

/// Everything that outlives a daemon.
struct Host {
    program: Program,
    folder: TempDir,
    image: PathBuf,
    spec: ServeSpec,
}

impl Host {
    fn new(cluster_size: u64, over: bool) -> Result<Self, Trouble> {
        let program = Backend::Strata.program(Profile::Dev)?;
        let folder = TempDir::new()?;
        let image = folder.path().join("top.qcow2");
        let base = folder.path().join("base.qcow2");
        let options = format!("cluster_size={cluster_size}");
        let backing = Backing { image: &base, format: "qcow2" };
        if over {
            image::create(&base, "qcow2", SIZE, None, &options)?;
        }
        image::create(&image, "qcow2", SIZE, over.then_some(backing), &options)?;
        let spec = ServeSpec {
            image: image.clone(),
            format: "qcow2".into(),
            socket: folder.path().join("disk.sock"),
            queues: 2,
            serial: "restart-test".into(),
            io_thread: false,
        };
        Ok(Self { program, folder, image, spec })
    }

    fn start(&self) -> Result<Daemon, Trouble> {
        Ok(Daemon::start(&self.program, &self.spec, &self.folder.path().join("daemon.log"))?)
    }

    fn connect(&self) -> Result<Client, Trouble> {
        let options = Options {
            queues: 2,
            queue_size: 64,
            slots_max: 16,
            data_capacity: 256 << 10,
            in_flight: true,
            ..Options::default()
        };
        let mut client = Client::connect(&self.spec.socket, &options)?;
        client.session().write_config(WRITEBACK, 0)?;
        Ok(client)
    }
}

fn rounds(host: &Host, cluster_size: u64, rounds: u64, random: &mut Random) -> Result<Tally, Trouble> {
    let mut ledger = Ledger::new((0..SIZE / SECTOR).map(|_| Value::Zero));
    let (mut generation, mut choices) = (1, random.fork());
    let mut daemon = host.start()?;
    let client = host.connect()?;
    let mut guest = Guest::new(client, &mut ledger, &mut choices, &mut generation, cluster_size / SECTOR);
    for round in 1..=rounds {
        let place =
            |trouble: Trouble, daemon: &Daemon| format!("round {round}: {trouble}\n{}", daemon.log_tail());
        let time = Duration::from_micros(random.below(3000));
        let worked = guest.work(random.below(200), time).and_then(|()| guest.send());
        worked.map_err(|failure| place(failure.0.into(), &daemon))?;
        daemon.kill()?;
        // The guest goes on while nobody serves it.
        let went_on = guest.collect().and_then(|()| guest.send());
        went_on.map_err(|failure| format!("round {round}, killed: {}", failure.0))?;
        daemon = host.start()?;
        guest.reconnect(&host.spec.socket).map_err(|failure| place(failure.0.into(), &daemon))?;
        // Now and then it is killed again while it does the last one's requests.
        if random.below(3) > 0 {
            guest.finish().map_err(|failure| place(failure.0.into(), &daemon))?;
        }
        if round % READ_EVERY == 0 || round == rounds {
            guest.finish().map_err(|failure| place(failure.0.into(), &daemon))?;
            guest.check_latest().map_err(|failure| place(failure.0.into(), &daemon))?;
        }
    }
    let tally = guest.leave().map_err(|failure| failure.0)?;
    daemon.stop()?;
    if let Health::Broken(text) = image::check(&host.image)? {
        return Err(text.into());
    }
    Ok(tally)
}

fn survive(number: u64, name: &str, cluster_size: u64, over: bool) {
    if Qemu::find().is_none() {
        return;
    }
    let all = setting("STRATA_RESTART_ROUNDS", ROUNDS);
    let kills = all / CASES + u64::from(number < all % CASES);
    let seed = setting("STRATA_KILL_SEED", 1).wrapping_mul(CASES).wrapping_add(number);
    let fail = |trouble: &dyn std::fmt::Display| -> ! { panic!("{name}, seed {seed}: {trouble}") };
    let host = Host::new(cluster_size, over).unwrap_or_else(|trouble| fail(&trouble));
    let began = Instant::now();
    let logged = || std::fs::read_to_string(host.folder.path().join("daemon.log")).unwrap_or_default();
    let tally = rounds(&host, cluster_size, kills, &mut Random::new(seed))
        .unwrap_or_else(|trouble| fail(&format!("{trouble}\n{}", command::tail(&logged(), 60))));
    // As each daemon said when it took the queues over.
    let again: u64 = daemon::numbers(&logged(), "in_flight").iter().sum();
    println!(
        "{name}: {kills} kills in {:.1} s: {} requests, {} changes and {} flushes answered, {} requests unanswered at \
         kills, of which {again} were done again; each was answered once",
        began.elapsed().as_secs_f64(),
        tally.requests,
        tally.changes,
        tally.flushes,
        tally.cut_off,
    );
    assert!(again > kills, "kills must meet requests in flight");
}

#[test]
fn each_request_is_answered_once_across_kills_with_64_kib_clusters() {
    survive(0, "restarts, 64 KiB", 64 << 10, false);
}

#[test]
fn each_request_is_answered_once_across_kills_with_small_clusters_over_qcow2() {
    survive(1, "restarts, 4 KiB over qcow2", 4 << 10, true);
}
