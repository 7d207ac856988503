//! Runs on a host that runs out of space several times, while queues are stopped and restarted as a session does it.
//! Requests that find no space wait for it, or fail.
//!
//! Owns the amount of space over time, and the checks of such a run besides the oracle:
//!
//! - Only requests that need space fail.
//! - A request that waits for space fails only if its queue is stopped.
//! - No request waits forever.
//! - The disk is intact afterwards.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use disk::{OnEnospc, SpaceStatus};
use storage::Errno;
use storage_sim::{Random, SimWorld};

use super::examine::panic_text;
use super::journal::Op;
use super::rig::{Finished, Rig};
use super::shape::Start;
use super::trial::Manner;

/// More space than any run needs.
const PLENTY: u64 = 1 << 40;
/// The most shortages in a run. Even with the longest of them, requests wait less than the time that counts as a hang.
const SHORTAGES_MAX: u64 = 4;
/// The unit of space, in bytes.
const PAGE: u64 = 4096;

/// The host's space, which changes over time.
pub struct Tide {
    random: Random,
    /// Shortages still to come.
    left: u64,
    short: bool,
    turns: Option<Instant>,
}

impl Tide {
    /// A tide from a seed. It starts with space.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x71de);
        Tide { left: 1 + random.below(SHORTAGES_MAX), random, short: false, turns: None }
    }

    /// Changes the space if it is time. Returns a queue that must be stopped now, if any.
    pub fn turn(&mut self, world: &SimWorld, queues: usize) -> Option<usize> {
        let now = world.now();
        let turns = *self.turns.get_or_insert_with(|| now + some_time(&mut self.random, 12..28));
        if now >= turns {
            self.short = !self.short && self.left > 0;
            let bits = if self.short { 16..33 } else { 20..31 };
            self.turns = Some(now + some_time(&mut self.random, bits));
            match self.short {
                true => {
                    self.left -= 1;
                    let room = self.random.below(3) * self.random.below(8) * PAGE;
                    let errnos = [Errno::ENOSPC, Errno::ENOSPC, Errno::EDQUOT, Errno::EFBIG];
                    let errno = errnos[self.random.below(errnos.len() as u64) as usize];
                    world.set_space(world.allocated() + room, errno);
                }
                false => Tide::ebb(world),
            }
        }
        let stops = self.short && self.random.chance(1, 200);
        stops.then(|| self.random.below(queues as u64) as usize)
    }

    /// Gives the host space.
    pub fn ebb(world: &SimWorld) {
        world.set_space(PLENTY, Errno::ENOSPC);
    }
}

/// A random time in nanoseconds, with a number of bits from this range.
fn some_time(random: &mut Random, bits: std::ops::Range<u64>) -> Duration {
    let bits = bits.start + random.below(bits.end - bits.start);
    Duration::from_nanos((1 << bits) + random.below(1 << bits))
}

/// A run with shortages.
pub struct Scarce {
    /// The run.
    pub run: Finished,
    /// The counts of requests that waited.
    pub space: SpaceStatus,
    /// Whether a write and a flush succeeded once there was space again.
    probe: (bool, bool),
}

/// Plays a script with shortages of space, then probes the disk with space again.
///
/// # Errors
/// If the disk does not open, or the run panics or hangs.
pub fn play(start: &Start, script: &[Op], manner: Manner) -> Result<Scarce, String> {
    let work = || -> Result<Scarce, String> {
        let mut rig = Rig::open(start, manner.seed).map_err(|error| format!("it does not open: {error}"))?;
        let began = rig.world.now();
        rig.begin_tide(Tide::new(manner.seed));
        rig.play(script, manner.at_once);
        rig.end_tide();
        if manner.rest {
            rig.rest();
        }
        let probe = rig.probe();
        let space = rig.space();
        let mut run = if manner.clean { rig.finish() } else { rig.abandon() };
        run.tries = tries_max(start.shape.on_enospc, run.world.now() - began);
        Ok(Scarce { run, space, probe })
    };
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(format!("the run panicked: {}", panic_text(&*panic))))
}

/// The most immediate attempts of a request while others free space: the first one and `SPACE_TRIES` more.
pub const TRIES_AT_ONCE: u64 = 5;

/// The most attempts of a request that takes this long. It is tried `TRIES_AT_ONCE` times at once, and as often after
/// each pause. Pauses last up to a second; each may be followed by one that freed space ends early.
fn tries_max(on_enospc: OnEnospc, time: Duration) -> u64 {
    match on_enospc {
        OnEnospc::Report => TRIES_AT_ONCE,
        OnEnospc::Wait => TRIES_AT_ONCE * (1 + 2 * (4 + time.as_secs())),
    }
}

impl Scarce {
    /// Checks the run.
    ///
    /// # Errors
    /// The first violation.
    pub fn judge(&self, on_enospc: OnEnospc) -> Result<(), String> {
        if let Some(misread) = &self.run.misread {
            return Err(misread.clone());
        }
        let excused = on_enospc == OnEnospc::Report;
        let wrong = |error: &disk::RequestError| !(excused && error.is_no_space());
        if let Some((index, error)) = self.run.failures.iter().find(|(_, error)| wrong(error)) {
            return Err(format!("request {index} failed: {error}"));
        }
        if let Some((index, error)) = self.run.given_up.iter().find(|(_, error)| !error.is_no_space()) {
            return Err(format!("request {index} of a stopped queue failed: {error}"));
        }
        if self.space.waiting != 0 || (excused && self.space.waited != 0) {
            return Err(format!("with {on_enospc:?}: {:?}", self.space));
        }
        if self.probe != (true, true) {
            return Err(format!("with space again, a write and a flush end {:?}", self.probe));
        }
        self.run.closed.as_ref().map_err(|error| format!("the close failed: {error}")).copied()
    }
}
