//! Random runs of whole disks that keep a journal. At random moments the daemon alone dies. What it had sent to the
//! host is there. What it had acknowledged must be there, flushed or not, once a successor has carried out the
//! journal. The same for disks that get overlays while they are in use, with crashes of the whole host, too.
//!
//! - `STRATA_CRASH_SECONDS=7200` makes a run of this time; `STRATA_CRASH_TRIALS=100` one of so many trials.
//! - `STRATA_CRASH_SEED=n` begins with another seed, `STRATA_CRASH_ONLY=n` runs only the trial of one seed.

use strata_crash::campaign::campaign;
use strata_crash::trial::{Tactic, starts};

/// Trials of a run whose length is not given: the same on every machine.
const TRIALS: u64 = 400;

#[test]
fn no_death_of_the_daemon_loses_what_was_acknowledged() {
    let mut starts = starts();
    starts.retain(|start| start.shape.keeps_journal());
    campaign("deaths", &starts, Tactic::Deaths, TRIALS);
}

#[test]
fn no_crash_or_death_around_a_snapshot_loses_anything_or_changes_a_layer() {
    let mut starts = starts();
    starts.retain(|start| start.shape.takes_overlays());
    campaign("overlays", &starts, Tactic::Overlays, TRIALS);
}
