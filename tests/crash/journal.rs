//! The oracle: records the requests and results of a disk, and derives the allowed values of each sector after a crash.
//!
//! - A request is *settled* once a later flush is acknowledged, one submitted after the request was acknowledged. A
//!   write-through request is settled once it is acknowledged itself.
//! - A sector may hold its value from the start, or the value of any request submitted by then. A settled request rules
//!   out the start, and every request that had ended before the settled one was submitted.
//! - Requests in flight together may take effect in either order.
//! - A failed request may or may not have changed each of its sectors. It settles nothing.
//!
//! The oracle never reads the disk.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use storage_sim::Moment;

use super::shape::{Past, Shape};
use super::stamp::Value;

/// A change of an image, for which the disk is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Makes a snapshot of the disk.
    Create,
    /// Applies the oldest snapshot to the disk.
    Apply,
    /// Deletes the oldest snapshot.
    Delete,
    /// Changes the size of the disk to this many sectors.
    Resize(u64),
}

/// A snapshot, and the indices of the requests that made and deleted it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its values, by sector.
    pub values: Arc<[Value]>,
    made: Option<usize>,
    deleted: Option<usize>,
}

/// An operation of the guest. Offsets and lengths are in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A read, compared at once.
    Read {
        /// The first sector.
        sector: u64,
        /// The number of sectors.
        count: u64,
    },
    /// A write of stamped sectors.
    Write {
        /// The first sector.
        sector: u64,
        /// The number of sectors.
        count: u64,
        /// Acknowledged only when durable.
        through: bool,
    },
    /// A write of stamped sectors and, in every second stretch of the disk ([`Shape::stretch_sectors`]), of zeros.
    Gappy {
        /// The first sector.
        sector: u64,
        /// The number of sectors.
        count: u64,
    },
    /// Write zeroes.
    Zeroes {
        /// The first sector.
        sector: u64,
        /// The number of sectors.
        count: u64,
        /// Space may be given back.
        unmap: bool,
    },
    /// Discard.
    Discard {
        /// The first sector.
        sector: u64,
        /// The number of sectors.
        count: u64,
    },
    /// Flush.
    Flush,
    /// Submits nothing for this many milliseconds. Requests in flight end first.
    Pause(u64),
    /// The next request's first I/O takes this many milliseconds longer.
    Late(u64),
    /// Closes the disk, changes its snapshots or its size, and reopens it. Requests in flight end first.
    Change(Deed),
    /// Resizes the disk to this many sectors while requests go on.
    Live(u64),
    /// Puts an overlay on top of the chain of the disk in use. Requests in flight end first.
    Overlay,
}

impl Op {
    /// A write that is acknowledged before it is durable.
    pub const fn write(sector: u64, count: u64) -> Op {
        Op::Write { sector, count, through: false }
    }

    /// The sectors that the operation addresses.
    pub fn sectors(&self) -> Range<u64> {
        match *self {
            Op::Read { sector, count }
            | Op::Write { sector, count, .. }
            | Op::Gappy { sector, count }
            | Op::Zeroes { sector, count, .. }
            | Op::Discard { sector, count } => sector..sector + count,
            Op::Flush | Op::Pause(_) | Op::Late(_) | Op::Change(_) | Op::Live(_) | Op::Overlay => 0..0,
        }
    }

    /// The operation, limited to a disk of this many sectors.
    pub fn clipped(mut self, sectors: u64) -> Op {
        if let Op::Read { sector, count }
        | Op::Write { sector, count, .. }
        | Op::Gappy { sector, count }
        | Op::Zeroes { sector, count, .. }
        | Op::Discard { sector, count } = &mut self
        {
            *count = (*count).min(sectors.saturating_sub(*sector));
        }
        self
    }

    /// The sectors that the operation changes on a disk of this many sectors.
    fn changed(&self, shape: &Shape, sectors: u64) -> Range<u64> {
        match *self {
            Op::Change(Deed::Apply) => 0..shape.sectors_max(),
            Op::Change(Deed::Resize(to)) | Op::Live(to) => sectors.min(to)..sectors.max(to),
            Op::Read { .. } | Op::Flush | Op::Pause(_) | Op::Late(_) | Op::Change(_) | Op::Overlay => 0..0,
            Op::Write { .. } | Op::Gappy { .. } | Op::Zeroes { .. } => self.sectors(),
            Op::Discard { .. } if shape.discards_nothing() => 0..0,
            Op::Discard { sector, count } => {
                let unit = shape.granule_sectors();
                let end = sector + count;
                // The last granule counts as whole at the end of the disk.
                let whole_end = if end == sectors { end } else { end / unit * unit };
                let start = sector.next_multiple_of(unit);
                start..whole_end.max(start)
            }
        }
    }
}

/// A point in a run: its position in the order of submissions and completions, and the instant in the world's history.
#[derive(Clone, Copy, Debug)]
struct Point {
    order: u32,
    moment: Moment,
}

/// A request and its result.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The operation.
    pub op: Op,
    /// The number of a write.
    pub write: u32,
    /// The number of sectors of the disk at submission.
    sectors: u64,
    /// It is acknowledged only when durable.
    through: bool,
    submitted: Point,
    ended: Option<Point>,
    /// It was acknowledged as done.
    pub done: bool,
    /// The instant from which it is settled.
    settled: Option<Moment>,
}

/// The requests to a disk, in order.
#[derive(Clone)]
pub struct Journal {
    shape: Shape,
    /// The values at the start, for the most sectors that the disk may ever have.
    start: Vec<Value>,
    /// The number of sectors that the disk has now.
    pub sectors: u64,
    entries: Vec<Entry>,
    order: u32,
    /// For each sector the requests that change it.
    touched: Vec<Vec<u32>>,
    /// The values of the disk after each applied snapshot, by request.
    applied: HashMap<u32, Arc<[Value]>>,
    /// Every snapshot that ever existed.
    pub kept: Vec<Kept>,
}

impl Journal {
    /// A journal of a disk with these values and snapshots.
    pub fn new(shape: Shape, start: Vec<Value>, snapshots: &[(String, Arc<[Value]>)]) -> Self {
        let sectors = start.len() as u64;
        let start = padded(&start, &shape);
        let touched = vec![Vec::new(); start.len()];
        let kept = |(name, values): &(String, Arc<[Value]>)| Kept {
            name: name.clone(),
            values: Arc::clone(values),
            made: None,
            deleted: None,
        };
        let (applied, kept) = (HashMap::new(), snapshots.iter().map(kept).collect());
        Journal { shape, start, sectors, entries: Vec::new(), order: 0, touched, applied, kept }
    }

    /// Records that a request is about to make a snapshot of a disk with these values.
    pub fn makes(&mut self, request: usize, name: String, values: Arc<[Value]>) {
        self.kept.push(Kept { name, values, made: Some(request), deleted: None });
    }

    /// Records that a request is about to apply a snapshot.
    pub fn applies(&mut self, request: usize, name: &str) {
        let shape = self.shape;
        let values = padded(&self.named(name).values, &shape);
        self.applied.insert(request as u32, values.into());
    }

    /// Records that a request is about to delete a snapshot.
    pub fn deletes(&mut self, request: usize, name: &str) {
        self.named(name).deleted = Some(request);
    }

    fn named(&mut self, name: &str) -> &mut Kept {
        self.kept.iter_mut().find(|kept| kept.name == name).expect("it was made")
    }

    /// The snapshots that a crash at an instant may leave. The flag is true if the crash must leave the snapshot.
    pub fn kept_at(&self, moment: Moment) -> Vec<(&Kept, bool)> {
        let visible = |request: usize| self.entries[request].submitted.moment < moment;
        let settled = |request: usize| self.entries[request].settled.is_some_and(|at| at <= moment);
        let may = |kept: &&Kept| kept.made.is_none_or(visible) && !kept.deleted.is_some_and(settled);
        let must = |kept: &Kept| kept.made.is_none_or(settled) && !kept.deleted.is_some_and(visible);
        self.kept.iter().filter(may).map(|kept| (kept, must(kept))).collect()
    }

    /// The value that a request leaves in a sector that it changes.
    fn value(&self, request: u32, sector: usize) -> Value {
        let entry = &self.entries[request as usize];
        match entry.op {
            Op::Write { .. } => Value::Write(entry.write),
            Op::Gappy { .. } if !self.shape.is_gap(sector as u64) => Value::Write(entry.write),
            Op::Change(Deed::Resize(to)) | Op::Live(to) if sector as u64 >= to => Value::NoSector,
            Op::Change(Deed::Apply) => self.applied[&request][sector],
            _ => Value::Zero,
        }
    }

    fn point(&mut self, moment: Moment) -> Point {
        self.order += 1;
        Point { order: self.order, moment }
    }

    /// Records that a request is about to be submitted, and returns its index. If `through`, it is acknowledged only
    /// when durable.
    pub fn submit(&mut self, op: Op, write: u32, through: bool, moment: Moment) -> usize {
        let index = self.entries.len();
        let sectors = self.sectors;
        for sector in op.changed(&self.shape, sectors) {
            self.touched[sector as usize].push(index as u32);
        }
        let submitted = self.point(moment);
        self.entries.push(Entry {
            op,
            write,
            sectors,
            through,
            submitted,
            ended: None,
            done: false,
            settled: None,
        });
        index
    }

    /// Records the end of a request.
    pub fn end(&mut self, index: usize, done: bool, moment: Moment) {
        let ended = self.point(moment);
        let entry = &mut self.entries[index];
        (entry.ended, entry.done) = (Some(ended), done);
        if !done {
            return;
        }
        if entry.through {
            entry.settled = Some(moment);
        } else if entry.op == Op::Flush {
            self.settle(index);
        }
    }

    /// Settles the requests before an acknowledged flush.
    fn settle(&mut self, flush: usize) {
        let Entry { submitted, ended, .. } = self.entries[flush];
        let moment = ended.expect("called as it ends").moment;
        for entry in &mut self.entries {
            let before = entry.ended.is_some_and(|ended| ended.order < submitted.order);
            if before && entry.done && entry.settled.is_none() {
                entry.settled = Some(moment);
            }
        }
    }

    /// The requests.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The instants at which the allowed values change, in order.
    pub fn changes(&self) -> Vec<Moment> {
        let mut moments: Vec<Moment> = Vec::new();
        for entry in &self.entries {
            // Its data can be in the image only after its first event.
            moments.push(Moment(entry.submitted.moment.0 + 1));
            moments.extend(entry.settled);
        }
        moments.sort_unstable();
        moments.dedup();
        moments
    }

    /// The instant at which a request was submitted.
    pub fn submitted_at(&self, index: usize) -> Moment {
        self.entries[index].submitted.moment
    }

    /// The values that a crash at an instant may leave, by sector.
    pub fn allowed_at(&self, moment: Moment) -> Vec<Vec<Value>> {
        let visible = |entry: &Entry| entry.submitted.moment < moment;
        let settled = |entry: &Entry| entry.settled.is_some_and(|at| at <= moment);
        (0..self.start.len()).map(|sector| self.allowed(sector, visible, settled)).collect()
    }

    /// The values that the disk may hold now, by sector, if it keeps all that is acknowledged.
    pub fn acknowledged(&self) -> Vec<Vec<Value>> {
        let kept = |entry: &Entry| entry.done && entry.ended.is_some();
        (0..self.start.len()).map(|sector| self.allowed(sector, |_| true, kept)).collect()
    }

    /// As [`Journal::allowed_at`], for a disk with other values at the start.
    pub fn allowed_from(&self, start: &[Value], moment: Moment) -> Vec<Vec<Value>> {
        let began_so = Journal { start: start.to_vec(), ..self.clone() };
        began_so.allowed_at(moment)
    }

    /// The values that a read may have returned for a sector, if it has just ended.
    pub fn readable(&self, sector: u64, read: usize) -> Vec<Value> {
        let submitted = self.entries[read].submitted;
        let settled =
            |entry: &Entry| entry.done && entry.ended.is_some_and(|ended| ended.order < submitted.order);
        self.allowed(sector as usize, |_| true, settled)
    }

    /// True for a sector of the last, partial granule of a disk of this size, where the disk is resized in use. A discard
    /// to the disk's end has that granule zeroed, unless the disk has just become larger.
    fn is_in_ragged_end(&self, sector: u64, sectors: u64) -> bool {
        self.has_live_sizes()
            && sector >= sectors / self.shape.granule_sectors() * self.shape.granule_sectors()
    }

    /// True if the disk was becoming smaller in use while this request was under way, and the request reaches past the new
    /// end.
    pub fn is_cut_off(&self, index: usize) -> bool {
        let Entry { op, submitted, .. } = self.entries[index];
        let is_later = |entry: &Entry| entry.ended.is_none_or(|ended| ended.order > submitted.order);
        let cuts = |entry: &Entry| matches!(entry.op, Op::Live(to) if to < op.sectors().end);
        self.entries.iter().any(|entry| cuts(entry) && is_later(entry))
    }

    /// True if the disk was resized in use.
    pub fn has_live_sizes(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry.op, Op::Live(_)))
    }

    /// True if the image was changed while closed.
    pub fn has_changes(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry.op, Op::Change(_)))
    }

    /// The values that a sector may hold if the settled requests are durable and the visible ones may be.
    fn allowed(
        &self,
        sector: usize,
        visible: impl Fn(&Entry) -> bool,
        settled: impl Fn(&Entry) -> bool,
    ) -> Vec<Value> {
        let touching = || self.touched[sector].iter().map(|index| (*index, &self.entries[*index as usize]));
        // The data of requests that ended before the horizon is overwritten for good.
        let is_hint = |entry: &Entry| {
            matches!(entry.op, Op::Discard { .. })
                && (self.shape.is_hint(&entry.op.sectors(), sector as u64, entry.sectors)
                    || self.is_in_ragged_end(sector as u64, entry.sectors))
        };
        let lasting = |(_, entry): &(u32, &Entry)| settled(entry) && !is_hint(entry);
        let horizon = touching().filter(lasting).map(|(_, entry)| entry.submitted.order).max();
        let mut values = Vec::with_capacity(2);
        if horizon.is_none() {
            values.push(self.start[sector]);
        }
        for (index, entry) in touching().filter(|(_, entry)| visible(entry)) {
            let over = entry.ended.is_some_and(|ended| horizon.is_some_and(|at| ended.order < at));
            let value = self.value(index, sector);
            if !over && !values.contains(&value) {
                values.push(value);
            }
        }
        values
    }

    /// The value of each sector after all successful requests, one after the other.
    pub fn settled_values(&self) -> Vec<Value> {
        let mut values = self.start.clone();
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, entry)| entry.done) {
            for sector in entry.op.changed(&self.shape, entry.sectors) {
                values[sector as usize] = self.value(index as u32, sector as usize);
            }
        }
        values.retain(|value| *value != Value::NoSector);
        values
    }

    /// Clusters that may be counted at an instant although nothing durable refers to them. These are clusters allocated
    /// by requests that are not settled, and clusters freed since `quiet`, when everything freed had been given back. A
    /// request that finds no space is tried up to `tries` times; the clusters of its failed attempts count as freed.
    pub fn unsettled_clusters(&self, quiet: Moment, moment: Moment, tries: u64) -> Unsettled {
        let mut unsettled = Unsettled::default();
        for entry in self.entries.iter().filter(|entry| entry.submitted.moment < moment) {
            let (data, tables) = self.reach(entry);
            // A discard never needs a cluster for data.
            let takes = tables + if matches!(entry.op, Op::Discard { .. }) { 0 } else { data };
            if entry.settled.is_none_or(|at| at > moment) {
                unsettled.taken += takes;
            }
            if entry.ended.is_none_or(|end| end.moment >= quiet) {
                unsettled.freed += takes * (tries - 1);
            }
            let shared = self.shape.past == Past::Shared || !self.kept.is_empty();
            let compressed = matches!(self.shape.past, Past::Compressed(_));
            let frees = shared || compressed || !matches!(entry.op, Op::Write { .. });
            if frees && entry.ended.is_none_or(|end| end.moment >= quiet) {
                // Compressed data a little larger than a cluster touches up to three clusters, and shares them.
                let data = if compressed && data > 0 { 2 * data + 1 } else { data };
                unsettled.freed += data + if shared { tables } else { 0 };
            }
        }
        unsettled
    }

    /// The numbers of guest clusters that a request changes, and of L2 tables that map them.
    fn reach(&self, entry: &Entry) -> (u64, u64) {
        if let Op::Change(deed) = entry.op {
            // Each cluster may be counted once too often for a while, and the tables move.
            let clusters = self.shape.sectors_max().div_ceil(self.shape.cluster_sectors());
            // Growing opens a disk to write the end of the old size. That disk reserves clusters.
            let window = (1 << 20) / self.shape.cluster_bytes();
            let reserved = if matches!(deed, Deed::Resize(_)) { window } else { 0 };
            return (clusters, clusters / self.shape.geometry().l2_entries() + 8 + reserved);
        }
        let changed = entry.op.changed(&self.shape, entry.sectors);
        if changed.is_empty() {
            return (0, 0);
        }
        let (unit, per_table) = (self.shape.cluster_sectors(), self.shape.geometry().l2_entries());
        let (first, last) = (changed.start / unit, (changed.end - 1) / unit);
        // Data in an external file has no refcounts.
        let data = if self.shape.has_data_file() { 0 } else { last - first + 1 };
        (data, last / per_table - first / per_table + 1)
    }
}

/// The values, padded to the most sectors that the disk may ever have.
pub fn padded(values: &[Value], shape: &Shape) -> Vec<Value> {
    let missing = (shape.sectors_max() as usize).saturating_sub(values.len());
    [values, &vec![Value::NoSector; missing]].concat()
}

/// Clusters that a crash may leak because of the requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unsettled {
    /// Allocated, and not durably linked.
    pub taken: u64,
    /// Unlinked, and not durably free.
    pub freed: u64,
}
