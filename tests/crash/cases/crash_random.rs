//! Long random runs of whole disks on a simulated host, with several requests in flight, crashed at random instants.
//!
//! - `STRATA_CRASH_SECONDS=7200` makes a run of this time; `STRATA_CRASH_TRIALS=100` one of so many trials.
//! - `STRATA_CRASH_SEED=n` begins with another seed.
//! - `STRATA_CRASH_ONLY=n` runs only the trial of one seed.
//! - `STRATA_CRASH_TACTIC=shortages` (or `failures`, `overtaken`, `sizes`, `live-sizes`, `flushed`) makes runs of one kind.

use strata_crash::campaign::campaign;
use strata_crash::trial::{Tactic, starts};

/// Trials of a run whose length is not given: the same on every machine.
const TRIALS: u64 = 300;

#[test]
fn no_crash_of_a_random_run_loses_what_was_flushed() {
    campaign("random runs", &starts(), tactic(), TRIALS);
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
