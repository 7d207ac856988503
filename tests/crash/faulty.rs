//! Runs in which the host fails: one I/O fails with a given errno, is partial, is late, or hangs for a while.
//!
//! Owns the checks after the run besides the oracle: which requests failed, and whether the disk continues or refuses
//! all writes for good. Nothing may be lost or half linked once the host works again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use disk::RequestError;
use storage::Errno;
use storage_sim::{Fault, FaultId, Outcome, Random, SimWorld, Verb};

use super::examine::panic_text;
use super::journal::Op;
use super::rig::{Finished, Rig, host};
use super::scarce::TRIES_AT_ONCE;
use super::shape::{FIRST_WRITE, Start};
use super::trial::Manner;
use super::walk::{Choice, Walker};

/// An I/O that goes wrong: the n-th of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The kind of I/O.
    pub verb: Verb,
    /// The number of these I/Os that succeed first.
    pub nth: u64,
    /// All later I/Os of this kind fail as well.
    pub lasting: bool,
    /// The outcome of the I/O.
    pub outcome: Outcome,
}

/// The ways in which an I/O fails for good.
pub const FAILURES: [Outcome; 6] = [
    Outcome::Fail(Errno::EIO),
    Outcome::Fail(Errno::ENOSPC),
    Outcome::Fail(Errno::EDQUOT),
    Outcome::Fail(Errno::EFBIG),
    Outcome::Short(Errno::EIO),
    Outcome::Short(Errno::ENOSPC),
];

impl Trouble {
    /// A random failure.
    pub fn random(random: &mut Random) -> Trouble {
        let verbs =
            [Verb::Write, Verb::Write, Verb::Sync, Verb::Read, Verb::Punch, Verb::Allocate, Verb::SetLength];
        let verb = verbs[random.below(verbs.len() as u64) as usize];
        let outcome = FAILURES[random.below(FAILURES.len() as u64) as usize];
        let most = if matches!(verb, Verb::Write | Verb::Read) { 60 } else { 12 };
        Trouble { verb, nth: random.below(most), lasting: random.chance(1, 4), outcome }
    }

    /// A delay: a long one, or a hang until every request waits for it.
    pub fn delay(random: &mut Random) -> Trouble {
        let verb = [Verb::Write, Verb::Write, Verb::Read, Verb::Sync, Verb::Punch][random.below(5) as usize];
        let outcome = match random.below(4) {
            0 => Outcome::Hang,
            _ => Outcome::Delay(Duration::from_millis(1 << random.below(12))),
        };
        Trouble { verb, nth: random.below(40), lasting: false, outcome }
    }

    fn fault(&self) -> Fault {
        let fault = Fault::nth(self.nth, self.outcome).of(self.verb);
        if self.lasting { fault.lasting() } else { fault }
    }

    /// The errno with which it fails.
    fn errno(&self) -> Option<Errno> {
        match self.outcome {
            Outcome::Fail(errno) | Outcome::Short(errno) => Some(errno),
            Outcome::Hang | Outcome::Delay(_) => None,
        }
    }

    fn is_no_space(&self) -> bool {
        matches!(self.errno(), Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG))
    }
}

/// The end of a run with a failure.
pub struct Aftermath {
    /// The run. None if the image could not be opened.
    pub run: Option<Finished>,
    /// The failure happened.
    hit: bool,
    /// Whether a write and a flush succeeded once the host worked again.
    probe: Option<(bool, bool)>,
}

/// Plays a script while one I/O fails. If that has happened, probes the disk afterwards on a working host.
///
/// # Errors
/// If the run panicked or hangs.
pub fn play(start: &Start, script: &[Op], manner: Manner, trouble: &[Trouble]) -> Result<Aftermath, String> {
    let work = || {
        let world = SimWorld::from_image(start.image.clone(), manner.seed, host(manner.seed));
        let (hangs, others): (Vec<&Trouble>, Vec<&Trouble>) =
            trouble.iter().partition(|trouble| trouble.outcome == Outcome::Hang);
        let faults: Vec<FaultId> = others.iter().map(|trouble| world.inject(trouble.fault())).collect();
        for trouble in &hangs {
            world.inject(trouble.fault());
        }
        let hit = |world: &SimWorld| faults.iter().any(|fault| world.hits(*fault) > 0);
        let opened = Rig::open_or_hang(start, &world, manner.seed, FIRST_WRITE + 1000);
        let mut rig = match opened {
            Ok(Ok(rig)) => rig,
            Ok(Err(_)) => {
                return Aftermath { run: None, hit: hit(&world), probe: None };
            }
            Err(run) => {
                return Aftermath { run: Some(*run), hit: hit(&world), probe: None };
            }
        };
        rig.play(script, manner.at_once);
        if manner.rest {
            rig.rest();
        }
        let probe = hit(&world).then(|| {
            world.withdraw_faults();
            rig.probe()
        });
        // An I/O that did not hang before may hang in the close, which then never ends.
        let again: Vec<Fault> =
            hangs.iter().map(|trouble| Fault { nth: trouble.nth % 8, ..trouble.fault() }).collect();
        let mut run = if manner.clean { rig.finish_with(&again) } else { rig.abandon() };
        let scarce = others.iter().any(|trouble| trouble.is_no_space());
        run.tries = if scarce { TRIES_AT_ONCE } else { 1 };
        Aftermath { hit: hit(&world), run: Some(run), probe }
    };
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| format!("the run panicked: {}", panic_text(&*panic)))
}

impl Aftermath {
    /// Checks the run after one failure.
    ///
    /// # Errors
    /// The first violation.
    pub fn judge(
        &self,
        trouble: &Trouble,
        start: &Start,
        walker: &mut Walker,
        manner: Manner,
    ) -> Result<(), String> {
        let Some(run) = &self.run else {
            return if self.hit { Ok(()) } else { Err("it does not open, without a failure".to_owned()) };
        };
        if let Some(misread) = &run.misread {
            return Err(misread.clone());
        }
        if !self.hit && (!run.failures.is_empty() || run.closed.is_err()) {
            return Err(format!("something failed, without a failure: {:?}, {:?}", run.failures, run.closed));
        }
        self.judge_statuses(trouble, run, manner)?;
        let choice = Choice { states_max: 6, ..Choice::sample(6) };
        let seed = manner.seed ^ (trouble.nth << 8 | trouble.verb as u64) << 32;
        walker.unmarked = trouble.verb == Verb::SetLength;
        let walked = walker.crash(run, start, &choice, seed).and_then(|()| {
            if manner.clean && run.closed.is_ok() && !run.hung {
                walker.closed(run, start)?;
            }
            walker.some_crash(run, start, seed).map(drop)
        });
        walker.unmarked = false;
        walked
    }

    /// Checks which requests failed, and whether the disk refuses writes exactly when it must.
    fn judge_statuses(&self, trouble: &Trouble, run: &Finished, manner: Manner) -> Result<(), String> {
        let Some((wrote, flushed)) = self.probe else { return Ok(()) };
        if wrote != flushed {
            return Err(format!("afterwards a write ends {wrote} and a flush {flushed}"));
        }
        let told = |what: &str| {
            let is =
                |error: &RequestError| matches!(error, RequestError::Io { action, .. } if *action == what);
            run.failures.iter().any(|(_, error)| is(error))
        };
        let refuses = !wrote;
        let must_refuse = match trouble.verb {
            _ if trouble.errno().is_none() => false,
            Verb::Sync => true,
            Verb::Write if !trouble.is_no_space() => {
                // The failed write was guest data, and its request failed, or it was metadata. If several failed, both
                // are possible.
                if told("writing") == refuses && !(trouble.lasting && refuses) {
                    return Err(format!("a failed write: refuses writes {refuses}, told {:?}", run.failures));
                }
                refuses
            }
            _ => false,
        };
        if refuses != must_refuse {
            return Err(format!(
                "after {trouble:?} the disk refuses writes: {refuses}, told {:?}",
                run.failures
            ));
        }
        if manner.clean && !run.hung && run.closed.is_err() != refuses {
            return Err(format!(
                "after {trouble:?}, refusing writes {refuses}, the close ends {:?}",
                run.closed
            ));
        }
        if !refuses && !trouble.lasting && manner.at_once == 1 && run.failures.len() > 1 {
            return Err(format!(
                "one failure, and {} requests failed: {:?}",
                run.failures.len(),
                run.failures
            ));
        }
        Ok(())
    }
}
