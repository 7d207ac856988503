//! Faults to inject: which operation they hit, counted at its push, and its outcome.
//!
//! Only the choice is here; `world` applies the outcome to the bytes.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use storage::{Errno, Kind};

/// The kinds of operations, without their parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// [`Kind::Read`].
    Read,
    /// [`Kind::Write`].
    Write,
    /// [`Kind::Sync`].
    Sync,
    /// [`Kind::Punch`].
    Punch,
    /// [`Kind::Zero`].
    Zero,
    /// [`Kind::Allocate`].
    Allocate,
    /// [`Kind::SetLength`].
    SetLength,
}

impl Verb {
    /// All of them, in the order of [`Kind`].
    pub const ALL: [Verb; 7] =
        [Verb::Read, Verb::Write, Verb::Sync, Verb::Punch, Verb::Zero, Verb::Allocate, Verb::SetLength];

    /// The verb of an operation's kind.
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Read => Verb::Read,
            Kind::Write => Verb::Write,
            Kind::Sync => Verb::Sync,
            Kind::Punch { .. } => Verb::Punch,
            Kind::Zero { .. } => Verb::Zero,
            Kind::Allocate { .. } => Verb::Allocate,
            Kind::SetLength => Verb::SetLength,
        }
    }
}

/// The outcome of an operation that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It fails. A write, punch or the like has no effect. After a failed fdatasync, each operation that it covers
    /// is durable, lost for good though reads still see it, or open as before. The outcome is unknown.
    Fail(Errno),
    /// It fails after a random part of its effect, perhaps none or all. An fdatasync fails as with [`Outcome::Fail`].
    Short(Errno),
    /// It never completes, unless [`SimWorld::release_hung`](crate::SimWorld::release_hung) is called. Its effect may
    /// happen or not.
    Hang,
    /// It starts later by this time: operations that complete meanwhile take effect before it.
    Delay(Duration),
}

/// A fault. It hits one matching operation, or all matching ones from there on.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Only operations of this kind count; all if none.
    pub verb: Option<Verb>,
    /// Only operations on this file count; all if none.
    pub path: Option<PathBuf>,
    /// Only operations that touch this range of bytes count (an fdatasync touches none); all if none.
    pub range: Option<Range<u64>>,
    /// How many matching operations are spared first.
    pub nth: u64,
    /// Every matching operation from there on is hit.
    pub lasting: bool,
    /// The outcome.
    pub outcome: Outcome,
}

impl Fault {
    /// Hits the operation after the first `nth`, of any kind and file.
    pub fn nth(nth: u64, outcome: Outcome) -> Self {
        Fault { verb: None, path: None, range: None, nth, lasting: false, outcome }
    }

    /// Hits only operations of a kind.
    pub fn of(mut self, verb: Verb) -> Self {
        self.verb = Some(verb);
        self
    }

    /// Hits only operations on a file.
    pub fn on(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Hits only operations that touch a range of bytes.
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Hits every matching operation from the first that it hits on.
    pub fn lasting(mut self) -> Self {
        self.lasting = true;
        self
    }

    fn matches(&self, verb: Verb, path: &Path, touched: &Range<u64>) -> bool {
        self.verb.is_none_or(|only| only == verb)
            && self.path.as_ref().is_none_or(|only| only == path)
            && self.range.as_ref().is_none_or(|only| touched.start < only.end && only.start < touched.end)
    }
}

/// Names an injected fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(usize);

/// The faults of a world, and how many operations of each kind it has seen.
#[derive(Default)]
pub(crate) struct Faults {
    armed: Vec<Armed>,
    counts: [u64; Verb::ALL.len()],
}

struct Armed {
    /// `None` once it is withdrawn.
    fault: Option<Fault>,
    seen: u64,
    hits: u64,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) -> FaultId {
        self.armed.push(Armed { fault: Some(fault), seen: 0, hits: 0 });
        FaultId(self.armed.len() - 1)
    }

    pub(crate) fn withdraw_all(&mut self) {
        for armed in &mut self.armed {
            armed.fault = None;
        }
    }

    pub(crate) fn hits(&self, id: FaultId) -> u64 {
        self.armed[id.0].hits
    }

    pub(crate) fn count(&self, verb: Verb) -> u64 {
        self.counts[verb as usize]
    }

    /// Counts an operation. Returns the outcome of the first fault that hits it.
    pub(crate) fn judge(&mut self, verb: Verb, path: &Path, touched: &Range<u64>) -> Option<Outcome> {
        self.counts[verb as usize] += 1;
        let mut verdict = None;
        for armed in &mut self.armed {
            let Some(fault) = &armed.fault else { continue };
            if !fault.matches(verb, path, touched) {
                continue;
            }
            let number = armed.seen;
            armed.seen += 1;
            let hit = number == fault.nth || (fault.lasting && number > fault.nth);
            if hit && verdict.is_none() {
                armed.hits += 1;
                verdict = Some(fault.outcome);
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_count_what_matches_and_hit_once_or_from_then_on() {
        let mut faults = Faults::default();
        let fail = Outcome::Fail(Errno::EIO);
        let once = faults.add(Fault::nth(1, fail).of(Verb::Write).on("a"));
        let range = faults.add(Fault::nth(0, Outcome::Hang).within(100..200));
        let mut judge = |verb, path: &str, touched: Range<u64>| faults.judge(verb, Path::new(path), &touched);
        assert_eq!(judge(Verb::Write, "a", 0..100), None);
        assert_eq!(judge(Verb::Write, "b", 0..100), None);
        assert_eq!(judge(Verb::Sync, "a", 0..0), None);
        assert_eq!(judge(Verb::Write, "a", 200..300), Some(fail));
        assert_eq!(judge(Verb::Write, "a", 0..100), None);
        assert_eq!(judge(Verb::Read, "a", 199..300), Some(Outcome::Hang));
        assert_eq!((faults.hits(once), faults.hits(range)), (1, 1));
        assert_eq!((faults.count(Verb::Write), faults.count(Verb::Sync)), (4, 1));
        let lasting = faults.add(Fault::nth(1, fail).lasting());
        let mut judge = |verb| faults.judge(verb, Path::new("a"), &(0..1));
        assert_eq!([judge(Verb::Read), judge(Verb::Read), judge(Verb::Zero)], [None, Some(fail), Some(fail)]);
        faults.withdraw_all();
        assert_eq!(faults.judge(Verb::Read, Path::new("a"), &(0..1)), None);
        assert_eq!(faults.hits(lasting), 2);
    }
}
