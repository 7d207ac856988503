//! Counts the tried runs and states of all threads of a campaign, and decides when the campaign is over.

use std::collections::HashSet;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::second::SecondOpinion;

/// The progress of a campaign.
pub struct Tally {
    started: Instant,
    deadline: Instant,
    /// Hashes of the crash states that were examined.
    distinct: Mutex<HashSet<u64>>,
    /// Crash states that were compared with the promise at their instant.
    compared: AtomicU64,
    runs: AtomicU64,
    requests: AtomicU64,
    /// Requests that waited for space.
    waited: AtomicU64,
    /// Requests that failed because their queue was stopped.
    given_up: AtomicU64,
    findings: Mutex<Vec<String>>,
    /// QEMU's tools, for a sample.
    pub second: SecondOpinion,
}

impl Tally {
    /// A campaign that lasts this long.
    pub fn new(time: Duration) -> Self {
        let started = Instant::now();
        Tally {
            started,
            deadline: started + time,
            distinct: Mutex::default(),
            compared: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
            findings: Mutex::default(),
            second: SecondOpinion::find(),
        }
    }

    /// True if the time is over, or enough violations were found.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.deadline || self.findings.lock().expect("no panic under this lock").len() >= 10
    }

    /// Counts a state by its hash.
    pub fn count_state(&self, hash: u64) {
        self.compared.fetch_add(1, Ordering::Relaxed);
        self.distinct.lock().expect("no panic under this lock").insert(hash);
    }

    /// Counts a run.
    pub fn count_run(&self, requests: usize) {
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.requests.fetch_add(requests as u64, Ordering::Relaxed);
    }

    /// Counts the requests of a run that waited for space, and those that failed because their queue was stopped.
    pub fn count_shortage(&self, waited: u64, given_up: u64) {
        self.waited.fetch_add(waited, Ordering::Relaxed);
        self.given_up.fetch_add(given_up, Ordering::Relaxed);
    }

    /// Records a violation.
    pub fn found(&self, finding: String) {
        self.findings.lock().expect("no panic under this lock").push(finding);
    }

    /// Runs so far.
    pub fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// Distinct states so far.
    pub fn distinct(&self) -> usize {
        self.distinct.lock().expect("no panic under this lock").len()
    }

    /// States compared so far.
    pub fn compared(&self) -> u64 {
        self.compared.load(Ordering::Relaxed)
    }

    /// The violations.
    pub fn findings(&self) -> Vec<String> {
        self.findings.lock().expect("no panic under this lock").clone()
    }

    /// Prints the counts directly to stderr: the test harness discards the output of a passing test.
    ///
    /// # Panics
    /// With all findings, if there are any.
    pub fn conclude(&self, name: &str) {
        use std::io::Write;
        // A failed write to stderr cannot be reported.
        let _ = writeln!(std::io::stderr(), "{name}: {self}");
        let findings = self.findings();
        assert!(findings.is_empty(), "{name}: {} findings\n\n{}", findings.len(), findings.join("\n\n"));
        assert!(self.distinct() > 0, "nothing was tried");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        write!(
            f,
            "{} runs, {} requests ({} waited for space, {} were given up), {} crash states compared, {} of them distinct by hash, {}, {} findings, in {:.1} s",
            load(&self.runs),
            load(&self.requests),
            load(&self.waited),
            load(&self.given_up),
            load(&self.compared),
            self.distinct(),
            self.second,
            self.findings().len(),
            self.started.elapsed().as_secs_f64(),
        )
    }
}
