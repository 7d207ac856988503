//! Chooses the crashes to try at an instant: every subset of the open operations if there are few, otherwise a seeded
//! sample.
//!
//! `replay` builds the files that a plan leaves.

use std::fmt::Write;

use crate::plan::{CrashPlan, Kept};
use crate::{Moment, Random, Replay};

/// How many crashes to try at an instant.
#[derive(Clone, Copy, Debug)]
pub struct CrashLimits {
    /// With at most this many open operations and changes of length, every subset of them is tried.
    pub exhaustive: usize,
    /// With more: the number of random subsets, in addition to none, all, each alone, all but one, and every prefix.
    pub samples: usize,
    /// The number of random subsets in which some operations are torn at 512 bytes or at 4 KiB, in either case.
    pub tears: usize,
}

impl Default for CrashLimits {
    fn default() -> Self {
        CrashLimits { exhaustive: 10, samples: 64, tears: 16 }
    }
}

/// Which crashes of an instant to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashScope {
    /// All.
    All,
    /// Only those that were impossible before the last [`Replay::advance_to_change`]: they keep an operation pushed
    /// since. All crashes if the durable state has changed since, and at the first change of a run.
    New,
}

impl Replay<'_> {
    /// The crash that keeps every open operation.
    pub fn everything(&self) -> CrashPlan {
        let kept = self.open_operations().into_iter().map(|operation| (operation, Kept::Whole)).collect();
        CrashPlan { kept, lengths: self.open_steps().len() }
    }

    /// The number of open operations and changes of length: a crash keeps any part of them.
    pub fn open_count(&self) -> usize {
        self.open_operations().len() + self.open_steps().len()
    }

    /// The crashes to try at this instant.
    pub fn plans(&self, limits: &CrashLimits, scope: CrashScope, random: &mut Random) -> Vec<CrashPlan> {
        let steps = self.open_steps();
        let planner = Planner { operations: self.open_operations(), steps: steps.len() };
        let count = planner.operations.len() + planner.steps;
        let mut plans =
            if count <= limits.exhaustive { planner.every() } else { planner.sample(limits.samples, random) };
        planner.tear(self, limits.tears, random, &mut plans);
        if scope == CrashScope::New && self.since > Moment(0) && self.base_changed <= self.since {
            plans.retain(|plan| {
                plan.kept.iter().any(|(operation, _)| self.is_new(*operation))
                    || steps[..plan.lengths].iter().any(|step| self.is_new(step.operation))
            });
        }
        plans
    }

    /// Describes a plan: each open operation, and how much of it the crash keeps.
    pub fn describe(&self, plan: &CrashPlan) -> String {
        let mut text = format!("crash at moment {}", self.moment().0);
        let mut line = |operation: usize, what: &str| {
            let recorded = &self.history.operations[operation];
            let path = self.history.start.files[recorded.file].path.display();
            let _ = write!(text, "\n  #{operation} {recorded} of {path}: {what}");
        };
        for operation in self.open_operations() {
            let at = plan.kept.binary_search_by_key(&operation, |(operation, _)| *operation);
            match at.map(|at| &plan.kept[at].1) {
                Err(_) => line(operation, "lost"),
                Ok(Kept::Whole) => line(operation, "kept"),
                Ok(Kept::Torn(part)) => {
                    let ranges: Vec<String> =
                        part.iter().map(|range| format!("{:#x}..{:#x}", range.start, range.end)).collect();
                    line(operation, &format!("torn, kept {}", ranges.join(" ")));
                }
            }
        }
        for (number, step) in self.open_steps().iter().enumerate() {
            line(step.operation, if number < plan.lengths { "its length kept" } else { "its length lost" });
        }
        text
    }
}

/// Makes plans from the open operations.
struct Planner {
    operations: Vec<usize>,
    steps: usize,
}

impl Planner {
    /// The plan that keeps the operations whose index `keep` accepts.
    fn plan(&self, lengths: usize, mut keep: impl FnMut(usize) -> bool) -> CrashPlan {
        let kept = (self.operations.iter().enumerate())
            .filter(|(place, _)| keep(*place))
            .map(|(_, operation)| (*operation, Kept::Whole));
        CrashPlan { kept: kept.collect(), lengths }
    }

    fn every(&self) -> Vec<CrashPlan> {
        let subsets = 0u64..1 << self.operations.len();
        subsets
            .flat_map(|subset| (0..=self.steps).map(move |lengths| (subset, lengths)))
            .map(|(subset, lengths)| self.plan(lengths, |place| subset >> place & 1 == 1))
            .collect()
    }

    fn sample(&self, samples: usize, random: &mut Random) -> Vec<CrashPlan> {
        let count = self.operations.len();
        let mut plans = Vec::new();
        let ends = if self.steps == 0 { vec![0] } else { vec![0, self.steps] };
        for lengths in ends {
            plans.push(self.plan(lengths, |_| false));
            plans.push(self.plan(lengths, |_| true));
            for chosen in 0..count {
                plans.push(self.plan(lengths, |place| place == chosen));
                plans.push(self.plan(lengths, |place| place != chosen));
                plans.push(self.plan(lengths, |place| place < chosen));
            }
        }
        for lengths in 1..self.steps {
            plans.push(self.plan(lengths, |_| true));
        }
        plans.extend((0..samples).map(|_| self.random_plan(random)));
        plans
    }

    fn random_plan(&self, random: &mut Random) -> CrashPlan {
        let part = [1, 4, 7][random.below(3) as usize];
        let lengths = random.below(self.steps as u64 + 1) as usize;
        self.plan(lengths, |_| random.chance(part, 8))
    }

    /// Adds random plans in which operations are torn.
    fn tear(&self, replay: &Replay, count: usize, random: &mut Random, plans: &mut Vec<CrashPlan>) {
        if self.operations.is_empty() {
            return;
        }
        for _ in 0..count {
            let mut plan = self.random_plan(random);
            if plan.kept.is_empty() {
                let place = random.below(self.operations.len() as u64) as usize;
                plan = self.plan(plan.lengths, |other| other == place);
            }
            let one = random.below(plan.kept.len() as u64) as usize;
            for (place, (operation, kept)) in plan.kept.iter_mut().enumerate() {
                if place == one || random.chance(1, 3) {
                    let grain = if random.chance(2, 3) { 512 } else { 4096 };
                    let whole = replay.history.operations[*operation].changes();
                    *kept = Kept::Torn(whole.tear(random, grain));
                }
            }
            plans.push(plan);
        }
    }
}
