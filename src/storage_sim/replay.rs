//! Decides what may survive a crash: walks through a run, and knows the durable and the open operations at each
//! instant.
//!
//! The model of the disk. A successful fdatasync makes every operation durable that had *completed before it was
//! pushed*, and promises nothing about others. Every other pushed operation is open: a crash keeps any part of it.
//! - Of several open effects on one byte, any may be the last to reach the disk; among kept effects the later one wins.
//!   An effect that is not durable never wins over a later durable one. A pending effect may still happen, over all
//!   others.
//! - A file's length is one number in a journal: a crash keeps its changes up to some point, independently of the
//!   bytes. Bytes past the length are lost; a length without its bytes reads as zero.
//!
//! `crash` chooses the subsets to try.

use std::ops::Range;

use crate::fault::Verb;
use crate::history::{Ending, Event, LengthStep};
use crate::plan::CrashPlan;
use crate::{Contents, History, Image, Moment, Random, Ranges};

/// A walk through a run, from one instant to the next.
pub struct Replay<'h> {
    pub(crate) history: &'h History,
    at: usize,
    /// The durable state.
    base: Image,
    /// By operation, as far as they have been pushed.
    lives: Vec<Life>,
    /// Open effects that have happened, in order.
    effects: Vec<Effect>,
    /// Effects that have not happened, of the operations in flight, in the order of their pushes.
    pending: Vec<Effect>,
    /// Open changes of length that have happened, in order.
    steps: Vec<Step>,
    /// Where the last [`Replay::advance_to_change`] began.
    pub(crate) since: Moment,
    /// The last change of the durable state.
    pub(crate) base_changed: Moment,
}

struct Life {
    pushed_at: usize,
    completed_at: Option<usize>,
    /// It has begun to take effect, so that its change of length has happened.
    begun: bool,
}

#[derive(Clone)]
struct Effect {
    operation: usize,
    /// The event by which it happened; [`NOT_YET`] if it has not.
    order: usize,
    bytes: Ranges,
}

#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) operation: usize,
    order: usize,
    step: LengthStep,
}

const NOT_YET: usize = usize::MAX;

/// A change to an image; they are applied in order.
enum Item<'a> {
    Bytes { operation: usize, order: usize, bytes: std::borrow::Cow<'a, Ranges> },
    Step(Step),
}

impl Item<'_> {
    fn order(&self) -> usize {
        match self {
            Item::Bytes { order, .. } => *order,
            Item::Step(step) => step.order,
        }
    }
}

impl<'h> Replay<'h> {
    /// At the start of the run.
    pub fn new(history: &'h History) -> Self {
        Replay {
            history,
            at: 0,
            base: history.start.clone(),
            lives: Vec::new(),
            effects: Vec::new(),
            pending: Vec::new(),
            steps: Vec::new(),
            since: Moment(0),
            base_changed: Moment(0),
        }
    }

    /// Where the walk is.
    pub fn moment(&self) -> Moment {
        Moment(self.at)
    }

    /// Advances by one event; false at the end.
    pub fn advance(&mut self) -> bool {
        let Some(event) = self.history.events.get(self.at) else { return false };
        let now = self.at;
        self.at += 1;
        match event {
            Event::Pushed(operation) => self.take_push(*operation, now),
            Event::Effect { operation, bytes, step } => self.take_effect(*operation, now, bytes, *step),
            Event::Completed { operation, how } => self.take_completion(*operation, now, *how),
        }
        true
    }

    /// Advances to the last instant before the set of possible crash images changes again: an operation is pushed, or
    /// an fdatasync ends. At that instant the most has been promised for the same set. False if the walk was at the
    /// end.
    pub fn advance_to_change(&mut self) -> bool {
        self.since = self.moment();
        if !self.advance() {
            return false;
        }
        while self.history.events.get(self.at).is_some_and(|event| !self.changes(event)) {
            self.advance();
        }
        true
    }

    /// Advances to an instant, or to the end of the run.
    pub fn advance_to(&mut self, moment: Moment) {
        while self.moment() < moment && self.advance() {}
    }

    fn changes(&self, event: &Event) -> bool {
        let is_sync = |operation: &usize| self.history.operations[*operation].verb == Verb::Sync;
        match event {
            Event::Pushed(operation) => !is_sync(operation),
            Event::Effect { .. } => false,
            Event::Completed { operation, .. } => is_sync(operation),
        }
    }

    fn take_push(&mut self, operation: usize, now: usize) {
        assert_eq!(operation, self.lives.len(), "operations are numbered in the order of their pushes");
        self.lives.push(Life { pushed_at: now, completed_at: None, begun: false });
        let bytes = self.history.operations[operation].changes();
        self.pending.push(Effect { operation, order: NOT_YET, bytes });
    }

    fn take_effect(&mut self, operation: usize, now: usize, bytes: &Ranges, step: Option<LengthStep>) {
        self.lives[operation].begun = true;
        if let Some(pending) = self.pending.iter_mut().find(|pending| pending.operation == operation) {
            pending.bytes = pending.bytes.without(bytes);
        }
        if !bytes.is_empty() {
            self.effects.push(Effect { operation, order: now, bytes: bytes.clone() });
        }
        self.steps.extend(step.map(|step| Step { operation, order: now, step }));
    }

    fn take_completion(&mut self, operation: usize, now: usize, how: Ending) {
        self.lives[operation].completed_at = Some(now);
        // Effects that have not happened by now never will.
        self.pending.retain(|pending| pending.operation != operation);
        let recorded = &self.history.operations[operation];
        if recorded.verb != Verb::Sync {
            return;
        }
        self.base_changed = Moment(now + 1);
        let pushed_at = self.lives[operation].pushed_at;
        let mut covered = self.happened();
        covered.retain(|other| {
            let completed_at = self.lives[*other].completed_at;
            self.history.operations[*other].file == recorded.file
                && completed_at.is_some_and(|completed| completed < pushed_at)
        });
        if let Ending::SyncFailed(seed) = how {
            let mut random = Random::new(seed);
            let mut lost = Vec::new();
            covered.retain(|other| match random.below(3) {
                0 => true,
                1 => false,
                _ => {
                    lost.push(*other);
                    false
                }
            });
            self.effects.retain(|effect| lost.binary_search(&effect.operation).is_err());
        }
        self.make_durable(recorded.file, &covered);
    }

    /// The operations that have open effects or changes of length that have happened, sorted.
    fn happened(&self) -> Vec<usize> {
        let effects = self.effects.iter().map(|effect| effect.operation);
        let mut operations: Vec<usize> =
            effects.chain(self.steps.iter().map(|step| step.operation)).collect();
        operations.sort_unstable();
        operations.dedup();
        operations
    }

    /// Makes the covered operations, sorted, on a file durable.
    fn make_durable(&mut self, file: usize, covered: &[usize]) {
        let is_covered = |operation: usize| covered.binary_search(&operation).is_ok();
        let length = self.base.files[file].contents.length();
        // Bytes past the durable length survive only with the length that covers them.
        let reaching =
            self.effects.iter().filter(|effect| is_covered(effect.operation) && effect.bytes.end() > length);
        let reached = reaching.map(|effect| effect.order).max();
        let operations = &self.history.operations;
        let of_file = |operation: usize| operations[operation].file == file;
        let last = self.steps.iter().rposition(|step| {
            of_file(step.operation)
                && (is_covered(step.operation) || reached.is_some_and(|at| step.order <= at))
        });
        let count = last.map_or(0, |last| last + 1);
        let (durable, open): (Vec<Step>, Vec<Step>) =
            (self.steps.drain(..count)).partition(|step| of_file(step.operation));
        self.steps.splice(..0, open);
        let (effects, open): (Vec<Effect>, Vec<Effect>) =
            self.effects.drain(..).partition(|effect| is_covered(effect.operation));
        self.effects = open;
        let mut items: Vec<Item> = durable.into_iter().map(Item::Step).collect();
        items.extend(effects.iter().map(|effect| Item::Bytes {
            operation: effect.operation,
            order: effect.order,
            bytes: std::borrow::Cow::Borrowed(&effect.bytes),
        }));
        items.sort_by_key(Item::order);
        let overwritten = apply(self.history, &mut self.base, &items);
        for effect in self.effects.iter_mut().filter(|effect| operations[effect.operation].file == file) {
            for (order, bytes) in &overwritten {
                if effect.order < *order {
                    effect.bytes = effect.bytes.without(bytes);
                }
            }
        }
        self.effects.retain(|effect| !effect.bytes.is_empty());
    }

    /// The operations that have open bytes, in the order of their pushes.
    pub(crate) fn open_operations(&self) -> Vec<usize> {
        let open = self.effects.iter().chain(&self.pending).filter(|effect| !effect.bytes.is_empty());
        let mut operations: Vec<usize> = open.map(|effect| effect.operation).collect();
        operations.sort_unstable();
        operations.dedup();
        operations
    }

    /// The open changes of length: those that have happened, then the pending ones, shortest first. So any of them
    /// can be the last one kept.
    pub(crate) fn open_steps(&self) -> Vec<Step> {
        let mut coming: Vec<Step> = Vec::new();
        for pending in self.pending.iter().filter(|pending| !self.lives[pending.operation].begun) {
            let operation = pending.operation;
            let recorded = &self.history.operations[operation];
            let length = self.base.files[recorded.file].contents.length();
            let step = recorded.step().filter(|step| match step {
                LengthStep::Grow(to) => *to > length,
                LengthStep::Set(_) => true,
            });
            coming.extend(step.map(|step| Step { operation, order: NOT_YET, step }));
        }
        coming.sort_by_key(|step| match step.step {
            LengthStep::Grow(to) => (0, to),
            LengthStep::Set(to) => (1, to),
        });
        self.steps.iter().copied().chain(coming).collect()
    }

    /// True if an operation was pushed since the walk was last moved by [`Replay::advance_to_change`].
    pub(crate) fn is_new(&self, operation: usize) -> bool {
        self.lives[operation].pushed_at >= self.since.0
    }

    /// The image that a crash at this instant leaves under the plan. Pages are shared with other images.
    pub fn image(&self, plan: &CrashPlan) -> Image {
        let mut items: Vec<Item> = self.open_steps().into_iter().take(plan.lengths).map(Item::Step).collect();
        for effect in self.effects.iter().chain(&self.pending) {
            let Some(bytes) = plan.kept_bytes(effect.operation, &effect.bytes) else { continue };
            items.push(Item::Bytes { operation: effect.operation, order: effect.order, bytes });
        }
        items.sort_by_key(Item::order);
        let mut image = self.base.clone();
        apply(self.history, &mut image, &items);
        image
    }

    /// The durable state: the least that a crash leaves.
    pub fn durable(&self) -> &Image {
        &self.base
    }
}

/// Applies effects and changes of length to an image in the given order. Returns the overwritten bytes, each with the
/// order of its overwriter.
fn apply(history: &History, image: &mut Image, items: &[Item]) -> Vec<(usize, Ranges)> {
    let mut overwritten = Vec::with_capacity(items.len());
    let mut touched = Vec::new();
    for item in items {
        let operation = match item {
            Item::Bytes { operation, .. } => *operation,
            Item::Step(step) => step.operation,
        };
        let file = history.operations[operation].file;
        if !touched.contains(&file) {
            touched.push(file);
        }
        let contents = &mut image.files[file].contents;
        match item {
            Item::Bytes { order, bytes, .. } => {
                for range in bytes.iter() {
                    apply_bytes(history, operation, contents, range);
                }
                overwritten.push((*order, bytes.as_ref().clone()));
            }
            Item::Step(Step { step: LengthStep::Set(to), order, .. }) if *to < contents.length() => {
                contents.set_length(*to);
                overwritten.push((*order, Ranges::one(*to..u64::MAX)));
            }
            Item::Step(Step { step: LengthStep::Set(to) | LengthStep::Grow(to), .. }) => contents.grow(*to),
        }
    }
    for file in touched {
        let contents = &mut image.files[file].contents;
        contents.set_length(contents.length());
    }
    overwritten
}

fn apply_bytes(history: &History, operation: usize, contents: &mut Contents, range: Range<u64>) {
    let recorded = &history.operations[operation];
    match (recorded.verb, &recorded.bytes) {
        (Verb::Write, Some(bytes)) => {
            let within = (range.start - recorded.offset) as usize..(range.end - recorded.offset) as usize;
            contents.write(range.start, &bytes[within]);
        }
        (Verb::Punch, _) => contents.zero(range, true),
        (Verb::Zero, _) => contents.zero(range, false),
        (verb, _) => unreachable!("{verb:?} changes no bytes"),
    }
}
