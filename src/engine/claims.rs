//! Claims on ranges of guest clusters: which requests may change their mapping now, and which wait. First come, first
//! served.
//!
//! A request that may allocate, discard or zero claims its whole range at once, before it plans. It holds nothing else
//! while it waits, so claims cannot deadlock. No claim overtakes an earlier overlapping one, so none starves.
//!
//! For each cluster only the last claim on it is recorded, by runs of clusters. A new claim waits for the last claims
//! on its range. These waited for all earlier claims on their ranges, so nothing else must be known of those. The cost
//! of a claim, from its request to its release, is a few steps in a tree, however many claims there are.

use std::collections::BTreeMap;
use std::task::Waker;

use slab::Slab;
use smallvec::{SmallVec, smallvec};

use crate::mutation::{Mutation, active};
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
    /// Pieces that it took over from claims not yet released. Zero: held.
    blockers: u32,
    /// The slots of later claims that took over pieces from this one, one item for each piece.
    followers: Vec<usize>,
    /// The first clusters of all pieces that it ever was the last claim on.
    pieces: SmallVec<[u64; 1]>,
    /// It was given up while it waited. Its followers still wait until it would be held.
    given_up: bool,
    waker: Option<Waker>,
}

/// A run of clusters with the same last claim.
struct Piece {
    /// The last cluster.
    end: u64,
    /// The slot of the last claim.
    claim: usize,
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
    /// By first cluster; pieces do not overlap. Clusters in none are not claimed.
    pieces: BTreeMap<u64, Piece>,
}

impl Inner {
    /// Adds a claim that is the last on no cluster.
    fn insert(&mut self) -> ClaimId {
        let number = self.next;
        self.next += 1;
        let slot = self.claims.insert(Claim {
            number,
            blockers: 0,
            followers: Vec::new(),
            pieces: SmallVec::new(),
            given_up: false,
            waker: None,
        });
        ClaimId { slot, number }
    }

    fn get(&mut self, id: ClaimId) -> &mut Claim {
        let claim = self.claims.get_mut(id.slot).filter(|claim| claim.number == id.number);
        claim.expect("a claim that was added and not released")
    }

    /// Adds a claim on clusters `first..=last`, behind all earlier ones there.
    fn queue(&mut self, first: u64, last: u64) -> ClaimId {
        let id = self.insert();
        let mut from = first;
        if let Some((_, before)) = self.pieces.range_mut(..first).next_back()
            && before.end >= first
        {
            // Only the part before the new claim stays.
            let piece = Piece { end: std::mem::replace(&mut before.end, first - 1), claim: before.claim };
            from = self.take_over(id.slot, piece, last);
        }
        while from <= last
            && let Some((&start, _)) = self.pieces.range(from..=last).next()
        {
            let piece = self.pieces.remove(&start).expect("it was just found");
            from = self.take_over(id.slot, piece, last);
        }
        self.pieces.insert(first, Piece { end: last, claim: id.slot });
        self.claims[id.slot].pieces = smallvec![first];
        id
    }

    /// Takes over the clusters of a piece up to `last`: the piece's claim blocks the new one. Returns the first cluster
    /// after the piece.
    fn take_over(&mut self, slot: usize, piece: Piece, last: u64) -> u64 {
        let earlier = &mut self.claims[piece.claim];
        earlier.followers.push(slot);
        if piece.end > last {
            earlier.pieces.push(last + 1);
            self.pieces.insert(last + 1, Piece { end: piece.end, claim: piece.claim });
        }
        self.claims[slot].blockers += 1;
        piece.end + 1
    }

    /// Removes a held claim, and those given up that are now held. Returns the wakers of the other claims now held.
    fn remove(&mut self, slot: usize) -> Wakers {
        let mut wakers = Wakers::new();
        let mut gone: SmallVec<[usize; 1]> = smallvec![slot];
        while let Some(slot) = gone.pop() {
            let claim = self.claims.remove(slot);
            for first in claim.pieces {
                if self.pieces.get(&first).is_some_and(|piece| piece.claim == slot) {
                    self.pieces.remove(&first);
                }
            }
            for follower in claim.followers {
                let later = &mut self.claims[follower];
                later.blockers -= 1;
                match later.blockers {
                    0 if later.given_up => gone.push(follower),
                    0 => wakers.extend(later.waker.take()),
                    _ => {}
                }
            }
        }
        wakers
    }
}

/// Most releases let at most one other claim go on.
type Wakers = SmallVec<[Waker; 1]>;

impl Claims {
    /// Queues a claim on guest clusters `first..=last`.
    pub fn add(&self, first: u64, last: u64) -> ClaimId {
        self.inner.lock().expect("no panic under this lock").queue(first, last)
    }

    /// A claim on guest clusters `first..=last`, held at once; `None` if any other overlaps it, held or waiting.
    pub fn try_add(&self, first: u64, last: u64) -> Option<ClaimId> {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        if inner.pieces.range(..=last).next_back().is_none_or(|(_, before)| before.end < first) {
            return Some(inner.queue(first, last));
        }
        active(Mutation::ClaimForced).then(|| inner.insert())
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
        let a = claims.add(0, 9);
        let b = claims.add(5, 14);
        let c = claims.add(12, 20);
        let d = claims.add(30, 30);
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
        assert!(claims.held(claims.add(0, 100), waker));
    }

    #[test]
    fn a_claim_to_be_held_at_once_overtakes_nobody() {
        let claims = Claims::default();
        let waker = Waker::noop();
        let a = claims.add(0, 9);
        let b = claims.add(5, 14);
        assert_eq!(claims.try_add(3, 3), None, "held by a");
        assert_eq!(claims.try_add(12, 12), None, "b waits for it");
        let c = claims.try_add(15, 15).expect("nobody's");
        assert!(claims.held(c, waker));
        let d = claims.add(15, 20);
        assert!(!claims.held(d, waker), "it is a claim like any other");
        claims.release(c);
        assert!(claims.held(d, waker));
        for claim in [a, b, d] {
            claims.release(claim);
        }
        assert!(claims.try_add(0, 100).is_some());
    }

    /// How much is recorded for each claim. Each item costs one step of a later call: a claim adds at most two pieces,
    /// and takes over at most two in part.
    fn recorded_per_claim(claims: &Claims) -> usize {
        let inner = claims.inner.lock().expect("no panic under this lock");
        let of_claims: usize =
            inner.claims.iter().map(|(_, claim)| claim.followers.len() + claim.pieces.len()).sum();
        (of_claims + inner.pieces.len()).div_ceil(inner.claims.len().max(1))
    }

    /// Each of many claims that overlap waits for its direct predecessors only.
    #[test]
    fn the_work_for_a_claim_does_not_grow_with_their_number() {
        const MANY: u64 = 8000;
        /// The first and the last cluster of a claim, by its number.
        type Range = fn(u64) -> (u64, u64);
        let ranges: [(&str, Range); 5] = [
            ("one range", |_| (7, 90)),
            ("steps", |n| (n, n + 100)),
            ("each within the one before", |n| (n, 2 * MANY - n)),
            ("each around the one before", |n| (MANY - n, MANY + n)),
            ("a wide one, then narrow ones", |n| if n % 100 == 0 { (0, MANY) } else { (n, n) }),
        ];
        for (name, range) in ranges {
            let claims = Claims::default();
            let ids: Vec<_> = (0..MANY).map(range).map(|(first, last)| claims.add(first, last)).collect();
            assert!(recorded_per_claim(&claims) <= 8, "{name}: {}", recorded_per_claim(&claims));
            for id in ids {
                assert!(claims.held(id, Waker::noop()), "{name}: all before {id:?} were released");
                claims.release(id);
            }
            let inner = claims.inner.lock().expect("no panic under this lock");
            assert!(inner.claims.is_empty() && inner.pieces.is_empty(), "{name}");
        }
    }

    /// Claims as the rule states it: held if no earlier overlapping claim is left. One that is given up while it waits
    /// is left until it would be held.
    #[derive(Default)]
    struct Model(Vec<(ClaimId, u64, u64, bool)>);

    impl Model {
        fn overlaps(&self, first: u64, last: u64) -> bool {
            self.0.iter().any(|(_, start, end, _)| *start <= last && first <= *end)
        }

        fn held(&self, id: ClaimId) -> bool {
            let at = self.0.iter().position(|claim| claim.0 == id).expect("in the model");
            let (_, first, last, _) = self.0[at];
            !Model(self.0[..at].to_vec()).overlaps(first, last)
        }

        fn release(&mut self, id: ClaimId) {
            let claim = self.0.iter_mut().find(|claim| claim.0 == id).expect("in the model");
            claim.3 = true;
            while let Some(gone) = self.0.iter().position(|claim| claim.3 && self.held(claim.0)) {
                self.0.remove(gone);
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(u64, u64),
        Try(u64, u64),
        Release(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = || (0u64..40, 0u64..12).prop_map(|(first, more)| (first, first + more));
        prop_oneof![
            3 => range().prop_map(|(first, last)| Step::Add(first, last)),
            1 => range().prop_map(|(first, last)| Step::Try(first, last)),
            3 => any::<prop::sample::Index>().prop_map(Step::Release),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn claims_are_held_as_the_rule_says(steps in proptest::collection::vec(step(), 1..80)) {
            let (claims, mut model) = (Claims::default(), Model::default());
            for step in steps {
                match step {
                    Step::Add(first, last) => model.0.push((claims.add(first, last), first, last, false)),
                    Step::Try(first, last) => {
                        let tried = claims.try_add(first, last);
                        prop_assert_eq!(tried.is_some(), !model.overlaps(first, last));
                        model.0.extend(tried.map(|id| (id, first, last, false)));
                    }
                    Step::Release(which) => {
                        let live: Vec<_> = model.0.iter().filter(|claim| !claim.3).map(|claim| claim.0).collect();
                        if !live.is_empty() {
                            claims.release(*which.get(&live));
                            model.release(*which.get(&live));
                        }
                    }
                }
                for (id, ..) in model.0.iter().filter(|claim| !claim.3) {
                    prop_assert_eq!(claims.held(*id, Waker::noop()), model.held(*id));
                }
            }
        }
    }
}
