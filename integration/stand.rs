//! One visit: a daemon serves an image, a new machine boots on it, runs a script and powers off, and the daemon stops.
//!
//! Owns the order of these steps and the measurements at the guest's checkpoints. It never decides what a script does
//! (`scenario` does) or what the user sees (`picture` does).

use crate::daemon::{self, Daemon, Program, ServeSpec};
use crate::guest::GuestKit;
use crate::image;
use crate::machine::{self, Accelerator, Disk, MachineSpec, Report, Vm};
use crate::qmp::{Migrated, Monitor};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use strata_kit::random::Random;

/// The settings that visits share.
#[derive(Clone, Debug)]
pub struct Stand {
    /// The guest.
    pub kit: GuestKit,
    /// How QEMU runs the guest's instructions.
    pub accelerator: Accelerator,
    /// The daemon.
    pub program: Program,
    /// The image and the daemon's options.
    pub serve: ServeSpec,
    /// True if the guest may use packed rings.
    pub packed: bool,
    /// The folder of consoles and logs, with one sub-folder per visit.
    pub folder: PathBuf,
}

/// How a daemon gives way to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// It is killed, and then the next is started.
    Kill,
    /// The next replaces it.
    Planned,
}

/// The counters of the guest's block layer, since its boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Discard requests.
    pub discards: u64,
    /// Bytes discarded.
    pub discarded_bytes: u64,
    /// Flushes.
    pub flushes: u64,
}

impl Requests {
    /// Parses `/sys/block/*/stat`, in which sizes are in 512-byte sectors.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        let field = |number: usize| fields.get(number).copied();
        let bytes = |number: usize| field(number)?.checked_mul(512);
        Some(Self {
            reads: field(0)?,
            read_bytes: bytes(2)?,
            writes: field(4)?,
            written_bytes: bytes(6)?,
            // Kernels before 4.18 do not count discards, kernels before 5.5 do not count flushes.
            discards: field(11).unwrap_or(0),
            discarded_bytes: bytes(13).unwrap_or(0),
            flushes: field(15).unwrap_or(0),
        })
    }

    /// The difference to `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            writes: self.writes.saturating_sub(earlier.writes),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
            discards: self.discards.saturating_sub(earlier.discards),
            discarded_bytes: self.discarded_bytes.saturating_sub(earlier.discarded_bytes),
            flushes: self.flushes.saturating_sub(earlier.flushes),
        }
    }
}

/// A moment at which the guest waited for the host's measurements.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The checkpoint's name in the script.
    pub name: String,
    /// Time since the start of the machine.
    pub at: Duration,
    /// Bytes that the image occupied on the host.
    pub allocated: u64,
    /// The guest's requests so far.
    pub requests: Requests,
}

/// The results of a visit.
#[derive(Clone, Debug, Default)]
pub struct Visit {
    /// The guest's facts in order.
    pub facts: Vec<(String, String)>,
    /// Its checkpoints in order.
    pub checkpoints: Vec<Checkpoint>,
    /// The daemon's counters, by its own names; empty if it logs no totals.
    pub totals: BTreeMap<String, u64>,
    /// Bytes that the image occupies on the host after the daemon's end.
    pub allocated_at_end: u64,
    /// From the daemon's start to its end.
    pub took: Duration,
}

impl Visit {
    /// The value of a fact.
    pub fn fact(&self, key: &str) -> Result<&str> {
        let mut values = self.facts.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str());
        values.next().with_context(|| format!("the guest did not report {key}"))
    }

    /// A fact that is a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self.fact(key)?;
        value.parse().with_context(|| format!("{key}={value} is not a number"))
    }

    /// Checksums by file name, from the facts `file=<sum> <name>` (or another key of that form). A later fact about the
    /// same file replaces an earlier one.
    pub fn sums(&self, key: &str) -> BTreeMap<String, String> {
        let lines = self.facts.iter().filter(|(name, _)| name == key);
        let pairs = lines.filter_map(|(_, value)| value.split_once(' '));
        pairs.map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect()
    }

    /// The checkpoint called `name`.
    pub fn checkpoint(&self, name: &str) -> Result<&Checkpoint> {
        let found = self.checkpoints.iter().find(|checkpoint| checkpoint.name == name);
        found.with_context(|| format!("the guest did not reach {name}"))
    }

    fn note(&mut self, key: String, value: String) {
        self.facts.push((key, value));
    }
}

/// Timeout of a visit: long enough for TCG on two shared cores, so that only a hang exceeds it.
const PATIENCE: Duration = Duration::from_secs(300);

impl Stand {
    /// Runs a whole visit. `watch` is called while the guest waits at each checkpoint.
    pub fn visit(&self, name: &str, script: &str, watch: &mut dyn FnMut(&Checkpoint)) -> Result<Visit> {
        self.attended(name, script, &[], &mut |_, checkpoint| {
            watch(checkpoint);
            Ok(())
        })
    }

    /// As [`Stand::visit`], with more options for the daemon, and an attendant who may act on it at each checkpoint.
    ///
    /// # Errors
    /// Also those of the attendant.
    pub fn attended(
        &self,
        name: &str,
        script: &str,
        options: &[&str],
        attend: &mut dyn FnMut(&Daemon, &Checkpoint) -> Result<()>,
    ) -> Result<Visit> {
        self.attended_on(name, &self.machine(script), options, attend)
    }

    /// As [`Stand::attended`], with a machine of the caller's choice. Its first disk is this stand's.
    ///
    /// # Errors
    /// Also those of the attendant.
    pub fn attended_on(
        &self,
        name: &str,
        machine: &MachineSpec,
        options: &[&str],
        attend: &mut dyn FnMut(&Daemon, &Checkpoint) -> Result<()>,
    ) -> Result<Visit> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let log = folder.join("daemon.log");
        let started = Instant::now();
        let daemon = Daemon::start_with(&self.program, &self.serve, options, &log)?;
        let mut vm = Vm::boot(&self.kit, machine, &folder)?;
        let mut visit = Visit::default();
        let mut watch = |checkpoint: &Checkpoint| attend(&daemon, checkpoint);
        let ran = self.listen(&mut vm, &mut visit, &mut watch).and_then(|()| vm.wait());
        ran.with_context(|| format!("visit {name}\n{}", daemon.log_tail()))?;
        daemon.stop()?;
        visit.took = started.elapsed();
        visit.allocated_at_end = image::allocated_bytes(&self.serve.image)?;
        visit.totals = daemon::totals(&std::fs::read_to_string(&log).unwrap_or_default());
        Ok(visit)
    }

    /// Runs a visit that ends in a crash. When `enough` is true of the reports so far, the daemon gets SIGKILL, and
    /// then QEMU. The result has all reports that the guest had sent by the daemon's end. The script must answer each
    /// line that it receives with `alive`.
    ///
    /// # Errors
    /// Also an error of `enough`, with the last lines of the logs added.
    pub fn crash(&self, name: &str, script: &str, enough: &dyn Fn(&Visit) -> Result<bool>) -> Result<Visit> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let daemon = Daemon::start(&self.program, &self.serve, &folder.join("daemon.log"))?;
        let mut vm = Vm::boot(&self.kit, &self.machine(script), &folder)?;
        let mut visit = Visit::default();
        let deadline = Instant::now() + PATIENCE;
        while !enough(&visit).with_context(|| format!("{}\n{}", vm.post_mortem(), daemon.log_tail()))? {
            record_report(&mut vm, &mut visit, deadline).with_context(|| daemon.log_tail())?;
        }
        daemon.kill()?;
        // The serial port preserves the order: all reports from before the kill arrive before this answer.
        let said = visit.facts.len();
        vm.proceed()?;
        while !visit.facts[said..].iter().any(|(key, _)| key == "alive") {
            record_report(&mut vm, &mut visit, deadline).context("after the daemon was killed")?;
        }
        vm.kill()?;
        Ok(visit)
    }

    /// Runs a visit in which the daemon is restarted `times` times, each time after some reports `tick` of the
    /// guest. It gets SIGKILL and is started again, or another daemon replaces it. After the last one the guest
    /// receives a line, upon which the script must end.
    ///
    /// # Errors
    /// Also when the script fails.
    pub fn restarts(
        &self,
        name: &str,
        script: &str,
        (times, how): (u64, Restart),
        random: &mut Random,
    ) -> Result<Visit> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let log = folder.join("daemon.log");
        let mut daemon = Daemon::start(&self.program, &self.serve, &log)?;
        let mut machine = self.machine(script);
        for disk in &mut machine.disks {
            disk.reconnect = Some(machine::reconnect_option()?);
        }
        let mut vm = Vm::boot(&self.kit, &machine, &folder)?;
        let mut visit = Visit::default();
        let deadline = Instant::now() + PATIENCE;
        for _ in 0..times {
            for _ in 0..1 + random.below(4) {
                record_tick(&mut vm, &mut visit, deadline).with_context(|| daemon.log_tail())?;
            }
            if how == Restart::Kill {
                daemon.kill()?;
                daemon = Daemon::start(&self.program, &self.serve, &log)?;
            } else {
                let next = Daemon::start_with(&self.program, &self.serve, &["--replace"], &log)?;
                std::mem::replace(&mut daemon, next).expect_end()?;
            }
        }
        vm.proceed()?;
        let ran = self.listen(&mut vm, &mut visit, &mut |_| Ok(())).and_then(|()| vm.wait());
        ran.with_context(|| format!("visit {name}\n{}", daemon.log_tail()))?;
        daemon.stop()?;
        Ok(visit)
    }

    /// Runs a visit in which the guest is migrated `moves` times to a new machine on a new daemon, with the same image.
    /// After the last one the guest receives a line, upon which the script must end.
    ///
    /// # Errors
    /// Also when the script fails.
    pub fn migrations(&self, name: &str, script: &str, moves: u64) -> Result<(Visit, Vec<Migrated>)> {
        let deadline = Instant::now() + PATIENCE;
        let mut visit = Visit::default();
        let mut here = self.place(name, script, 0)?;
        let mut moved = Vec::new();
        for number in 1..=moves {
            record_tick(&mut here.vm, &mut visit, deadline).with_context(|| here.daemon.log_tail())?;
            let mut there = self.place(name, script, number)?;
            let uri = format!("unix:{}", here.folder.join("migration.sock").display());
            there.monitor.run("migrate-incoming", json!({"uri": uri}))?;
            let migrated = here.monitor.migrate(&uri);
            let logs = || format!("{}\n{}", here.daemon.log_tail(), there.daemon.log_tail());
            moved.push(migrated.with_context(logs)?);
            record_left(&mut here.vm, &mut visit)?;
            here.vm.kill()?;
            here.daemon.stop()?;
            here = there;
        }
        record_tick(&mut here.vm, &mut visit, deadline).with_context(|| here.daemon.log_tail())?;
        here.vm.proceed()?;
        let ran = self.listen(&mut here.vm, &mut visit, &mut |_| Ok(())).and_then(|()| here.vm.wait());
        ran.with_context(|| format!("visit {name}\n{}", here.daemon.log_tail()))?;
        here.daemon.stop()?;
        Ok((visit, moved))
    }

    /// A machine on a daemon of its own; all but the first wait for the guest.
    fn place(&self, name: &str, script: &str, number: u64) -> Result<Place> {
        let folder = self.folder.join(format!("{name}-{number}"));
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let serve = ServeSpec { socket: folder.join("disk.sock"), ..self.serve.clone() };
        let more = if number == 0 { &[][..] } else { &["--incoming"] };
        let daemon = Daemon::start_with(&self.program, &serve, more, &folder.join("daemon.log"))?;
        let mut machine = self.machine(script);
        machine.disks[0].socket = serve.socket;
        machine.monitor = Some(folder.join("monitor.sock"));
        machine.incoming = number > 0;
        let vm = Vm::boot(&self.kit, &machine, &folder)?;
        let monitor = Monitor::connect(&folder.join("monitor.sock"));
        let monitor = monitor.with_context(|| vm.post_mortem())?;
        Ok(Place { daemon, vm, monitor, folder })
    }

    /// The machine of this stand's visits.
    pub fn machine(&self, script: &str) -> MachineSpec {
        let disk = Disk {
            socket: self.serve.socket.clone(),
            queues: self.serve.queues,
            cache_switch: !self.program.backend.offers_a_wrong_cache_switch(),
            reconnect: None,
            packed: self.packed,
        };
        MachineSpec {
            disks: vec![disk],
            accelerator: self.accelerator,
            ..MachineSpec::new(script.to_owned())
        }
    }

    fn listen(
        &self,
        vm: &mut Vm,
        visit: &mut Visit,
        watch: &mut dyn FnMut(&Checkpoint) -> Result<()>,
    ) -> Result<()> {
        let started = Instant::now();
        let deadline = started + PATIENCE;
        let mut requests = Requests::default();
        let mut code = None;
        while let Some(report) = vm.next_report(deadline)? {
            match report {
                Report::Fact { key, value } if key == "stat" => {
                    requests = Requests::parse(&value).with_context(|| format!("block counters {value}"))?;
                }
                Report::Fact { key, value } => visit.note(key, value),
                Report::Checkpoint { name } => {
                    let allocated = image::allocated_bytes(&self.serve.image)?;
                    let checkpoint = Checkpoint { name, at: started.elapsed(), allocated, requests };
                    watch(&checkpoint)?;
                    visit.checkpoints.push(checkpoint);
                    vm.proceed()?;
                }
                Report::Exit { code: ended } => code = Some(ended),
            }
        }
        match code {
            Some(0) => Ok(()),
            Some(code) => bail!("the guest's script failed with code {code}\n{}", vm.post_mortem()),
            None => bail!("the guest ended before its script did\n{}", vm.post_mortem()),
        }
    }
}

/// A machine, its daemon and their folder.
struct Place {
    daemon: Daemon,
    vm: Vm,
    monitor: Monitor,
    folder: PathBuf,
}

/// A script that writes and verifies with fio, two areas of `area_mib` MiB, until it receives a line. `cache` is the mode
/// of the disk's cache.
pub fn verifying(area_mib: u64, cache: &str) -> String {
    format!("AREA_MIB={area_mib}\nCACHE='{cache}'\n{}", include_str!("guest/restarts.sh"))
}

/// Records reports up to the next `tick`.
fn record_tick(vm: &mut Vm, visit: &mut Visit, deadline: Instant) -> Result<()> {
    let said = visit.facts.len();
    while !visit.facts[said..].iter().any(|(key, _)| key == "tick") {
        record_report(vm, visit, deadline)?;
    }
    Ok(())
}

/// Records the reports that a guest made here before it went elsewhere.
fn record_left(vm: &mut Vm, visit: &mut Visit) -> Result<()> {
    while let Some(report) = vm.waiting_report() {
        if let Report::Fact { key, value } = report {
            visit.note(key, value);
        }
    }
    Ok(())
}

/// Records the next report of a guest that must not end by itself.
fn record_report(vm: &mut Vm, visit: &mut Visit, deadline: Instant) -> Result<()> {
    match vm.next_report(deadline)? {
        Some(Report::Fact { key, value }) => visit.note(key, value),
        Some(Report::Checkpoint { .. }) => vm.proceed()?,
        Some(Report::Exit { code }) => bail!("the script ended early ({code})\n{}", vm.post_mortem()),
        None => bail!("QEMU ended early\n{}", vm.post_mortem()),
    }
    Ok(())
}

/// A temporary folder for one stand, with a path short enough for a socket in it (108 bytes).
pub fn scratch() -> Result<tempfile::TempDir> {
    let parent = Path::new(if Path::new("/var/tmp").is_dir() { "/var/tmp" } else { "/tmp" });
    tempfile::Builder::new().prefix("strata-").tempdir_in(parent).context("a temporary folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_counters_are_parsed_as_the_kernel_documents_them() {
        let line = "10 0 80 5 20 1 160 9 0 50 60 3 0 4096 7 2 1";
        let requests = Requests::parse(line).expect("seventeen numbers");
        assert_eq!((requests.reads, requests.read_bytes), (10, 40960));
        assert_eq!((requests.writes, requests.written_bytes), (20, 81920));
        assert_eq!((requests.discards, requests.discarded_bytes), (3, 4096 * 512));
        assert_eq!(requests.flushes, 2);
        assert_eq!(Requests::parse("1 2"), None);
    }

    #[test]
    fn facts_are_found_by_key_and_checksums_by_file() {
        let mut visit = Visit::default();
        visit.note("file".to_owned(), "aa one".to_owned());
        visit.note("file".to_owned(), "bb two".to_owned());
        visit.note("disk.bytes".to_owned(), "77".to_owned());
        assert_eq!(visit.number("disk.bytes").expect("a number"), 77);
        assert!(visit.fact("nothing").is_err());
        assert_eq!(visit.sums("file").get("two").map(String::as_str), Some("bb"));
    }
}
