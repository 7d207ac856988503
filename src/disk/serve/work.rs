//! Bounds the work of the requests off the fast path, so that what a stop of a ring has to wait for is bounded.
//!
//! Owns the count of that work: of each queue, and of the whole disk. Work is counted in bytes that the host or a
//! processor may have to move. The estimate is made before any table is read, so it is the worst case: a read of 512
//! bytes may inflate a whole cluster, a write may copy one. It delays no request: whoever submits asks for room first.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::Request;
use engine::{Engine, Mapping};
use qcow2::GuestOffset;
use storage::Storage;

use crate::bounds::{WORK_BYTES, WORK_BYTES_OF_A_QUEUE};
use crate::layer::Layer;
use crate::range::ByteRange;
use crate::serve::zero_route::ZeroRoute;
use crate::shared::Shared;

/// The least work of an operation at the host, of its call and its completion.
const OPERATION_BYTES: u64 = 4096;
/// The most clusters of a request that are looked up for its estimate.
const LOOKUPS: u64 = 8;
/// A byte of zeros around a write into a new cluster weighs this fraction (one in so many). Mostly the host's file reads as
/// zero there, and nothing is written. Where it does not (space that could not be given back), nothing is read or inflated.
const ZEROS_SHARE: u64 = 16;

/// How much work a request on a chain may be.
#[derive(Clone, Copy, Debug)]
struct Scale {
    /// Bytes of the largest cluster of all layers: one read may inflate it, one write may copy it.
    largest: u64,
    /// Bytes of the smallest cluster or subcluster: each may lie somewhere else in a file.
    smallest: u64,
    /// Reading a table of each layer.
    tables: u64,
    /// Ranges of zeros may be written as data.
    zeros_are_data: bool,
    /// A write to a range that reads as zero gets new clusters. Elsewhere a cluster may keep its place, with older data in
    /// it, and then zeros are written around the write.
    new_places: bool,
}

impl Scale {
    fn of(layers: &[Layer], zeros_are_data: bool, route: ZeroRoute) -> Self {
        let geometries =
            || layers.iter().filter_map(|layer| layer.header.as_ref()).map(|header| header.geometry());
        Scale {
            largest: geometries().map(|geometry| geometry.cluster_size()).max().unwrap_or(512),
            // No piece of a raw file is anywhere else.
            smallest: geometries().map(|geometry| geometry.granule_size()).min().unwrap_or(u64::MAX),
            tables: geometries().count() as u64 * OPERATION_BYTES,
            zeros_are_data,
            new_places: route == ZeroRoute::Tables,
        }
    }

    /// The most work of moving the data of a range whose clusters may be anywhere.
    fn of_data(&self, range: ByteRange) -> u64 {
        let around = range.around_blocks(self.largest);
        let operations = range.length / self.smallest + 2;
        around.length.max(operations * OPERATION_BYTES) + self.tables
    }

    /// The work of writing a range that reads as zero: its clusters may be new, and zeros may be written around it.
    fn of_new(&self, range: ByteRange) -> u64 {
        let zeros = range.around_blocks(self.largest).length - range.length;
        let operations = range.length / self.smallest + 2;
        (range.length + zeros / ZEROS_SHARE).max(operations * OPERATION_BYTES) + self.tables
    }

    /// The most work of a change of tables, and of the ragged ends of its range.
    fn of_zeros(&self, range: ByteRange) -> u64 {
        let whole = range.whole_blocks(self.smallest.min(self.largest));
        let ragged = if whole == range { 0 } else { 2 * self.largest };
        let data = if self.zeros_are_data { range.around_blocks(self.largest).length } else { 0 };
        ragged + data + self.tables
    }
}

/// The work that one queue's requests have in flight, and that of its disk.
#[derive(Debug)]
pub(crate) struct WorkMeter {
    scale: Scale,
    own: Cell<u64>,
    /// Relaxed: it orders nothing.
    total: Arc<AtomicU64>,
}

impl WorkMeter {
    /// A meter without work for a queue of this disk.
    pub fn new<S: Storage>(shared: &Shared<S>) -> Rc<Self> {
        let scale = Scale::of(&shared.layers, shared.zeros_are_data(), shared.zero_route);
        Rc::new(WorkMeter { scale, own: Cell::new(0), total: Arc::clone(&shared.work) })
    }

    /// Whether one more request may be submitted. If not, the end of one of this queue's own requests changes that, so
    /// no queue waits for another.
    pub fn has_room(&self) -> bool {
        self.own.get() < WORK_BYTES_OF_A_QUEUE || self.total.load(Ordering::Relaxed) < WORK_BYTES
    }

    /// Counts the work of a request about this range, until the result is dropped.
    pub fn count(self: &Rc<Self>, engine: &Engine, request: &Request, range: Option<ByteRange>) -> Work {
        let bytes = range.map_or(0, |range| self.estimate(engine, request, range));
        self.own.set(self.own.get() + bytes);
        self.total.fetch_add(bytes, Ordering::Relaxed);
        Work { meter: Rc::clone(self), bytes }
    }

    fn estimate(&self, engine: &Engine, request: &Request, range: ByteRange) -> u64 {
        match request {
            Request::Discard { .. } | Request::WriteZeroes { .. } => self.scale.of_zeros(range),
            _ if all_are(engine, range, |mapping| is_in_place(mapping, request.writes())) => range.length,
            _ if self.is_light(engine, request, range) => self.scale.of_new(range),
            _ => self.scale.of_data(range),
        }
    }

    /// Whether a request is a write that neither copies data nor, mostly, writes zeros around its own bytes.
    fn is_light(&self, engine: &Engine, request: &Request, range: ByteRange) -> bool {
        request.writes() && self.scale.new_places && all_are(engine, range, is_copied_from_nowhere)
    }
}

/// Whether a short range is known to consist of clusters like this.
fn all_are(engine: &Engine, range: ByteRange, fits: impl Fn(Mapping) -> bool) -> bool {
    let clusters = range.around_blocks(engine.unit());
    clusters.length / engine.unit() <= LOOKUPS
        && clusters.pieces(engine.unit()).all(|cluster| fits(engine.lookup(GuestOffset(cluster.offset))))
}

/// Whether a request needs no more than its own bytes of a cluster: its memory is unfit for direct I/O, perhaps.
fn is_in_place(mapping: Mapping, writes: bool) -> bool {
    match mapping {
        Mapping::Zero => !writes,
        Mapping::Data { in_place, .. } => in_place || !writes,
        _ => false,
    }
}

/// Whether a write to a part of a cluster reads nothing for the rest of it.
fn is_copied_from_nowhere(mapping: Mapping) -> bool {
    matches!(mapping, Mapping::Zero | Mapping::Data { in_place: true, .. })
}

/// The counted work of a request, until dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Work {
    meter: Rc<WorkMeter>,
    bytes: u64,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.meter.own.set(self.meter.own.get() - self.bytes);
        self.meter.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter(total: &Arc<AtomicU64>) -> Rc<WorkMeter> {
        let (largest, smallest, tables) = (1 << 16, 1 << 16, 8192);
        let scale = Scale { largest, smallest, tables, zeros_are_data: false, new_places: true };
        Rc::new(WorkMeter { scale, own: Cell::new(0), total: Arc::clone(total) })
    }

    fn work(meter: &Rc<WorkMeter>, bytes: u64) -> Work {
        meter.own.set(meter.own.get() + bytes);
        meter.total.fetch_add(bytes, Ordering::Relaxed);
        Work { meter: Rc::clone(meter), bytes }
    }

    #[test]
    fn a_busy_disk_leaves_each_queue_a_little() {
        let total = Arc::default();
        let (first, second) = (meter(&total), meter(&total));
        let all = work(&first, WORK_BYTES);
        assert!(!first.has_room() && second.has_room(), "a queue without work may always begin");
        let some = work(&second, WORK_BYTES_OF_A_QUEUE);
        assert!(!second.has_room());
        drop(all);
        assert!(first.has_room() && second.has_room());
        drop(some);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn small_requests_may_be_much_work() {
        const K: u64 = 1024;
        let scale = meter(&Arc::default()).scale;
        let range = |offset, length| ByteRange::new(offset, length);
        assert_eq!(scale.of_data(range(512, 512)), 64 * K + scale.tables);
        assert_eq!(scale.of_data(range(64 * K - 512, 1024)), 128 * K + scale.tables, "two clusters");
        assert_eq!(scale.of_data(range(64 * K, 256 * K)), 256 * K + scale.tables);
        assert_eq!(scale.of_new(range(0, 256 * K)), 256 * K + scale.tables, "no zeros around");
        let large = Scale { largest: 2 << 20, smallest: 2 << 20, ..scale };
        assert_eq!(large.of_data(range(0, 4096)), (2 << 20) + scale.tables);
        assert_eq!(large.of_new(range(0, 4096)), 4096 + ((2 << 20) - 4096) / 16 + scale.tables);
        assert_eq!(scale.of_zeros(range(64 * K, 64 << 20)), scale.tables, "tables alone");
        assert_eq!(scale.of_zeros(range(512, 64 << 20)), 128 * K + scale.tables, "its ends are copied");
        let as_data = Scale { zeros_are_data: true, ..scale };
        assert_eq!(as_data.of_zeros(range(64 * K, 2 << 20)), (2 << 20) + scale.tables);
        let tiny = Scale { largest: 512, smallest: 512, tables: 0, ..scale };
        assert_eq!(tiny.of_data(range(0, 64 * K)), 130 * OPERATION_BYTES, "each cluster is an operation");
    }
}
