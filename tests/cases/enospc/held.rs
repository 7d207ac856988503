//! Freed space that is held back until its unlink is durable. Its amount is bounded, and all of it is given back before
//! a request fails or waits for space.

use std::time::Duration;

use disk::{OnEnospc, SpaceStatus};
use strata_kit::model::Operation;

use super::{CLUSTER, PLENTY, Rig, SLOTS, Setup, WINDOW, write};

/// Bytes of the disk.
const SIZE: u64 = 64 << 20;
/// Clusters that the guest writes and frees, again and again.
const SPAN: u64 = 16;
/// Bytes of freed clusters that may be held back: an eighth of the disk.
const HELD_MAX: u64 = SIZE / 8;
/// Bytes that requests in flight may have allocated and not yet freed, and bytes of new metadata.
const IN_FLIGHT: u64 = SLOTS as u64 * CLUSTER + 4 * CLUSTER;
/// The unit in which the host allocates space.
const PAGE: u64 = 4096;

fn setup(on_enospc: OnEnospc) -> Setup {
    Setup { size: SIZE, ..Setup::new(on_enospc) }
}

/// A way in which a guest frees a cluster.
#[derive(Clone, Copy, Debug)]
enum Frees {
    Discard,
    Zeroes,
}

impl Frees {
    fn operation(self, cluster: u64) -> Operation {
        let (offset, length) = (cluster * CLUSTER, CLUSTER);
        match self {
            Frees::Discard => Operation::Discard { offset, length },
            Frees::Zeroes => Operation::WriteZeroes { offset, length, unmap: true },
        }
    }
}

/// Every way of freeing, in both modes.
fn ways() -> impl Iterator<Item = (OnEnospc, Frees)> {
    let modes = [OnEnospc::Report, OnEnospc::Wait];
    modes.into_iter().flat_map(|mode| [(mode, Frees::Discard), (mode, Frees::Zeroes)])
}

impl Rig {
    /// Lets time pass until nothing is in flight. Calls `look` meanwhile.
    fn finish(&mut self, look: impl Fn(&Rig)) {
        for _ in 0..20_000 {
            self.pass(Duration::from_millis(1));
            look(self);
            if self.flying.is_empty() {
                return;
            }
        }
        panic!("in flight for 20 seconds: {:?}", self.flying);
    }

    /// Writes and frees clusters `rounds` times, without a flush.
    fn write_and_free(&mut self, frees: Frees, rounds: u32, look: impl Fn(&Rig)) {
        let half = SLOTS as u64;
        for round in 0..rounds {
            let first = u64::from(round % 2) * half;
            for cluster in first..first + half {
                self.send(write(cluster, 1, 8 * round + 1));
            }
            self.finish(&look);
            for cluster in first..first + half {
                self.send(frees.operation(cluster));
            }
            self.finish(&look);
        }
    }
}

#[test]
fn freed_space_is_bounded_without_a_flush() {
    for (on_enospc, frees) in ways() {
        let mut rig = setup(on_enospc).open();
        let begin = rig.world.allocated();
        let most = begin + SPAN * CLUSTER + HELD_MAX + IN_FLIGHT;
        rig.write_and_free(frees, 80, |rig| {
            let allocated = rig.world.allocated();
            assert!(allocated <= most, "{on_enospc:?}, {frees:?}: {allocated} bytes, at most {most}");
        });
        assert_eq!(rig.space(), SpaceStatus::default());
        rig.conclude();
    }
}

#[test]
fn freed_space_is_given_back_before_a_request_fails_or_waits() {
    for (on_enospc, frees) in ways() {
        let mut rig = setup(on_enospc).open();
        // Less than the bytes that may be held back. The host has not allocated the new image's tables yet.
        rig.leave_space(SPAN * CLUSTER + IN_FLIGHT);
        rig.write_and_free(frees, 80, |rig| {
            assert!(rig.failed.is_empty(), "{on_enospc:?}, {frees:?}: {:?}", rig.failed);
            assert_eq!(rig.space().waited, 0, "{on_enospc:?}, {frees:?}");
        });
        rig.leave_space(PLENTY);
        rig.conclude();
    }
}

/// The space that a single request frees is bounded, too.
#[test]
fn a_discard_of_everything_holds_no_more_back() {
    let mut rig = setup(OnEnospc::Report).open();
    for offset in (0..SIZE).step_by(WINDOW) {
        rig.run(Operation::Write { offset, length: WINDOW as u64, seed: 1 });
    }
    rig.run(Operation::Flush);
    let full = rig.world.allocated();
    rig.send(Operation::Discard { offset: 0, length: SIZE });
    rig.finish(|rig| {
        let held = rig.disk.status().quarantined_clusters * CLUSTER;
        let most = rig.disk.status().quarantined_max * CLUSTER;
        assert!(held <= most && most <= HELD_MAX, "{held} bytes, at most {most}");
    });
    assert!(rig.world.allocated() < full - SIZE + 2 * HELD_MAX, "most has gone back without any flush");
    rig.conclude();
}

/// Metadata of an image that was copied with holes is allocated before it is changed, so that a flush needs no space.
#[test]
fn a_flush_needs_no_space_where_tables_were_holes() {
    for on_enospc in [OnEnospc::Report, OnEnospc::Wait] {
        let mut rig = setup(on_enospc).open();
        rig.run(write(0, 1, 1));
        rig.run(Operation::Flush);
        rig = rig.copied_with_holes();
        // Its entry is in the table, but in a page that is a hole.
        let far = Operation::Write { offset: SIZE - CLUSTER, length: CLUSTER, seed: 3 };
        rig.leave_space(CLUSTER);
        rig.send(far);
        rig.pass(Duration::from_millis(50));
        match on_enospc {
            OnEnospc::Report => assert!(rig.failed.pop().is_some_and(|(_, error)| error.is_no_space())),
            OnEnospc::Wait => assert_eq!(rig.space().waiting, 1),
        }
        rig.leave_space(CLUSTER + PAGE);
        if on_enospc == OnEnospc::Report {
            rig.send(far);
        }
        rig.finish(|_| ());
        rig.leave_space(0);
        rig.run(Operation::Flush);
        rig.leave_space(PLENTY);
        rig.conclude();
    }
}
