//! Models of claims (docs/concurrency.md, "Claims").

use super::*;
use crate::claims::{ClaimId, Claims};

/// A guest cluster under claims. Loom checks that its holders exclude each other, `last` that they come in order.
struct Claimed {
    mapping: UnsafeCell<()>,
    /// The number of its last holder's claim, plus 1. Not modelled: only the holder accesses it.
    last: Unmodelled,
}

fn claimed() -> Arc<[Claimed; 3]> {
    Arc::new(std::array::from_fn(|_| Claimed { mapping: UnsafeCell::new(()), last: Unmodelled::new(0) }))
}

/// The holder of a claim changes the claimed clusters, and releases the claim.
fn change_claimed(claims: &Claims, clusters: &[Claimed; 3], id: ClaimId, first: usize, last: usize) {
    for cluster in &clusters[first..=last] {
        cluster.mapping.with_mut(|_| ());
        let before = cluster.last.swap(id.number() + 1, Ordering::Relaxed);
        assert!(before < id.number() + 1, "claim {} after claim {}", id.number(), before - 1);
    }
    claims.release(id);
}

/// Claims `first..=last`, waits, changes the claimed clusters, and releases the claim.
fn claim_and_change(claims: &Claims, clusters: &[Claimed; 3], first: usize, last: usize) {
    let id = claims.add(first as u64..=last as u64);
    block_on(poll_fn(
        |context| {
            if claims.held(id, context.waker()) { Poll::Ready(()) } else { Poll::Pending }
        },
    ));
    change_claimed(claims, clusters, id, first, last);
}

fn claimants(preemptions: Option<usize>, ranges: [(usize, usize); 3]) {
    explore(preemptions, move || {
        let claims = Arc::new(Claims::default());
        let clusters = claimed();
        let others: Vec<_> = ranges[1..]
            .iter()
            .map(|&(first, last)| {
                let (claims, clusters) = (Arc::clone(&claims), Arc::clone(&clusters));
                thread::spawn(move || claim_and_change(&claims, &clusters, first, last))
            })
            .collect();
        claim_and_change(&claims, &clusters, ranges[0].0, ranges[0].1);
        for other in others {
            other.join().expect("claimant");
        }
    });
}

#[test]
fn three_claims_on_one_cluster_take_turns() {
    claimants(Some(3), [(0, 0), (0, 0), (0, 0)]);
}

#[test]
fn three_claims_in_a_chain_take_turns() {
    claimants(Some(3), [(0, 1), (1, 2), (2, 2)]);
}

#[test]
fn a_wide_claim_waits_for_two_narrow_ones() {
    claimants(Some(3), [(0, 0), (2, 2), (0, 2)]);
}

/// A claim that is given up while it waits: the claims behind it still wait for those before it.
#[test]
fn a_claim_that_is_given_up_lets_nobody_overtake() {
    explore(Some(3), || {
        let claims = Arc::new(Claims::default());
        let clusters = claimed();
        let first = claims.add(0..=1);
        let given_up = claims.add(0..=2);
        let others = [
            {
                let (claims, clusters) = (Arc::clone(&claims), Arc::clone(&clusters));
                thread::spawn(move || claim_and_change(&claims, &clusters, 0, 2))
            },
            {
                let claims = Arc::clone(&claims);
                thread::spawn(move || claims.release(given_up))
            },
        ];
        change_claimed(&claims, &clusters, first, 0, 1);
        for other in others {
            other.join().expect("claimant");
        }
        assert!(!claims.overlap(0..=2), "nothing is left");
    });
}

#[test]
fn two_threads_claim_again_and_again() {
    explore(None, || {
        let claims = Arc::new(Claims::default());
        let clusters = claimed();
        let other = {
            let (claims, clusters) = (Arc::clone(&claims), Arc::clone(&clusters));
            thread::spawn(move || claim_and_change(&claims, &clusters, 0, 2))
        };
        claim_and_change(&claims, &clusters, 0, 1);
        claim_and_change(&claims, &clusters, 1, 2);
        other.join().expect("claimant");
    });
}

/// A change without a claim, made in one step under the lock of the plans, comes never between a plan and its commit.
#[test]
fn a_change_without_a_claim_spares_what_claims_protect() {
    explore(None, || {
        let claims = Arc::new(Claims::default());
        let entry = Arc::new(Mutex::new(0));
        let other = {
            let (claims, entry) = (Arc::clone(&claims), Arc::clone(&entry));
            thread::spawn(move || {
                let id = claims.add(0..=2);
                assert!(claims.held(id, Waker::noop()), "nobody else claims");
                let planned = *entry.lock().expect("no panic");
                let mut entry = entry.lock().expect("no panic");
                assert_eq!(*entry, planned, "changed between plan and commit");
                *entry += 10;
                drop(entry);
                claims.release(id);
            })
        };
        for _ in 0..2 {
            let mut entry = entry.lock().expect("no panic");
            if !claims.overlap(1..=1) {
                *entry += 1;
            }
        }
        other.join().expect("claimant");
    });
}

/// If another task polls a request than before, that task is woken.
#[test]
fn the_last_waker_left_is_woken() {
    explore(None, || {
        let claims = Arc::new(Claims::default());
        let first = claims.add(0..=0);
        let other = {
            let claims = Arc::clone(&claims);
            thread::spawn(move || claims.release(first))
        };
        let second = claims.add(0..=0);
        claims.held(second, Waker::noop());
        block_on(poll_fn(
            |context| {
                if claims.held(second, context.waker()) { Poll::Ready(()) } else { Poll::Pending }
            },
        ));
        claims.release(second);
        other.join().expect("first claimant");
    });
}
