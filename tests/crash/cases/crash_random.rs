//! Long random runs of whole disks on a simulated host, with several requests in flight, crashed at random instants.
//!
//! - `STRATA_CRASH_SECONDS=7200` makes a run of this time; `STRATA_CRASH_TRIALS=100` one of so many trials.
//! - `STRATA_CRASH_SEED=n` begins with another seed.
//! - `STRATA_CRASH_ONLY=n` runs only the trial of one seed.
//! - `STRATA_CRASH_TACTIC=shortages` (or `failures`, `overtaken`, `sizes`, `live-sizes`, `flushed`) makes runs of one kind.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use strata_crash::tally::Tally;
use strata_crash::trial::{Tactic, starts, trial};
use strata_crash::walk::Walker;
use strata_crash::{number, threads};

/// Trials of a run whose length is not given: the same on every machine.
const TRIALS: u64 = 300;

#[test]
fn no_crash_of_a_random_run_loses_what_was_flushed() {
    let starts = starts();
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
    let tactic = tactic();
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
                    if let Err(finding) = trial(&starts, seed, tactic, &mut walker, count) {
                        tally.found(finding);
                    }
                }
            });
        }
    });
    tally.conclude(&format!("random runs before seed {}", next.load(Ordering::Relaxed).min(end)));
}

/// The tactic of the runs.
fn tactic() -> Tactic {
    match std::env::var("STRATA_CRASH_TACTIC").as_deref() {
        Err(_) => Tactic::Any,
        Ok("failures") => Tactic::Failures,
        Ok("overtaken") => Tactic::Overtaken,
        Ok("shortages") => Tactic::Shortages,
        Ok("sizes") => Tactic::Sizes,
        Ok("live-sizes") => Tactic::LiveSizes,
        Ok("flushed") => Tactic::Flushed,
        Ok(other) => panic!("STRATA_CRASH_TACTIC={other}: there is no such tactic"),
    }
}
