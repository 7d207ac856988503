//! Allocations that are dropped before their commit: their clusters come back, whoever has the engine's lock, and nobody
//! waits for them for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Wake, Waker};

use engine::{Allocation, FlushStep, Turn, WritePlan, ZeroMode};
use qcow2::{GuestOffset, Version};
use strata_kit::ByteModel;
use strata_kit::model::{DiscardRule, Operation};

use crate::bench::{Bench, Files, check_references, image, whole};
use crate::reopen_and_compare;

/// Bytes of a cluster, and of the disk.
const CLUSTER: u64 = 1 << 10;
const SIZE: u64 = 300 * CLUSTER;

/// A disk of which some clusters are written, and where an early commit is expected for the next allocation.
fn used() -> (Bench, ByteModel) {
    let mut bench = Bench::open(Files(vec![image(Version::V3, whole(10), SIZE, false)]));
    let mut model = ByteModel::new(SIZE, CLUSTER, DiscardRule::ZeroesClusters);
    // From then on a reservation, whose counts are written first, provides all clusters for the rest of the test.
    let fill = [128, 160].map(|cluster| (cluster, 32));
    for (cluster, clusters) in fill.into_iter().chain([(0, 1), (1, 1), (2, 1)]) {
        write(&mut bench, &mut model, cluster, clusters);
        if clusters == 1 || cluster == 160 {
            bench.flush().expect("a flush");
        }
    }
    (bench, model)
}

fn write(bench: &mut Bench, model: &mut ByteModel, cluster: u64, clusters: u64) {
    let (offset, length) = (cluster * CLUSTER, (clusters * CLUSTER) as u32);
    bench.apply(&Operation::Write { offset, length: length.into(), seed: cluster as u32 }, model);
}

fn plan(bench: &mut Bench, cluster: u64, clusters: u64) -> Allocation {
    let turn = Turn::default();
    let (offset, length) = (GuestOffset(cluster * CLUSTER), clusters * CLUSTER);
    // As the disk does: the map must know that the guest reads zeros there, or no link is written early.
    bench.read(offset.0, length);
    let plan = bench.ask_in_turn(&turn, |engine, waker| engine.plan_write(offset, length, &turn, waker));
    match plan.expect("a plan") {
        WritePlan::Allocate(new) => new,
        plan => panic!("cluster {cluster} has a place already: {plan:?}"),
    }
}

/// Closes the disk cleanly; then no cluster is counted that nothing names.
fn close(mut bench: Bench, model: &ByteModel) {
    bench.flush().expect("a flush");
    bench.flush().expect("a flush of the counts of reclaimed clusters");
    bench.ask(|engine, waker| engine.release_windows(waker)).expect("no request is in flight");
    bench.flush().expect("a flush");
    assert_eq!(bench.engine.status().quarantined_clusters, 0, "everything is reclaimed");
    assert_eq!(check_references(&bench.files.0[0]), [] as [usize; 0], "a cluster leaks");
    reopen_and_compare(&bench.files, model);
}

/// The steps of a write after which its allocation is dropped.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Step {
    Planned,
    DataWritten,
    LinkBegun,
    LinkFailed,
}

fn take_until(bench: &mut Bench, new: &mut Allocation, last: Step) {
    if last >= Step::DataWritten {
        bench.files.write_data(new.offset.0, &vec![0xee; (new.head + new.length + new.tail) as usize]);
    }
    if last >= Step::LinkBegun {
        let link = bench.engine.link_early(new).expect("a flush is expected");
        bench.files.write(link.offset.0, &link.bytes);
    }
    if last >= Step::LinkFailed {
        bench.engine.link_failed(new);
    }
}

#[test]
fn an_allocation_dropped_after_any_step_leaves_nothing_behind() {
    for step in [Step::Planned, Step::DataWritten, Step::LinkBegun, Step::LinkFailed] {
        for elsewhere in [false, true] {
            let (mut bench, mut model) = used();
            let before = bench.engine.status().quarantined_clusters;
            let mut new = plan(&mut bench, 10, 1);
            take_until(&mut bench, &mut new, step);
            if elsewhere {
                std::thread::spawn(move || drop(new)).join().expect("no panic");
            } else {
                drop(new);
            }
            assert_eq!(bench.engine.status().quarantined_clusters, before + 1, "{step:?}");
            write(&mut bench, &mut model, 10, 1);
            close(bench, &model);
        }
    }
}

#[test]
fn every_second_allocation_is_dropped() {
    let (mut bench, mut model) = used();
    for cluster in 10..60 {
        drop(plan(&mut bench, cluster, 3));
        write(&mut bench, &mut model, cluster, 1);
    }
    close(bench, &model);
}

/// An allocation in a place that the entry names already has no new cluster.
#[test]
fn a_dropped_allocation_in_a_zeroed_cluster_frees_nothing() {
    let (mut bench, mut model) = used();
    bench.zero(CLUSTER, CLUSTER, ZeroMode::Keep).expect("zeroes");
    model.apply(&Operation::WriteZeroes { offset: CLUSTER, length: CLUSTER, unmap: false });
    let before = bench.engine.status().quarantined_clusters;
    drop(plan(&mut bench, 1, 1));
    assert_eq!(bench.engine.status().quarantined_clusters, before);
    write(&mut bench, &mut model, 1, 1);
    close(bench, &model);
}

/// Threads drop allocations while another has the engine's lock again and again.
#[test]
fn allocations_dropped_beside_the_lock_all_come_back() {
    let (mut bench, model) = used();
    let before = bench.engine.status().quarantined_clusters;
    let mut new: Vec<Allocation> = (20..120).map(|cluster| plan(&mut bench, cluster, 1)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let engine = &bench.engine;
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                engine.status();
            }
        });
        let droppers: Vec<_> = (0..4).map(|_| new.split_off(new.len() - 25)).collect();
        let droppers: Vec<_> = droppers.into_iter().map(|some| scope.spawn(move || drop(some))).collect();
        droppers.into_iter().for_each(|dropper| dropper.join().expect("no panic"));
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(bench.engine.status().quarantined_clusters, before + 100);
    close(bench, &model);
}

#[derive(Default)]
struct Counted(AtomicU32);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_flush_that_waits_for_an_early_commit_goes_on_when_that_is_dropped() {
    let (mut bench, model) = used();
    let mut new = plan(&mut bench, 10, 1);
    take_until(&mut bench, &mut new, Step::LinkBegun);
    let task = Arc::new(Counted::default());
    let waker = Waker::from(Arc::clone(&task));
    let ticket = bench.engine.begin_flush().expect("a ticket");
    let step = bench.engine.plan_flush(ticket, &waker).expect("a step");
    assert!(matches!(step, FlushStep::Wait), "{step:?}");
    drop(new);
    assert_eq!(task.0.load(Ordering::Relaxed), 1, "the flush is woken");
    close(bench, &model);
}
