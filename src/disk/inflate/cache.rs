//! The inflated clusters of a disk that were used last, and those being inflated now.
//!
//! Bounded in bytes. One request at a time inflates a cluster; others that need it wait for that one. Entries of the
//! top image are removed before their host space can hold anything new: see [`Cache::forget`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use engine::{CompressedCluster, FileIndex};
use qcow2::{HostOffset, HostRange};
use storage::Errno;

use crate::error::RequestError;

/// The rough size of an entry besides the cluster's bytes.
const ENTRY_BYTES: usize = 256;
/// The farthest that the data of a compressed cluster reaches from its first byte: two of the largest clusters.
const DATA_BYTES_MAX: u64 = 4 << 20;

/// An inflated cluster.
pub(crate) type Inflated = Arc<Vec<u8>>;
type Outcome = Result<Inflated, RequestError>;

pub(crate) struct Cache {
    /// Leaf lock.
    state: Mutex<State>,
    bytes_max: usize,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<CompressedCluster, Entry>,
    /// The inflated entries by their last use.
    by_use: BTreeMap<u64, CompressedCluster>,
    uses: u64,
    bytes: usize,
}

enum Entry {
    Here { bytes: Inflated, used: u64 },
    Coming(Arc<Flight>),
}

/// A cluster being inflated.
struct Flight {
    /// Leaf lock.
    state: Mutex<FlightState>,
}

#[derive(Default)]
struct FlightState {
    outcome: Option<Outcome>,
    waiters: Vec<Waker>,
}

/// The state of a cluster in the cache.
pub(crate) enum Found<'a> {
    Here(Inflated),
    /// Another request inflates it: wait for that.
    Coming(Coming),
    /// No request inflates it: the caller must inflate it, and report the outcome.
    Yours(Lease<'a>),
}

/// A wait for another request's inflating.
pub(crate) struct Coming(Arc<Flight>);

/// The sole right, and the duty, to inflate a cluster. If it is dropped without an outcome, the waiting requests
/// fail.
#[must_use]
pub(crate) struct Lease<'a> {
    cache: &'a Cache,
    cluster: CompressedCluster,
    flight: Arc<Flight>,
}

impl Cache {
    /// An empty cache for at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Cache { state: Mutex::default(), bytes_max }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }

    /// Looks up a cluster.
    pub fn find(&self, cluster: CompressedCluster) -> Found<'_> {
        let mut state = self.lock();
        let State { entries, by_use, uses, .. } = &mut *state;
        match entries.get_mut(&cluster) {
            Some(Entry::Here { bytes, used }) => {
                by_use.remove(used);
                *uses += 1;
                *used = *uses;
                by_use.insert(*used, cluster);
                Found::Here(Arc::clone(bytes))
            }
            Some(Entry::Coming(flight)) => Found::Coming(Coming(Arc::clone(flight))),
            None => {
                let flight = Arc::new(Flight { state: Mutex::default() });
                entries.insert(cluster, Entry::Coming(Arc::clone(&flight)));
                Found::Yours(Lease { cache: self, cluster, flight })
            }
        }
    }

    /// Removes entries that overlap a range of a file. Call this before the range can hold anything new, and after
    /// the last request that knew its old contents has ended.
    pub fn forget(&self, file: FileIndex, range: HostRange) {
        let mut state = self.lock();
        let start = range.offset.0;
        let end = start.saturating_add(range.length);
        let at = |offset| CompressedCluster { file, offset: HostOffset(offset), length: 0 };
        let near = state.entries.range(at(start.saturating_sub(DATA_BYTES_MAX))..at(end));
        let over: Vec<CompressedCluster> =
            near.map(|(cluster, _)| *cluster).filter(|at| at.offset.0 + at.length > start).collect();
        for cluster in over {
            state.remove(cluster);
        }
    }

    /// Bytes in the cache.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

impl State {
    fn remove(&mut self, cluster: CompressedCluster) {
        if let Some(Entry::Here { bytes, used }) = self.entries.remove(&cluster) {
            self.by_use.remove(&used);
            self.bytes -= bytes.len() + ENTRY_BYTES;
        }
    }

    /// Adds a cluster, and evicts those that were not used for longest.
    fn keep(&mut self, cluster: CompressedCluster, bytes: Inflated, bytes_max: usize) {
        self.uses += 1;
        self.bytes += bytes.len() + ENTRY_BYTES;
        self.by_use.insert(self.uses, cluster);
        self.entries.insert(cluster, Entry::Here { bytes, used: self.uses });
        while self.bytes > bytes_max
            && let Some((_, oldest)) = self.by_use.first_key_value()
        {
            self.remove(*oldest);
        }
    }
}

impl Lease<'_> {
    /// Reports the outcome: the waiting requests get the same.
    pub fn done(self, outcome: &Outcome) {
        self.end(outcome.clone());
    }

    fn end(&self, outcome: Outcome) {
        let mut state = self.cache.lock();
        // If it was removed meanwhile, it is not cached.
        let ours =
            |entry: &Entry| matches!(entry, Entry::Coming(flight) if Arc::ptr_eq(flight, &self.flight));
        if state.entries.get(&self.cluster).is_some_and(ours) {
            state.entries.remove(&self.cluster);
            if let Ok(bytes) = &outcome {
                state.keep(self.cluster, Arc::clone(bytes), self.cache.bytes_max);
            }
        }
        drop(state);
        let mut flight = self.flight.lock();
        flight.outcome.get_or_insert(outcome);
        let waiters = std::mem::take(&mut flight.waiters);
        drop(flight);
        waiters.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.flight.lock().outcome.is_none() {
            self.end(Err(RequestError::Io { action: "inflating", source: Errno::EIO }));
        }
    }
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, FlightState> {
        self.state.lock().expect("no panic under this lock")
    }
}

impl Coming {
    /// Waits for the outcome.
    pub async fn outcome(self) -> Outcome {
        std::future::poll_fn(|context| {
            let mut state = self.0.lock();
            match &state.outcome {
                Some(outcome) => Poll::Ready(outcome.clone()),
                None => {
                    let waker = context.waker();
                    if !state.waiters.iter().any(|waiter| waiter.will_wake(waker)) {
                        state.waiters.push(waker.clone());
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::task::Context;

    use super::*;

    fn cluster(offset: u64) -> CompressedCluster {
        CompressedCluster { file: FileIndex(0), offset: HostOffset(offset), length: 600 }
    }

    fn bytes(n: u8) -> Inflated {
        Arc::new(vec![n; 4096])
    }

    fn put(cache: &Cache, offset: u64, n: u8) {
        let Found::Yours(lease) = cache.find(cluster(offset)) else { panic!("it is there") };
        lease.done(&Ok(bytes(n)));
    }

    fn has(cache: &Cache, offset: u64) -> bool {
        // A dropped lease leaves no entry.
        matches!(cache.find(cluster(offset)), Found::Here(_))
    }

    #[test]
    fn the_least_recently_used_cluster_is_evicted_first() {
        let cache = Cache::new(3 * (4096 + ENTRY_BYTES));
        for n in 0..3 {
            put(&cache, u64::from(n) * 1000, n);
        }
        assert!(has(&cache, 0));
        put(&cache, 5000, 5);
        assert!(has(&cache, 0) && has(&cache, 2000) && has(&cache, 5000) && !has(&cache, 1000));
        assert_eq!(cache.bytes(), 3 * (4096 + ENTRY_BYTES));
        let none = Cache::new(100);
        put(&none, 0, 0);
        assert!(!has(&none, 0) && none.bytes() == 0);
    }

    #[test]
    fn overlapping_clusters_are_forgotten() {
        let cache = Cache::new(1 << 20);
        for n in 0..10 {
            put(&cache, u64::from(n) * 1000, n);
        }
        cache.forget(FileIndex(0), HostRange::new(HostOffset(3600), 1400));
        cache.forget(FileIndex(1), HostRange::new(HostOffset(0), 1 << 20));
        let left: Vec<u64> = (0..10).filter(|n| has(&cache, n * 1000)).collect();
        assert_eq!(left, [0, 1, 2, 3, 5, 6, 7, 8, 9], "data 4000..4600 alone lies in 3600..5000");
        cache.forget(FileIndex(0), HostRange::new(HostOffset(3599), 1));
        assert!(!has(&cache, 3000) && has(&cache, 2000));
        // A cluster that is removed while it is being inflated is not cached.
        let Found::Yours(lease) = cache.find(cluster(4000)) else { panic!("it is there") };
        cache.forget(FileIndex(0), HostRange::new(HostOffset(4000), 512));
        lease.done(&Ok(bytes(1)));
        assert!(!has(&cache, 4000));
    }

    #[test]
    fn other_requests_wait_and_get_the_same_outcome() {
        let cache = Cache::new(1 << 20);
        let mut context = Context::from_waker(Waker::noop());
        for good in [true, false] {
            let Found::Yours(lease) = cache.find(cluster(0)) else { panic!("it is there") };
            let Found::Coming(coming) = cache.find(cluster(0)) else { panic!("no request inflates it") };
            let mut wait = std::pin::pin!(coming.outcome());
            assert!(wait.as_mut().poll(&mut context).is_pending());
            if good {
                lease.done(&Ok(bytes(3)));
            } else {
                drop(lease);
            }
            let Poll::Ready(outcome) = wait.as_mut().poll(&mut context) else { panic!("it is over") };
            assert_eq!(outcome.is_ok(), good);
            assert_eq!(has(&cache, 0), good);
            cache.forget(FileIndex(0), HostRange::new(HostOffset(0), 1));
        }
    }
}
