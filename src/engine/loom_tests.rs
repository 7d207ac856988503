//! Models of state that threads share without the engine's lock. Loom runs each model once for every interleaving, and
//! for every value that a load may return by the memory model. Each argument in docs/concurrency.md has a model here,
//! on the engine's own code. For loom, sync.rs replaces the atomics, and map.rs makes slices short.
//!
//!     RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p engine --profile loom --lib loom
//!
//! Loom treats a SeqCst access as an acquire or a release, so code that passes here needs SeqCst for its fences only.
//! It orders two SeqCst fences as if the first released to the second, which is more than they guarantee. A missing
//! acquire or release that such a pair happens to cover is not detected.

mod claims;
mod dropped;
mod idle;
mod runs;
mod turns;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Unmodelled;
use std::task::{Poll, Waker};

use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::model::Builder;
use loom::thread;
use qcow2::{GuestCluster, HostCluster, HostOffset};

use crate::alloc::Allocator;
use crate::bounds::MAP_SLICE_WORDS as SLICE_WORDS;
use crate::epoch::{Epochs, WorkerEpochs};
use crate::map::{ChainMap, MapWriter, SliceIndex, SubclusterMap};
use crate::quarantine::Reclaimed;
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::waiters::{WakeFlag, WakeList};
use crate::word::{FileIndex, Word};

/// Runs a model in all interleavings with at most `preemptions` preemptions (`None`: in all interleavings).
/// `LOOM_MAX_PREEMPTIONS` overrides the limit, and `LOOM_LOG=1` shows the steps that led to a failure.
fn explore(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.max_branches = 20_000;
    let runs = Arc::new(Unmodelled::new(0));
    let counted = Arc::clone(&runs);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} interleavings", runs.load(Ordering::Relaxed));
}

/// The word of a cluster before anything changes it.
fn word(cluster: u64) -> Word {
    Word::data(FileIndex(0), HostOffset((cluster + 1) * 65536), true)
}

fn words(slice: u64) -> Vec<Word> {
    (0..SLICE_WORDS).map(|at| word(slice * SLICE_WORDS + at)).collect()
}

/// A cluster size in bytes for which the words above are no run.
const APART: u32 = 9;

/// A map of some slices and frames, with the first slices resident.
fn map(slices: u64, frames: usize, resident: u64) -> (Arc<ChainMap>, MapWriter) {
    let map = ChainMap::new(slices * SLICE_WORDS, APART, frames, false);
    let mut writer = MapWriter::new();
    for slice in 0..resident {
        writer.fill(&map, SliceIndex(slice), &words(slice));
    }
    (Arc::new(map), writer)
}

// "The map without a lock".

/// Looks up a cluster in a thread of its own. It may be absent, but must not have another cluster's word.
fn reader(map: &Arc<ChainMap>, cluster: u64) -> thread::JoinHandle<()> {
    let map = Arc::clone(map);
    thread::spawn(move || {
        let found = map.lookup(GuestCluster(cluster));
        assert!(found == Word::UNRESOLVED || found == word(cluster), "{found:?} for cluster {cluster}");
    })
}

#[test]
fn one_frame_goes_from_slice_to_slice_and_back() {
    explore(None, || {
        let (map, mut writer) = map(2, 1, 1);
        let reader = reader(&map, 1);
        writer.fill(&map, SliceIndex(1), &words(1));
        writer.fill(&map, SliceIndex(0), &words(0));
        reader.join().expect("reader");
    });
}

#[test]
fn two_readers_of_two_slices_in_one_frame() {
    explore(Some(3), || {
        let (map, mut writer) = map(2, 1, 1);
        let readers = [reader(&map, 0), reader(&map, SLICE_WORDS)];
        writer.fill(&map, SliceIndex(1), &words(1));
        for reader in readers {
            reader.join().expect("reader");
        }
    });
}

#[test]
fn two_readers_while_the_clock_turns_over_two_frames() {
    explore(Some(2), || {
        let (map, mut writer) = map(3, 2, 2);
        let readers = [reader(&map, 0), reader(&map, 2 * SLICE_WORDS + 1)];
        writer.fill(&map, SliceIndex(2), &words(2));
        writer.fill(&map, SliceIndex(0), &words(0));
        for reader in readers {
            reader.join().expect("reader");
        }
    });
}

/// The words of a cluster of subclusters in host cluster `host`. Its second word holds `host`, too.
fn split(host: u64) -> (Word, SubclusterMap) {
    (Word::subclusters(FileIndex(0), HostOffset(host * 65536), true), SubclusterMap(host))
}

/// A map of some slices and one frame; its first cluster has subclusters in host cluster 1.
fn split_map(slices: u64) -> (Arc<ChainMap>, MapWriter) {
    let map = ChainMap::new(slices * SLICE_WORDS, 16, 1, true);
    let mut writer = MapWriter::new();
    fill_split(&mut writer, &map, 0, 1);
    (Arc::new(map), writer)
}

fn fill_split(writer: &mut MapWriter, map: &ChainMap, slice: u64, host: u64) {
    let (words, subclusters): (Vec<_>, Vec<_>) = [split(host), split(host + 10)].into_iter().unzip();
    writer.fill_with_seconds(map, SliceIndex(slice), &words, &subclusters);
}

/// Looks up the words of a cluster in a thread of its own: both must belong to the same one of `hosts`.
fn split_reader(map: &Arc<ChainMap>, cluster: u64, hosts: &'static [u64]) -> thread::JoinHandle<()> {
    let map = Arc::clone(map);
    thread::spawn(move || {
        let found = map.lookup_subclusters(GuestCluster(cluster));
        let known = hosts.iter().any(|host| found == Some(split(*host)));
        assert!(found.is_none() || known, "{found:?} for cluster {cluster}");
    })
}

#[test]
fn no_word_is_joined_with_the_second_word_of_another_host_cluster() {
    explore(None, || {
        let (map, mut writer) = split_map(1);
        let reader = split_reader(&map, 0, &[1, 2]);
        let (word, subclusters) = split(2);
        writer.publish(&map, GuestCluster(0), word, subclusters);
        reader.join().expect("reader");
    });
}

#[test]
fn a_cluster_that_was_whole_for_a_while_keeps_its_own_second_word() {
    explore(None, || {
        let (map, mut writer) = split_map(1);
        let reader = split_reader(&map, 0, &[1, 2]);
        writer.publish(&map, GuestCluster(0), word(0), SubclusterMap::default());
        let (second, subclusters) = split(2);
        writer.publish(&map, GuestCluster(0), second, subclusters);
        reader.join().expect("reader");
    });
}

#[test]
fn second_words_of_two_slices_in_one_frame_are_not_mixed_up() {
    explore(Some(2), || {
        let (map, mut writer) = split_map(2);
        let reader = split_reader(&map, 0, &[1]);
        fill_split(&mut writer, &map, 1, 5);
        reader.join().expect("reader");
    });
}

#[test]
fn subclusters_are_published_by_their_word_alone() {
    explore(None, || {
        let (map, mut writer) = split_map(1);
        let reading = Arc::clone(&map);
        let reader = thread::spawn(move || {
            let (word, subclusters) =
                reading.lookup_subclusters(GuestCluster(0)).expect("it is always there");
            assert!(word == split(1).0 && (1..=3).contains(&subclusters.0), "{subclusters:?}");
            subclusters.0
        });
        for subclusters in [2, 3] {
            writer.publish(&map, GuestCluster(0), split(1).0, SubclusterMap(subclusters));
        }
        reader.join().expect("reader");
    });
}

#[test]
fn a_first_fill_makes_leaf_and_frame_while_a_reader_looks() {
    explore(None, || {
        let (map, mut writer) = map(2, 1, 0);
        let readers = [reader(&map, 0), reader(&map, 1)];
        writer.fill(&map, SliceIndex(0), &words(0));
        for reader in readers {
            reader.join().expect("reader");
        }
    });
}

/// A slice is filled with fewer words than it has: the rest is unresolved, and not the frame's old words.
#[test]
fn a_short_fill_leaves_nothing_of_the_slice_before() {
    explore(None, || {
        let (map, mut writer) = map(2, 1, 1);
        let reader = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                assert_eq!(map.lookup(GuestCluster(SLICE_WORDS + 1)), Word::UNRESOLVED);
            })
        };
        writer.fill(&map, SliceIndex(1), &words(1)[..1]);
        reader.join().expect("reader");
    });
}

/// A commit is made after the data was written: a reader that sees the new word sees the data. And a reader that has
/// seen the new word never sees the old one again, even if the slice is evicted and filled again.
#[test]
fn a_committed_word_brings_its_data_and_stays() {
    explore(Some(3), || {
        let new = word(77);
        let (map, mut writer) = map(2, 1, 1);
        let data = Arc::new(UnsafeCell::new(()));
        let reader = {
            let (map, data) = (Arc::clone(&map), Arc::clone(&data));
            thread::spawn(move || {
                let first = map.lookup(GuestCluster(0));
                if first == new {
                    data.with(|_| ());
                }
                let second = map.lookup(GuestCluster(0));
                assert!([Word::UNRESOLVED, word(0), new].contains(&second));
                assert!(first != new || second != word(0), "a commit was undone");
            })
        };
        data.with_mut(|_| ());
        writer.publish(&map, GuestCluster(0), new, SubclusterMap::default());
        writer.fill(&map, SliceIndex(1), &words(1));
        writer.fill(&map, SliceIndex(0), &[new, word(1)]);
        reader.join().expect("reader");
    });
}

/// A word is published (not filled) in a frame that another slice had before: that slice's readers never see it.
#[test]
fn a_commit_into_a_frame_that_went_over_is_not_seen_by_the_slice_before() {
    explore(Some(3), || {
        let (map, mut writer) = map(2, 1, 1);
        let reader = reader(&map, 0);
        writer.fill(&map, SliceIndex(1), &words(1));
        writer.publish(&map, GuestCluster(SLICE_WORDS), word(77), SubclusterMap::default());
        reader.join().expect("reader");
    });
}

// "Epochs". A cell stands for the host cluster of guest cluster 0. I/O there is a shared access, and its reuse an
// exclusive one. Loom fails a run in which the two are not ordered.

type HostData = Arc<UnsafeCell<()>>;

/// The second stage of a request: I/O at the old place of cluster 0, if the map still names it.
fn io_in_place(map: &ChainMap, host: &UnsafeCell<()>) {
    if map.lookup(GuestCluster(0)) == word(0) {
        host.with(|_| ());
    }
}

fn request(worker: &mut WorkerEpochs, map: &ChainMap, host: &UnsafeCell<()>) {
    let epoch = worker.enter();
    io_in_place(map, host);
    worker.exit(epoch);
}

/// A disk with cluster 0 mapped. Its only reclaimer unlinks, advances the epoch, scans and reuses.
struct Bench {
    map: Arc<ChainMap>,
    writer: MapWriter,
    epochs: Arc<Epochs>,
    host: HostData,
}

impl Bench {
    fn new(workers: usize) -> Self {
        Self::over(map(1, 1, 1), workers)
    }

    fn over((map, writer): (Arc<ChainMap>, MapWriter), workers: usize) -> Self {
        Bench { map, writer, epochs: Epochs::new(workers), host: Arc::new(UnsafeCell::new(())) }
    }

    /// Runs `requests` in a thread, with a worker that was registered before or that the thread registers.
    fn worker(
        &self,
        registered: Option<WorkerEpochs>,
        requests: impl Fn(&mut WorkerEpochs, &ChainMap, &UnsafeCell<()>) + 'static,
    ) -> thread::JoinHandle<()> {
        let (map, epochs, host) = (Arc::clone(&self.map), Arc::clone(&self.epochs), Arc::clone(&self.host));
        thread::spawn(move || {
            if let Some(mut worker) = registered.or_else(|| epochs.register()) {
                requests(&mut worker, &map, &host);
            }
        })
    }

    fn reclaim(&mut self) {
        self.writer.publish(&self.map, GuestCluster(0), Word::ZERO, SubclusterMap::default());
        let epoch = self.epochs.advance();
        if self.epochs.passed(epoch) {
            self.host.with_mut(|_| ());
        }
    }
}

#[test]
fn an_idle_workers_request_keeps_its_cluster_from_reuse() {
    explore(None, || {
        let mut bench = Bench::new(1);
        let worker = bench.epochs.register();
        let worker = bench.worker(worker, request);
        bench.reclaim();
        worker.join().expect("worker");
    });
}

/// The second request may begin in the new epoch, and publishing that overwrites the withdrawal of the first.
#[test]
fn a_worker_that_goes_idle_between_two_requests_keeps_both() {
    explore(None, || {
        let mut bench = Bench::new(1);
        let worker = bench.epochs.register();
        let worker = bench.worker(worker, |worker, map, host| {
            request(worker, map, host);
            request(worker, map, host);
        });
        bench.reclaim();
        worker.join().expect("worker");
    });
}

/// The second request of a busy worker publishes nothing: the epoch of the first protects both.
#[test]
fn a_busy_workers_later_requests_are_kept_too() {
    explore(None, || {
        let mut bench = Bench::new(1);
        let worker = bench.epochs.register();
        let worker = bench.worker(worker, |worker, map, host| {
            let first = worker.enter();
            let second = worker.enter();
            io_in_place(map, host);
            worker.exit(first);
            io_in_place(map, host);
            worker.exit(second);
        });
        bench.reclaim();
        worker.join().expect("worker");
    });
}

/// The later request ends first: the epoch of the older one stays published.
#[test]
fn requests_that_end_out_of_order_keep_the_oldest() {
    explore(None, || {
        let mut bench = Bench::new(1);
        let worker = bench.epochs.register();
        let worker = bench.worker(worker, |worker, map, host| {
            let first = worker.enter();
            let old = map.lookup(GuestCluster(0)) == word(0);
            request(worker, map, host);
            if old {
                host.with(|_| ());
            }
            worker.exit(first);
        });
        bench.reclaim();
        worker.join().expect("worker");
    });
}

/// Requests of three epochs at once: when the oldest ends, the middle epoch is published, not the newest.
#[test]
fn of_three_epochs_the_middle_one_is_published_next() {
    explore(Some(3), || {
        let mut bench = Bench::new(1);
        let worker = bench.epochs.register();
        let worker = bench.worker(worker, |worker, map, host| {
            let first = worker.enter();
            let second = worker.enter();
            let old = map.lookup(GuestCluster(0)) == word(0);
            let third = worker.enter();
            worker.exit(first);
            if old {
                host.with(|_| ());
            }
            worker.exit(second);
            worker.exit(third);
        });
        // A cut that covers no unlink.
        bench.epochs.advance();
        bench.reclaim();
        worker.join().expect("worker");
    });
}

#[test]
fn two_workers_are_both_waited_for() {
    explore(Some(3), || {
        let mut bench = Bench::new(2);
        let (one, two) = (bench.epochs.register(), bench.epochs.register());
        let workers = [bench.worker(one, request), bench.worker(two, request)];
        bench.reclaim();
        for worker in workers {
            worker.join().expect("worker");
        }
    });
}

/// A ring stops and another starts: the second gets the slot of the first.
#[test]
fn a_slot_that_changes_hands_forgets_no_io() {
    explore(Some(3), || {
        let mut bench = Bench::new(1);
        let workers = [bench.worker(None, request), bench.worker(None, request)];
        bench.reclaim();
        for worker in workers {
            worker.join().expect("worker");
        }
    });
}

// The quarantine, with the real allocator, epochs and map. One mutex stands for the engine's lock.

struct Locked {
    alloc: Allocator,
    writer: MapWriter,
    next_cut: u64,
}

/// One thread does I/O in place, and one unlinks the cluster. A third takes a cut, makes it durable, reclaims and
/// reuses. The cut may come before or after the unlink, and no reuse may overlap the I/O.
#[test]
fn a_cluster_in_quarantine_is_reused_after_its_cut_and_its_io() {
    explore(Some(3), || {
        let Bench { map, writer, epochs, host } = Bench::new(1);
        let locked = Locked { alloc: Allocator::for_test(9), writer, next_cut: 1 };
        let state = Arc::new(Mutex::new(locked));
        let mut worker = epochs.register().expect("a slot");
        let doing_io = {
            let (map, host) = (Arc::clone(&map), Arc::clone(&host));
            thread::spawn(move || request(&mut worker, &map, &host))
        };
        let unlinking = {
            let (map, state) = (Arc::clone(&map), Arc::clone(&state));
            thread::spawn(move || {
                let mut state = state.lock().expect("lock");
                let cut = state.next_cut;
                state.writer.publish(&map, GuestCluster(0), Word::ZERO, SubclusterMap::default());
                state.alloc.free_later(HostCluster(1), cut);
            })
        };
        for _ in 0..2 {
            flush_and_reuse(&state, &epochs, &host);
        }
        doing_io.join().expect("request");
        unlinking.join().expect("unlink");
        let state = state.lock().expect("lock");
        assert!(state.alloc.quarantine().held_back().clusters <= 1);
    });
}

/// A cut, as in the engine's flush: the number and the epoch under the lock, then the commit under the lock again.
fn flush_and_reuse(state: &Mutex<Locked>, epochs: &Epochs, host: &UnsafeCell<()>) {
    let (number, epoch) = {
        let mut state = state.lock().expect("lock");
        let number = state.next_cut;
        state.next_cut += 1;
        (number, epochs.advance())
    };
    let mut state = state.lock().expect("lock");
    let quarantine = state.alloc.quarantine_mut();
    quarantine.cut_is_durable(number, epoch);
    let reclaimed = quarantine.unlinked(1).front().is_some_and(|unlinked| epochs.passed(unlinked.epoch));
    if reclaimed {
        quarantine.begin_reclaim(1);
        quarantine.end_reclaim(Reclaimed { clusters: 1, freed: 1 }, &mut WakeList::default());
        host.with_mut(|_| ());
    }
}

// Wake-ups: one flag per task, so that many wakes cause one poll.

/// Two threads each do some work for a task and then wake it; a third thread polls it. In the end, the last poll has
/// seen the work of both, and the task was never in the queue twice.
#[test]
fn no_wake_is_lost_between_two_polls() {
    explore(None, || {
        let task = Arc::new((WakeFlag::new(false), Mutex::new(0)));
        // Relaxed throughout: only the flag makes the work before a wake visible to a poll.
        let work = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let wake = |own: usize| {
            let (task, work) = (Arc::clone(&task), Arc::clone(&work));
            thread::spawn(move || {
                work[own].store(1, Ordering::Relaxed);
                if task.0.raise() {
                    *task.1.lock().expect("no panic under this lock") += 1;
                }
            })
        };
        let mut seen = 0;
        let mut poll = || {
            let queued = std::mem::take(&mut *task.1.lock().expect("no panic under this lock"));
            assert!(queued <= 1, "once in the queue, however often it is woken");
            if queued == 1 {
                assert!(task.0.lower(), "what is in the queue was woken");
                seen = work.iter().map(|done| done.load(Ordering::Relaxed)).sum();
            }
        };
        let wakers = [wake(0), wake(1)];
        poll();
        poll();
        for waker in wakers {
            waker.join().expect("waker");
        }
        poll();
        assert_eq!(seen, 2, "a wake was lost");
        assert!(!task.0.is_raised(), "a raised flag stands for a place in the queue");
    });
}
