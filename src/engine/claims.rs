//! Claims on ranges of guest clusters: which requests may change their mapping now, and which wait. First come, first
//! served.
//!
//! A request that may allocate, discard or zero claims its whole range at once, before it plans. It holds nothing else
//! while it waits, so claims cannot deadlock. No claim overtakes an earlier overlapping one, so none starves.
//! A change that is planned and committed in one step needs no claim, only that no claim overlaps it.
//!
//! For each cluster only the last claim on it is recorded, by runs of clusters (`claimed_runs.rs`). A new claim
//! waits for the last claims on its range. Each of these waits for the claims before it, so the new claim need not
//! know the earlier ones. A claim costs a few steps in a tree, however many claims there are.

use std::ops::RangeInclusive;
use std::task::Waker;

use slab::Slab;
use smallvec::{SmallVec, smallvec};

use crate::claimed_runs::{ClaimedRun, ClaimedRuns};
use crate::sync::Mutex;

/// Identifies a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimId {
    slot: usize,
    number: u64,
}

#[cfg(all(test, loom))]
impl ClaimId {
    /// Its place in the order of arrival.
    pub fn number(self) -> u64 {
        self.number
    }
}

struct Claim {
    /// Its place in the order of arrival.
    number: u64,
    /// Runs that it took over from claims not yet released. Zero: held.
    blockers: u32,
    /// The slots of later claims that took over runs from this one, one item for each run.
    followers: Vec<usize>,
    /// The first clusters of all runs that it ever was the last claim on.
    runs: SmallVec<[u64; 1]>,
    /// It was given up while it waited. Its followers still wait until it would be held.
    given_up: bool,
    waker: Option<Waker>,
}

/// All claims of one disk. Leaf lock: nothing is locked while it is held, and wakers are woken after it is released.
#[derive(Default)]
pub(crate) struct Claims {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    claims: Slab<Claim>,
    runs: ClaimedRuns,
}

impl Inner {
    fn get(&mut self, id: ClaimId) -> &mut Claim {
        let claim = self.claims.get_mut(id.slot).filter(|claim| claim.number == id.number);
        claim.expect("a claim that was added and not released")
    }

    /// Adds a claim behind all earlier ones on its clusters.
    fn queue(&mut self, clusters: RangeInclusive<u64>) -> ClaimId {
        let (first, last) = (*clusters.start(), *clusters.end());
        let number = self.next;
        self.next += 1;
        let slot = self.claims.insert(Claim {
            number,
            blockers: 0,
            followers: Vec::new(),
            runs: smallvec![first],
            given_up: false,
            waker: None,
        });
        while let Some(run) = self.runs.take_overlapping(&clusters) {
            self.take_over(slot, run, &clusters);
        }
        self.runs.insert(ClaimedRun { first, last, claim: slot });
        ClaimId { slot, number }
    }

    /// Takes over the clusters of a run that are among those of a new claim. The run's claim blocks the new one, and
    /// stays the last claim on the rest of the run.
    fn take_over(&mut self, slot: usize, run: ClaimedRun, clusters: &RangeInclusive<u64>) {
        let (first, last) = (*clusters.start(), *clusters.end());
        let earlier = &mut self.claims[run.claim];
        earlier.followers.push(slot);
        if run.first < first {
            self.runs.insert(ClaimedRun { last: first - 1, ..run });
        }
        if run.last > last {
            earlier.runs.push(last + 1);
            self.runs.insert(ClaimedRun { first: last + 1, ..run });
        }
        self.claims[slot].blockers += 1;
    }

    /// Removes a held claim, and those given up that are now held. Returns the wakers of the other claims now held.
    fn remove(&mut self, slot: usize) -> Wakers {
        let mut wakers = Wakers::new();
        let mut followers = self.take_out(slot);
        let mut at = 0;
        while let Some(&follower) = followers.get(at) {
            at += 1;
            let later = &mut self.claims[follower];
            later.blockers -= 1;
            match later.blockers {
                0 if later.given_up => followers.extend(self.take_out(follower)),
                0 => wakers.extend(later.waker.take()),
                _ => {}
            }
        }
        wakers
    }

    /// Takes a claim out, with the runs that it is still the last claim on. Returns the slots of its followers.
    fn take_out(&mut self, slot: usize) -> Vec<usize> {
        let claim = self.claims.remove(slot);
        for first in &claim.runs {
            self.runs.remove(*first, slot);
        }
        claim.followers
    }
}

/// Most releases let at most one other claim go on.
type Wakers = SmallVec<[Waker; 1]>;

impl Claims {
    /// Queues a claim on these guest clusters.
    pub fn add(&self, clusters: RangeInclusive<u64>) -> ClaimId {
        self.inner.lock().expect("no panic under this lock").queue(clusters)
    }

    /// True if a claim overlaps these guest clusters, held or waiting.
    pub fn overlap(&self, clusters: RangeInclusive<u64>) -> bool {
        self.inner.lock().expect("no panic under this lock").runs.overlaps(&clusters)
    }

    /// True if the claim is held; otherwise `waker` is woken once it is.
    pub fn held(&self, id: ClaimId, waker: &Waker) -> bool {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        let claim = inner.get(id);
        if claim.blockers != 0 {
            claim.waker = Some(waker.clone());
        }
        claim.blockers == 0
    }

    /// Releases a claim that is held, or gives up one that waits, and wakes the requests whose claims are now held.
    pub fn release(&self, id: ClaimId) {
        let wakers = {
            let mut inner = self.inner.lock().expect("no panic under this lock");
            let claim = inner.get(id);
            if claim.blockers != 0 {
                claim.given_up = true;
                claim.waker = None;
                return;
            }
            inner.remove(id.slot)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn overlapping_claims_are_served_in_order() {
        let claims = Claims::default();
        let waker = Waker::noop();
        let a = claims.add(0..=9);
        let b = claims.add(5..=14);
        let c = claims.add(12..=20);
        let d = claims.add(30..=30);
        assert!(claims.held(a, waker));
        assert!(!claims.held(b, waker));
        assert!(!claims.held(c, waker), "c waits behind b, which came first, though nobody holds its range");
        assert!(claims.held(d, waker));
        claims.release(a);
        assert!(claims.held(b, waker) && !claims.held(c, waker));
        claims.release(b);
        assert!(claims.held(c, waker));
        claims.release(c);
        claims.release(d);
        assert!(claims.held(claims.add(0..=100), waker));
    }

    #[test]
    fn held_and_waiting_claims_overlap_a_range() {
        let claims = Claims::default();
        let a = claims.add(0..=9);
        let b = claims.add(5..=14);
        assert!(claims.overlap(3..=3), "held by a");
        assert!(claims.overlap(12..=12), "b waits for it");
        assert!(!claims.overlap(15..=100));
        claims.release(b);
        assert!(claims.overlap(12..=12), "b was given up, and waits until it would be held");
        claims.release(a);
        assert!(!claims.overlap(0..=100));
    }

    /// How much is recorded for each claim. Each item costs one step of a later call: a claim adds at most two runs,
    /// and takes over at most two in part.
    fn recorded_per_claim(claims: &Claims) -> usize {
        let inner = claims.inner.lock().expect("no panic under this lock");
        let of_claims: usize =
            inner.claims.iter().map(|(_, claim)| claim.followers.len() + claim.runs.len()).sum();
        (of_claims + inner.runs.len()).div_ceil(inner.claims.len().max(1))
    }

    /// Each of many claims that overlap waits for its direct predecessors only.
    #[test]
    fn the_work_for_a_claim_does_not_grow_with_their_number() {
        const MANY: u64 = 8000;
        /// The clusters of a claim, by its number.
        type Clusters = fn(u64) -> RangeInclusive<u64>;
        let ranges: [(&str, Clusters); 6] = [
            ("one range", |_| 7..=90),
            ("apart", |n| 3 * n..=3 * n + 1),
            ("steps", |n| n..=n + 100),
            ("each within the one before", |n| n..=2 * MANY - n),
            ("each around the one before", |n| MANY - n..=MANY + n),
            ("a wide one, then narrow ones", |n| if n % 100 == 0 { 0..=MANY } else { n..=n }),
        ];
        for (name, range) in ranges {
            let claims = Claims::default();
            let ids: Vec<_> = (0..MANY).map(|n| claims.add(range(n))).collect();
            assert!(recorded_per_claim(&claims) <= 8, "{name}: {}", recorded_per_claim(&claims));
            for id in ids {
                assert!(claims.held(id, Waker::noop()), "{name}: all before {id:?} were released");
                claims.release(id);
            }
            let inner = claims.inner.lock().expect("no panic under this lock");
            assert!(inner.claims.is_empty() && inner.runs.len() == 0, "{name}");
        }
    }

    /// Claims as the rule states it: held if no earlier overlapping claim is left. One that is given up while it waits
    /// is left until it would be held.
    #[derive(Default)]
    struct Model(Vec<Modelled>);

    #[derive(Clone)]
    struct Modelled {
        id: ClaimId,
        clusters: RangeInclusive<u64>,
        given_up: bool,
    }

    impl Model {
        fn add(&mut self, id: ClaimId, clusters: RangeInclusive<u64>) {
            self.0.push(Modelled { id, clusters, given_up: false });
        }

        fn overlaps(&self, clusters: &RangeInclusive<u64>) -> bool {
            let meets = |other: &RangeInclusive<u64>| {
                other.start() <= clusters.end() && clusters.start() <= other.end()
            };
            self.0.iter().any(|claim| meets(&claim.clusters))
        }

        fn held(&self, id: ClaimId) -> bool {
            let at = self.0.iter().position(|claim| claim.id == id).expect("in the model");
            !Model(self.0[..at].to_vec()).overlaps(&self.0[at].clusters)
        }

        fn release(&mut self, id: ClaimId) {
            let claim = self.0.iter_mut().find(|claim| claim.id == id).expect("in the model");
            claim.given_up = true;
            while let Some(gone) = self.0.iter().position(|claim| claim.given_up && self.held(claim.id)) {
                self.0.remove(gone);
            }
        }

        /// The claims not yet released.
        fn live(&self) -> impl Iterator<Item = ClaimId> {
            self.0.iter().filter(|claim| !claim.given_up).map(|claim| claim.id)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(RangeInclusive<u64>),
        Look(RangeInclusive<u64>),
        Release(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        let clusters = || (0u64..40, 0u64..12).prop_map(|(first, more)| first..=first + more);
        // Many of these do not overlap.
        let apart = || (0u64..40).prop_map(|number| 100 + 2 * number..=100 + 2 * number);
        prop_oneof![
            3 => clusters().prop_map(Step::Add),
            2 => apart().prop_map(Step::Add),
            1 => clusters().prop_map(Step::Look),
            2 => apart().prop_map(Step::Look),
            3 => any::<prop::sample::Index>().prop_map(Step::Release),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn claims_are_held_as_the_rule_says(steps in proptest::collection::vec(step(), 1..120)) {
            let (claims, mut model) = (Claims::default(), Model::default());
            for step in steps {
                match step {
                    Step::Add(clusters) => model.add(claims.add(clusters.clone()), clusters),
                    Step::Look(clusters) => {
                        prop_assert_eq!(claims.overlap(clusters.clone()), model.overlaps(&clusters));
                    }
                    Step::Release(which) => {
                        let live: Vec<_> = model.live().collect();
                        if !live.is_empty() {
                            claims.release(*which.get(&live));
                            model.release(*which.get(&live));
                        }
                    }
                }
                for id in model.live() {
                    prop_assert_eq!(claims.held(id, Waker::noop()), model.held(id));
                }
            }
        }
    }
}
