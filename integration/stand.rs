//! One visit: a daemon serves an image, a fresh machine boots on it, runs a script, powers off, the daemon ends.
//!
//! Owns the order of these and what is measured at the guest's checkpoints. It never decides what a script does
//! (`scenario`) or what a person sees (`picture`).

use crate::daemon::{self, Daemon, Program, ServeSpec};
use crate::guest::GuestKit;
use crate::image;
use crate::machine::{Accelerator, Disk, MachineSpec, Report, Vm};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What visits have in common.
#[derive(Clone, Debug)]
pub struct Stand {
    /// The guest.
    pub kit: GuestKit,
    /// How its instructions run.
    pub accelerator: Accelerator,
    /// The daemon.
    pub program: Program,
    /// What it serves.
    pub serve: ServeSpec,
    /// Where consoles and logs go: one sub-folder a visit.
    pub folder: PathBuf,
}

/// The block layer's counters of the guest, since its boot.
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
    /// The fields of `/sys/block/*/stat`; sizes there are in 512-byte sectors.
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        let field = |number: usize| fields.get(number).copied();
        let bytes = |number: usize| field(number)?.checked_mul(512);
        Some(Self {
            reads: field(0)?,
            read_bytes: bytes(2)?,
            writes: field(4)?,
            written_bytes: bytes(6)?,
            // kernels before 4.18 have no discards, before 5.5 no flushes
            discards: field(11).unwrap_or(0),
            discarded_bytes: bytes(13).unwrap_or(0),
            flushes: field(15).unwrap_or(0),
        })
    }

    /// What happened since `earlier`.
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

/// A moment at which the guest waited to be looked at.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The script's name for what it had done.
    pub name: String,
    /// Time since the machine was started.
    pub at: Duration,
    /// Bytes that the image took on the host.
    pub allocated: u64,
    /// What the guest had asked for so far.
    pub requests: Requests,
}

/// What a visit left.
#[derive(Clone, Debug, Default)]
pub struct Visit {
    /// The guest's facts in order.
    pub facts: Vec<(String, String)>,
    /// Its checkpoints in order.
    pub checkpoints: Vec<Checkpoint>,
    /// What the daemon counted, by its own names; empty when it logs no totals.
    pub totals: BTreeMap<String, u64>,
    /// Bytes that the image takes on the host after the daemon's end.
    pub allocated_at_end: u64,
    /// From the daemon's start to its end.
    pub took: Duration,
}

impl Visit {
    /// The one value of a fact.
    pub fn fact(&self, key: &str) -> Result<&str> {
        let mut values = self.facts.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str());
        values.next().with_context(|| format!("the guest did not report {key}"))
    }

    /// A fact that is a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self.fact(key)?;
        value.parse().with_context(|| format!("{key}={value} is no number"))
    }

    /// Checksums by file name, of the facts `file=<sum> <name>` (or another key of that form). A later fact about
    /// the same file wins.
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

/// TCG on two shared cores: minutes are a hang, not patience lost.
const PATIENCE: Duration = Duration::from_secs(300);

impl Stand {
    /// A whole visit. `watch` is called while the guest waits at each checkpoint.
    pub fn visit(&self, name: &str, script: &str, watch: &mut dyn FnMut(&Checkpoint)) -> Result<Visit> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let log = folder.join("daemon.log");
        let started = Instant::now();
        let daemon = Daemon::start(&self.program, &self.serve, &log)?;
        let mut vm = Vm::boot(&self.kit, &self.machine(script), &folder)?;
        let mut visit = Visit::default();
        let ran = self.listen(&mut vm, &mut visit, watch).and_then(|()| vm.wait());
        ran.with_context(|| format!("visit {name}\n{}", daemon.log_tail()))?;
        daemon.stop()?;
        visit.took = started.elapsed();
        visit.allocated_at_end = image::allocated_bytes(&self.serve.image)?;
        visit.totals = daemon::totals(&std::fs::read_to_string(&log).unwrap_or_default());
        Ok(visit)
    }

    /// A visit that ends in a crash: when `enough` says so of what was reported, the daemon gets SIGKILL, then
    /// the machine is cut off. The result has all that the guest had said by the daemon's end. The script has to
    /// answer each line that it is sent with `alive`.
    ///
    /// # Errors
    /// That of `enough` too, which then has the ends of the logs with it.
    pub fn crash(&self, name: &str, script: &str, enough: &dyn Fn(&Visit) -> Result<bool>) -> Result<Visit> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let daemon = Daemon::start(&self.program, &self.serve, &folder.join("daemon.log"))?;
        let mut vm = Vm::boot(&self.kit, &self.machine(script), &folder)?;
        let mut visit = Visit::default();
        let deadline = Instant::now() + PATIENCE;
        while !enough(&visit).with_context(|| format!("{}\n{}", vm.post_mortem(), daemon.log_tail()))? {
            hear(&mut vm, &mut visit, deadline).with_context(|| daemon.log_tail())?;
        }
        daemon.kill()?;
        // The serial port keeps the order: before this answer comes whatever was said while the daemon lived.
        let said = visit.facts.len();
        vm.proceed()?;
        while !visit.facts[said..].iter().any(|(key, _)| key == "alive") {
            hear(&mut vm, &mut visit, deadline).context("after the daemon was killed")?;
        }
        vm.kill()?;
        Ok(visit)
    }

    /// The machine of this stand's visits.
    pub fn machine(&self, script: &str) -> MachineSpec {
        let disk = Disk {
            socket: self.serve.socket.clone(),
            queues: self.serve.queues,
            cache_switch: !self.program.backend.offers_a_wrong_cache_switch(),
        };
        MachineSpec {
            disks: vec![disk],
            accelerator: self.accelerator,
            ..MachineSpec::new(script.to_owned())
        }
    }

    fn listen(&self, vm: &mut Vm, visit: &mut Visit, watch: &mut dyn FnMut(&Checkpoint)) -> Result<()> {
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
                    watch(&checkpoint);
                    visit.checkpoints.push(checkpoint);
                    vm.proceed()?;
                }
                Report::Exit { code: ended } => code = Some(ended),
            }
        }
        match code {
            Some(0) => Ok(()),
            Some(code) => bail!("the guest's script failed with {code}\n{}", vm.post_mortem()),
            None => bail!("the guest ended before its script did\n{}", vm.post_mortem()),
        }
    }
}

/// Takes in the next report of a guest that is not to end by itself.
fn hear(vm: &mut Vm, visit: &mut Visit, deadline: Instant) -> Result<()> {
    match vm.next_report(deadline)? {
        Some(Report::Fact { key, value }) => visit.note(key, value),
        Some(Report::Checkpoint { .. }) => vm.proceed()?,
        Some(Report::Exit { code }) => bail!("the script ended early ({code})\n{}", vm.post_mortem()),
        None => bail!("QEMU ended early\n{}", vm.post_mortem()),
    }
    Ok(())
}

/// A folder for one stand whose socket path is short enough for a socket (108 bytes).
pub fn scratch() -> Result<tempfile::TempDir> {
    let parent = Path::new(if Path::new("/var/tmp").is_dir() { "/var/tmp" } else { "/tmp" });
    tempfile::Builder::new().prefix("strata-").tempdir_in(parent).context("a temporary folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_are_those_of_the_kernels_documentation() {
        let line = "10 0 80 5 20 1 160 9 0 50 60 3 0 4096 7 2 1";
        let requests = Requests::parse(line).expect("seventeen numbers");
        assert_eq!((requests.reads, requests.read_bytes), (10, 40960));
        assert_eq!((requests.writes, requests.written_bytes), (20, 81920));
        assert_eq!((requests.discards, requests.discarded_bytes), (3, 4096 * 512));
        assert_eq!(requests.flushes, 2);
        assert_eq!(Requests::parse("1 2"), None);
    }

    #[test]
    fn facts_are_found_by_key_and_sums_by_file() {
        let mut visit = Visit::default();
        visit.note("file".to_owned(), "aa one".to_owned());
        visit.note("file".to_owned(), "bb two".to_owned());
        visit.note("disk.bytes".to_owned(), "77".to_owned());
        assert_eq!(visit.number("disk.bytes").expect("a number"), 77);
        assert!(visit.fact("nothing").is_err());
        assert_eq!(visit.sums("file").get("two").map(String::as_str), Some("bb"));
    }
}
