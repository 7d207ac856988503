//! Claims on ranges of guest clusters: which requests may change their mapping now, and which wait. First come, first
//! served.
//!
//! A request that may allocate, discard or zero claims its whole range at once, before it plans. It holds nothing else
//! while it waits, so claims cannot deadlock. No claim overtakes an earlier overlapping one, so none starves.

use std::collections::VecDeque;
use std::task::Waker;

use crate::mutation::{Mutation, active};
use crate::sync::Mutex;

/// Identifies a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimId(u64);

#[cfg(all(test, loom))]
impl ClaimId {
    /// Its place in the order of arrival.
    pub fn number(self) -> u64 {
        self.0
    }
}

struct Claim {
    id: u64,
    /// First and last guest cluster.
    first: u64,
    last: u64,
    /// Earlier claims, held or waiting, that overlap this one. Zero: held.
    blockers: u32,
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
    /// In order of arrival.
    claims: VecDeque<Claim>,
}

impl Inner {
    fn push(&mut self, first: u64, last: u64, blockers: u32) -> ClaimId {
        let id = self.next;
        self.next += 1;
        self.claims.push_back(Claim { id, first, last, blockers, waker: None });
        ClaimId(id)
    }
}

impl Claims {
    /// Queues a claim on guest clusters `first..=last`.
    pub fn add(&self, first: u64, last: u64) -> ClaimId {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        let blockers = inner.claims.iter().filter(|c| c.first <= last && first <= c.last).count() as u32;
        inner.push(first, last, blockers)
    }

    /// A claim on guest clusters `first..=last`, held at once; `None` if any other overlaps it, held or waiting.
    pub fn try_add(&self, first: u64, last: u64) -> Option<ClaimId> {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        let free = !inner.claims.iter().any(|c| c.first <= last && first <= c.last);
        (free || active(Mutation::ClaimForced)).then(|| inner.push(first, last, 0))
    }

    /// True if the claim is held; otherwise `waker` is woken once it is.
    pub fn held(&self, id: ClaimId, waker: &Waker) -> bool {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        let claim = inner.claims.iter_mut().find(|c| c.id == id.0).expect("a claim that was added");
        if claim.blockers != 0 {
            claim.waker = Some(waker.clone());
        }
        claim.blockers == 0
    }

    /// Gives a claim up, held or not, and wakes whom that lets go on.
    pub fn release(&self, id: ClaimId) {
        for waker in self.remove(id) {
            waker.wake();
        }
    }

    fn remove(&self, id: ClaimId) -> Vec<Waker> {
        let mut inner = self.inner.lock().expect("no panic under this lock");
        let at = inner.claims.iter().position(|c| c.id == id.0).expect("a claim that was added");
        let gone = inner.claims.remove(at).expect("position is valid");
        let mut woken = Vec::new();
        for later in inner.claims.iter_mut().skip(at) {
            if later.first <= gone.last && gone.first <= later.last {
                later.blockers -= 1;
                if later.blockers == 0 {
                    woken.extend(later.waker.take());
                }
            }
        }
        woken
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
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
}
