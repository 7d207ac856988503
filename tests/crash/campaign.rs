//! A campaign of random trials on all threads: as long, and from the seed, that the environment says.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::shape::Start;
use super::tally::Tally;
use super::trial::{Tactic, trial};
use super::walk::Walker;
use super::{number, threads};

/// Runs trials of a tactic on disks that begin so, and prints what they found. `STRATA_CRASH_SECONDS` bounds their time.
/// Without it there are `STRATA_CRASH_TRIALS` of them, or `trials`. `STRATA_CRASH_SEED` is the first seed, and
/// `STRATA_CRASH_ONLY` the only one.
///
/// # Panics
/// If a trial found something.
pub fn campaign(what: &str, starts: &[Start], tactic: Tactic, trials: u64) {
    let seconds = number("STRATA_CRASH_SECONDS");
    let tally = Tally::new(Duration::from_secs(seconds.unwrap_or(3600)));
    let only = number("STRATA_CRASH_ONLY");
    let first = only.or(number("STRATA_CRASH_SEED")).unwrap_or(1);
    let end = match (only, seconds) {
        (Some(only), _) => only + 1,
        (None, Some(_)) => u64::MAX,
        (None, None) => first + number("STRATA_CRASH_TRIALS").unwrap_or(trials),
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
    tally.conclude(&format!("{what} before seed {}", next.load(Ordering::Relaxed).min(end)));
}
