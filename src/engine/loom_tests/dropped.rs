//! Models of plans that are dropped: what they held comes back, whoever has the lock.

use super::*;
use crate::locked::{Locked, TakeBack};
use crate::waiters::WakeList;

/// Counts what came back.
#[derive(Default)]
struct Count(u64);

impl TakeBack<u64> for Count {
    fn take_back(&mut self, dropped: u64, _: &mut WakeList) {
        self.0 += dropped;
    }
}

/// No thread calls the engine after a drop, so each drop must be settled by one of those that are here.
#[test]
fn an_allocation_dropped_without_the_lock_comes_back_at_once() {
    explore(None, || {
        let locked = Arc::new(Locked::new(Count::default()));
        let other = {
            let locked = Arc::clone(&locked);
            thread::spawn(move || locked.leave(1))
        };
        locked.with(|count, _| count.0 += 10);
        other.join().expect("no panic");
        // Looks without settling.
        assert_eq!(locked.peek(|count| count.0), 11);
    });
}

#[test]
fn two_drops_and_one_under_the_lock_come_back() {
    explore(Some(3), || {
        let locked = Arc::new(Locked::new(Count::default()));
        let others = [1, 2].map(|dropped| {
            let locked = Arc::clone(&locked);
            thread::spawn(move || locked.leave(dropped))
        });
        locked.with(|_, _| locked.leave(4));
        for other in others {
            other.join().expect("no panic");
        }
        assert_eq!(locked.peek(|count| count.0), 7);
    });
}

/// A request that has given up its plan must find what the plan held taken back.
#[test]
fn who_has_dropped_finds_it_taken_back() {
    explore(None, || {
        let locked = Arc::new(Locked::new(Count::default()));
        let other = {
            let locked = Arc::clone(&locked);
            thread::spawn(move || locked.with(|count, _| count.0 += 10))
        };
        locked.leave(1);
        assert_eq!(locked.with(|count, _| count.0) % 10, 1);
        other.join().expect("no panic");
    });
}
