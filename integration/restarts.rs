//! Kills the daemon again and again while one client lives on. It starts the daemon on the same socket and connects
//! again with its in-flight region. Each request must be answered exactly once. None is lost, none is answered
//! twice, and none is answered that was not sent: the client fails on such an answer.
//!
//! Whatever was answered must be there later. In half of the cases the guest has its write cache on, so that most
//! of it was not flushed. The daemons keep a journal of it. In the others the guest turns its write cache off once,
//! on its first connection, which also shows that the daemons keep that setting. At the end no cluster has leaked.
//!
//! In other tests the next daemon replaces the one that serves, under load.
//!
//! `STRATA_RESTART_ROUNDS` sets the number of kills of all cases together (200), `STRATA_KILL_SEED` the random choices.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use strata_integration::command;
use strata_integration::daemon::{self, Backend, Daemon, Profile, Program, ServeSpec};
use strata_integration::image::{self, Backing};
use strata_kit::Qemu;
use strata_kit::client::{Client, Options};
use strata_kit::random::Random;
use tempfile::TempDir;

use crate::setting;
use crate::survival::guest::{Failure, Guest, Tally};
use crate::survival::ledger::Ledger;
use crate::survival::stamp::{SECTOR, Value};

type Trouble = Box<dyn std::error::Error>;

/// Default number of kills.
const ROUNDS: u64 = 200;
/// Number of cases that share them.
const CASES: u64 = 4;
/// Virtual size of the disk in bytes.
const SIZE: u64 = 8 << 20;
/// Rounds between two reads of the whole disk.
const READ_EVERY: u64 = 10;
/// How long a search for leaks may take, and what ends it.
const SEARCH_PATIENCE: Duration = Duration::from_secs(60);
const SEARCHED: &str = "an earlier crash left counted is given back";
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
    fn new(cluster_size: u64, over: bool, queues: u16) -> Result<Self, Trouble> {
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
            queues,
            serial: "restart-test".into(),
            io_thread: false,
        };
        Ok(Self { program, folder, image, spec })
    }

    fn start(&self) -> Result<Daemon, Trouble> {
        Ok(Daemon::start(&self.program, &self.spec, &self.folder.path().join("daemon.log"))?)
    }

    fn connect(&self, write_cache: bool) -> Result<Client, Trouble> {
        let options = Options {
            queues: self.spec.queues.into(),
            queue_size: 64,
            slots_max: if self.spec.queues > 2 { 2 } else { 16 },
            data_capacity: 256 << 10,
            in_flight: true,
            ..Options::default()
        };
        let mut client = Client::connect(&self.spec.socket, &options)?;
        client.session().write_config(WRITEBACK, u8::from(write_cache))?;
        Ok(client)
    }
}

fn rounds(host: &Host, case: &Case, rounds: u64, random: &mut Random) -> Result<Tally, Trouble> {
    let cluster_size = case.cluster_size;
    let mut ledger = Ledger::new((0..SIZE / SECTOR).map(|_| Value::Zero));
    let (mut generation, mut choices) = (1, random.fork());
    let mut daemon = host.start()?;
    let client = host.connect(case.write_cache)?;
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
    daemon.wait_for_log(SEARCHED, SEARCH_PATIENCE)?;
    daemon.stop()?;
    image::expect_clean(&host.image)?;
    Ok(tally)
}

/// One kind of run.
struct Case {
    name: &'static str,
    cluster_size: u64,
    /// The image has a backing file.
    over: bool,
    /// The guest has its write cache on.
    write_cache: bool,
}

fn survive(number: u64, case: &Case) {
    let name = case.name;
    if Qemu::find().is_none() {
        return;
    }
    let all = setting("STRATA_RESTART_ROUNDS", ROUNDS);
    let kills = all / CASES + u64::from(number < all % CASES);
    let seed = setting("STRATA_KILL_SEED", 1).wrapping_mul(CASES).wrapping_add(number);
    let fail = |trouble: &dyn std::fmt::Display| -> ! { panic!("{name}, seed {seed}: {trouble}") };
    let host = Host::new(case.cluster_size, case.over, 2).unwrap_or_else(|trouble| fail(&trouble));
    let began = Instant::now();
    let logged = || std::fs::read_to_string(host.folder.path().join("daemon.log")).unwrap_or_default();
    let tally = rounds(&host, case, kills, &mut Random::new(seed))
        .unwrap_or_else(|trouble| fail(&format!("{trouble}\n{}", command::tail(&logged(), 60))));
    // As each daemon said when it took the queues over.
    let again: u64 = daemon::numbers(&logged(), "in_flight").iter().sum();
    let replayed = logged().matches("had not made durable was carried out").count();
    println!(
        "{name}: {kills} kills in {:.1} s: {} requests, {} changes and {} flushes answered, {} requests unanswered at \
         kills, of which {again} were done again; each was answered once; {replayed} journals were carried out",
        began.elapsed().as_secs_f64(),
        tally.requests,
        tally.changes,
        tally.flushes,
        tally.cut_off,
    );
    assert!(again > kills, "kills must meet requests in flight");
    assert!(
        !case.write_cache || replayed as u64 > kills / 2,
        "kills must meet answers that were not flushed"
    );
}

#[test]
fn each_request_is_answered_once_across_kills_with_64_kib_clusters() {
    survive(0, &Case { name: "restarts, 64 KiB", cluster_size: 64 << 10, over: false, write_cache: false });
}

#[test]
fn each_request_is_answered_once_across_kills_with_small_clusters_over_qcow2() {
    survive(
        1,
        &Case { name: "restarts, 4 KiB over qcow2", cluster_size: 4 << 10, over: true, write_cache: false },
    );
}

#[test]
fn no_answered_write_is_lost_across_kills_with_64_kib_clusters() {
    survive(
        2,
        &Case { name: "write cache on, 64 KiB", cluster_size: 64 << 10, over: false, write_cache: true },
    );
}

#[test]
fn no_answered_write_is_lost_across_kills_with_small_clusters_over_qcow2() {
    survive(
        3,
        &Case {
            name: "write cache on, 4 KiB over qcow2",
            cluster_size: 4 << 10,
            over: true,
            write_cache: true,
        },
    );
}

/// Planned restarts of a test.
const REPLACEMENTS: u64 = 20;

/// One daemon after another takes the place of the one before, under a guest that goes on. Returns the pauses: from the
/// last answer of the old one to the first of the new one, as the guest sees them.
fn replace(host: &Host, times: u64, random: &mut Random) -> Result<Vec<Duration>, Trouble> {
    let mut ledger = Ledger::new((0..SIZE / SECTOR).map(|_| Value::Zero));
    let (mut generation, mut choices) = (1, random.fork());
    let log = host.folder.path().join("daemon.log");
    let mut daemon = host.start()?;
    let client = host.connect(true)?;
    let mut guest = Guest::new(client, &mut ledger, &mut choices, &mut generation, (64 << 10) / SECTOR);
    let mut pauses = Vec::new();
    for round in 1..=times {
        let place = |failure: Failure, daemon: &Daemon| {
            format!("round {round}: {}\n{}", failure.0, daemon.log_tail())
        };
        guest.work(100 + random.below(400), Duration::ZERO).map_err(|failure| place(failure, &daemon))?;
        let next = Daemon::start_with(&host.program, &host.spec, &["--replace"], &log)?;
        let mut old = std::mem::replace(&mut daemon, next);
        let mut answered = Instant::now();
        while !old.has_ended()? {
            let before = guest.tally.answered;
            guest.serve_some().map_err(|failure| place(failure, &daemon))?;
            if guest.tally.answered > before {
                answered = Instant::now();
            }
        }
        old.expect_end()?;
        guest.collect().map_err(|failure| place(failure, &daemon))?;
        guest.reconnect(&host.spec.socket).map_err(|failure| place(failure, &daemon))?;
        let before = guest.tally.answered;
        while guest.tally.answered == before {
            guest.serve_some().map_err(|failure| place(failure, &daemon))?;
        }
        pauses.push(answered.elapsed());
        if random.below(2) == 0 {
            guest.finish().map_err(|failure| place(failure, &daemon))?;
            guest.check_latest().map_err(|failure| place(failure, &daemon))?;
        }
    }
    guest.finish().and_then(|()| guest.check_latest()).map_err(|failure| failure.0)?;
    guest.leave().map_err(|failure| failure.0)?;
    daemon.stop()?;
    image::expect_clean(&host.image)?;
    pauses.sort();
    Ok(pauses)
}

fn is_replaced(name: &str, queues: u16, seed: u64) {
    if Qemu::find().is_none() {
        return;
    }
    let fail = |trouble: Trouble| -> ! { panic!("{name}, seed {seed}: {trouble}") };
    let host = Host::new(64 << 10, false, queues).unwrap_or_else(|trouble| fail(trouble));
    let pauses = replace(&host, REPLACEMENTS, &mut Random::new(seed)).unwrap_or_else(|trouble| fail(trouble));
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    println!("{name}: {REPLACEMENTS} planned restarts, pause {median:?} in the median, {longest:?} at most");
    assert!(!host.spec.socket.exists(), "the last daemon leaves no socket file");
}

#[test]
fn a_replaced_daemon_loses_no_request() {
    is_replaced("replaced, 2 queues", 2, 1);
}

#[test]
fn a_replaced_daemon_with_64_queues_loses_no_request() {
    is_replaced("replaced, 64 queues", 64, 2);
}

/// A client that connects, reads and leaves again and again, while one daemon takes the place of another. It may be hung
/// up on by the daemon that leaves, but never refused: the listening socket goes on.
#[test]
fn nobody_is_refused_while_daemons_are_replaced() {
    let run = || -> Result<(), Trouble> {
        let host = Host::new(64 << 10, false, 1)?;
        let log = host.folder.path().join("daemon.log");
        let (ended, visits, cut_off) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let daemon = host.start()?;
        std::thread::scope(|scope| {
            let visitor = scope.spawn(|| -> Result<(), String> {
                while !ended.load(Ordering::SeqCst) {
                    let stream = UnixStream::connect(&host.spec.socket);
                    let mut stream = stream.map_err(|error| format!("a connection is refused: {error}"))?;
                    match answers(&mut stream) {
                        Ok(()) => visits.fetch_add(1, Ordering::SeqCst),
                        Err(_) => cut_off.fetch_add(1, Ordering::SeqCst),
                    };
                    // A daemon that is being started may have a copy of the socket for a moment.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                Ok(())
            });
            let replaced = (1..=REPLACEMENTS).try_fold(daemon, |old, _| -> Result<Daemon, Trouble> {
                let before = visits.load(Ordering::SeqCst);
                let next = Daemon::start_with(&host.program, &host.spec, &["--replace"], &log)?;
                old.expect_end()?;
                let began = Instant::now();
                while visits.load(Ordering::SeqCst) == before {
                    if began.elapsed() > SEARCH_PATIENCE || visitor.is_finished() {
                        return Err("nobody is served".into());
                    }
                    std::thread::yield_now();
                }
                Ok(next)
            });
            ended.store(true, Ordering::SeqCst);
            visitor.join().expect("no panic")?;
            replaced?.stop()?;
            Ok::<_, Trouble>(())
        })?;
        let (visits, cut_off) = (visits.into_inner(), cut_off.into_inner());
        println!("{REPLACEMENTS} planned restarts: {visits} visits, {cut_off} of them cut off");
        let logged = std::fs::read_to_string(&log)?;
        assert!(
            cut_off <= REPLACEMENTS,
            "a daemon hangs up on the one that it serves, and on nobody else:\n{}",
            command::tail(&logged, 100)
        );
        Ok(())
    };
    run().unwrap_or_else(|trouble| panic!("{trouble}"));
}

/// Whether a new connection gets an answer to GET_FEATURES.
fn answers(stream: &mut UnixStream) -> std::io::Result<()> {
    const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    stream.set_read_timeout(Some(SEARCH_PATIENCE))?;
    stream.write_all(&GET_FEATURES)?;
    stream.read_exact(&mut [0; 20])
}

/// A daemon whose guest was migrated to it goes on serving it where its successor fails.
#[test]
fn a_daemon_goes_on_after_a_migration_and_a_failed_successor() {
    let run = || -> Result<(), Trouble> {
        let host = Host::new(64 << 10, false, 2)?;
        let log = host.folder.path().join("daemon.log");
        let daemon = Daemon::start_with(&host.program, &host.spec, &["--incoming"], &log)?;
        let mut ledger = Ledger::new((0..SIZE / SECTOR).map(|_| Value::Zero));
        let (mut generation, mut choices) = (1, Random::new(5));
        let client = host.connect(true)?;
        let mut guest = Guest::new(client, &mut ledger, &mut choices, &mut generation, (64 << 10) / SECTOR);
        for round in 0..3 {
            guest.work(200, Duration::ZERO).map_err(|failure| failure.0)?;
            fail_to_replace(&host)?;
            guest.collect().map_err(|failure| failure.0)?;
            guest.reconnect(&host.spec.socket).map_err(|failure| format!("round {round}: {}", failure.0))?;
            guest.finish().and_then(|()| guest.check_latest()).map_err(|failure| failure.0)?;
        }
        guest.leave().map_err(|failure| failure.0)?;
        daemon.stop()?;
        image::expect_clean(&host.image)?;
        Ok(())
    };
    if Qemu::find().is_some() {
        run().unwrap_or_else(|trouble| panic!("{trouble}"));
    }
}

/// Asks for the place of the daemon as a successor with its options does, and ends when it has the sockets.
fn fail_to_replace(host: &Host) -> Result<(), Trouble> {
    let mut beside = host.spec.socket.clone().into_os_string();
    beside.push(".handover");
    let image = std::fs::metadata(&host.image)?;
    let mut message = vec![b'A'];
    message.extend(image.dev().to_ne_bytes());
    message.extend(image.ino().to_ne_bytes());
    message.extend(host.spec.queues.to_ne_bytes());
    message.extend(u16::MAX.to_ne_bytes());
    message.extend(512u32.to_ne_bytes());
    message.push(0);
    let mut successor = UnixStream::connect(beside)?;
    successor.set_read_timeout(Some(SEARCH_PATIENCE))?;
    successor.write_all(&message)?;
    let mut given = [0];
    successor.read_exact(&mut given)?;
    if &given == b"G" { Ok(()) } else { Err(format!("it is refused: {given:?}").into()) }
}

/// A daemon that waits for the image of another host's daemon ends at once when it is told to.
#[test]
fn a_signal_ends_a_daemon_that_waits_for_an_incoming_image() {
    let run = || -> Result<(), Trouble> {
        let host = Host::new(64 << 10, false, 1)?;
        let holder = host.start()?;
        let socket = host.folder.path().join("incoming.sock");
        let spec = ServeSpec { socket: socket.clone(), ..host.spec.clone() };
        let log = host.folder.path().join("incoming.log");
        let more = ["--incoming", "--lock-timeout", "600"];
        let waiting = Daemon::start_with(&host.program, &spec, &more, &log)?;
        let client = std::thread::spawn(move || Client::connect(&socket, &Options::default()).map(|_| ()));
        waiting.wait_for_log("waiting up to 600 s", SEARCH_PATIENCE)?;
        let began = Instant::now();
        waiting.stop()?;
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let _ = client.join().expect("no panic");
        holder.stop()?;
        image::expect_clean(&host.image)?;
        Ok(())
    };
    if Qemu::find().is_some() {
        run().unwrap_or_else(|trouble| panic!("{trouble}"));
    }
}
