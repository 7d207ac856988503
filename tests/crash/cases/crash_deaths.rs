//! Random runs of whole disks that keep a journal. At random moments the daemon alone dies. What it had sent to the
//! host is there. What it had acknowledged must be there, flushed or not, once a successor has carried out the
//! journal. The same for disks that get overlays while they are in use, with crashes of the whole host, too.
//!
//! - `STRATA_CRASH_SECONDS=7200` makes a run of this time; `STRATA_CRASH_TRIALS=100` one of so many trials.
//! - `STRATA_CRASH_SEED=n` begins with another seed, `STRATA_CRASH_ONLY=n` runs only the trial of one seed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use strata_crash::shape::Start;
use strata_crash::tally::Tally;
use strata_crash::trial::{Tactic, starts, trial};
use strata_crash::walk::Walker;
use strata_crash::{number, threads};

/// Trials of a run whose length is not given: the same on every machine.
const TRIALS: u64 = 400;

#[test]
fn no_death_of_the_daemon_loses_what_was_acknowledged() {
    let mut starts = starts();
    starts.retain(|start| start.shape.keeps_journal());
    try_all(&starts, Tactic::Deaths, "deaths");
}

#[test]
fn no_crash_or_death_around_a_snapshot_loses_anything_or_changes_a_layer() {
    let mut starts = starts();
    starts.retain(|start| start.shape.takes_overlays());
    try_all(&starts, Tactic::Overlays, "overlays");
}

fn try_all(starts: &[Start], tactic: Tactic, name: &str) {
    let seconds = number("STRATA_CRASH_SECONDS");
    let tally = Tally::new(Duration::from_secs(seconds.unwrap_or(3600)));
    let only = number("STRATA_CRASH_ONLY");
    let first = only.or(number("STRATA_CRASH_SEED")).unwrap_or(1);
    let end = match (only, seconds) {
        (Some(only), _) => only + 1,
        (None, Some(_)) => u64::MAX,
        (None, None) => first + number("STRATA_CRASH_TRIALS").unwrap_or(TRIALS),
    };
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                let mut walker = Walker::new(&tally);
                while !tally.is_over() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    let count = |requests| tally.count_run(requests);
                    if let Err(finding) = trial(starts, seed, tactic, &mut walker, count) {
                        tally.found(finding);
                    }
                }
            });
        }
    });
    tally.conclude(&format!("{name} before seed {}", next.load(Ordering::Relaxed).min(end)));
}
