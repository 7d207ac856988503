//! Resolving: where the whole chain has the data of a guest cluster (a word of the map) or of a range (extents).
//!
//! Reads tables only; changes nothing but the map.

use std::task::Waker;

use qcow2::entry::compressed_length;
use qcow2::{GuestCluster, GuestOffset, HostOffset, HostPlace, L1Entry, L2Entry, Subcluster, Subclusters};

use crate::answer::{Answer, ready};
use crate::bounds::{EXACT_BYTES_MAX, EXTENTS_MAX, FILLS_MAX, MAP_SLICE_WORDS};
use crate::error::EngineError;
use crate::fill::FillJob;
use crate::guard::MetadataGuard;
use crate::layers::{Layer, Qcow2Layer};
use crate::map::{ChainMap, SliceIndex, SubclusterMap};
use crate::publish::words_of;
use crate::run::HostRun;
use crate::state::{Missing, State, decode_l2};
use crate::tables::{Found, TableId, Tables};
use crate::word::{FileIndex, Mapping, Word};

/// Where a run of guest bytes comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It reads as zero.
    Zero,
    /// It lies contiguously in a file.
    Data {
        /// The file.
        file: FileIndex,
        /// Where the run begins.
        offset: HostOffset,
    },
    /// It is part of a compressed cluster, which must be inflated first.
    Compressed {
        /// The cluster.
        cluster: CompressedCluster,
        /// Where the run begins in the inflated cluster, in bytes.
        within: u64,
    },
}

/// Where the data of a compressed cluster lies. Bytes past the end of the file read as zero. The stream may end before
/// the data does, because the next stream may begin in the same sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CompressedCluster {
    /// The file. Its layer determines the compression and the cluster size.
    pub file: FileIndex,
    /// The first byte, aligned to nothing.
    pub offset: HostOffset,
    /// Bytes that the stream may take: up to two clusters.
    pub length: u64,
}

/// A run of guest bytes from one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it comes from.
    pub source: Source,
    /// Bytes.
    pub length: u64,
}

/// Adds a run to a list, merging it with the last run where it continues that one.
pub fn push_extent(extents: &mut Vec<Extent>, source: Source, length: u64) {
    if let Some(last) = extents.last_mut() {
        let joins = match (last.source, source) {
            (Source::Zero, Source::Zero) => true,
            (Source::Data { file, offset }, Source::Data { file: next, offset: at }) => {
                file == next && offset.0.checked_add(last.length) == Some(at.0)
            }
            (Source::Compressed { cluster, within }, Source::Compressed { cluster: next, within: at }) => {
                cluster == next && within + last.length == at
            }
            _ => false,
        };
        if joins {
            last.length += length;
            return;
        }
    }
    extents.push(Extent { source, length });
}

/// The result of one layer for a whole cluster of the top image.
enum Step {
    /// This layer has the cluster.
    Answer(Word),
    /// This layer has some subclusters, which these words describe.
    Subclusters(Word, SubclusterMap),
    /// This layer has none of it: the next layer is searched.
    Below,
    /// A table is missing.
    Unknown,
}

/// The guest range that one map word covers.
#[derive(Clone, Copy)]
struct Span {
    start: u64,
    /// Clipped to the end of the disk.
    end: u64,
    /// Bytes of a map cluster, unclipped.
    cluster: u64,
}

impl State {
    /// Fills a slice of the map.
    pub fn fill(
        &mut self,
        map: &ChainMap,
        unit: u64,
        slice: SliceIndex,
        waker: &Waker,
    ) -> Result<Answer<()>, EngineError> {
        let count = self.layers[0].size().div_ceil(unit).saturating_sub(slice.first().0).min(MAP_SLICE_WORDS);
        let mut job = self.fills.remove(&slice).unwrap_or_else(|| FillJob::new(count, map.has_subclusters()));
        let missing = self.go_on(&mut job, slice, unit);
        if missing.any() {
            if self.fills.len() >= FILLS_MAX {
                self.fills.clear();
            }
            self.fills.insert(slice, job);
            return self.ask_for(missing, waker);
        }
        self.map_writer.fill_with_seconds(map, slice, &job.words, &job.seconds);
        Ok(Answer::Ready(()))
    }

    /// Continues a fill, layer by layer, until it is complete or lacks tables.
    fn go_on(&mut self, job: &mut FillJob, slice: SliceIndex, unit: u64) -> Missing {
        let size = self.layers[0].size();
        let first = slice.first().0;
        let span = |at: u16| {
            let start = (first + u64::from(at)) * unit;
            Span { start, end: (start + unit).min(size), cluster: unit }
        };
        let mut missing = Missing::default();
        let State { layers, tables, write, writable, .. } = self;
        let mut guard = write.as_mut().map(|write| &mut write.guard);
        while job.layer < layers.len() && !job.open.is_empty() {
            let layer = job.layer;
            let lowest = layer + 1 == layers.len();
            let mut open = std::mem::take(&mut job.open);
            open.retain(|at| {
                let step = match &layers[layer] {
                    Layer::Raw { file, size } => {
                        Ok(raw_step(*file, *size, span(*at), *writable && layer == 0))
                    }
                    Layer::Qcow2(image) => {
                        qcow2_step(image, tables, span(*at), lowest, guard.as_deref_mut(), &mut missing)
                    }
                };
                match step {
                    Ok(Step::Answer(word)) => job.set(*at, word, SubclusterMap::default()),
                    Ok(Step::Subclusters(word, second)) => job.set(*at, word, second),
                    Ok(Step::Below | Step::Unknown) => return true,
                    // One bad entry must not block its neighbours: the walk reports it when a request reaches it.
                    Err(_) => job.set(*at, Word::MIXED, SubclusterMap::default()),
                }
                false
            });
            job.open = open;
            if missing.any() {
                // The tables that the next layers will probably need are loaded along.
                missing.look_ahead();
                for below in layers.iter().take(2 * layer + 2).skip(layer + 1) {
                    note_tables(below, tables, job.open.iter().map(|at| span(*at)), &mut missing);
                }
                return missing;
            }
            job.layer += 1;
        }
        for at in job.open.drain(..) {
            job.words[usize::from(at)] = Word::ZERO;
        }
        missing
    }

    /// The word of a cluster. Fills its slice if necessary; unresolved if the map has no room for the slice.
    pub fn word(
        &mut self,
        map: &ChainMap,
        unit: u64,
        cluster: GuestCluster,
        waker: &Waker,
    ) -> Result<Answer<Word>, EngineError> {
        let word = map.lookup(cluster);
        if word != Word::UNRESOLVED {
            return Ok(Answer::Ready(word));
        }
        let slice = SliceIndex::of(cluster);
        if !self.map_writer.has_room(map, slice) {
            return Ok(Answer::Ready(word));
        }
        ready!(self.fill(map, unit, slice, waker)?);
        Ok(Answer::Ready(map.lookup(cluster)))
    }

    /// Where a prefix of a range comes from: at most [`EXTENTS_MAX`] runs, at least one.
    pub fn extents(
        &mut self,
        map: &ChainMap,
        unit: u64,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<Vec<Extent>>, EngineError> {
        let mut extents = Vec::new();
        let end = offset.0 + length;
        let mut at = offset.0;
        let mut may_walk = EXACT_BYTES_MAX;
        while at < end && extents.len() < EXTENTS_MAX {
            let within = at % unit;
            let mut piece = (unit - within).min(end - at);
            match ready!(self.word(map, unit, GuestCluster(at / unit), waker)?).mapping() {
                Mapping::Zero => push_extent(&mut extents, Source::Zero, piece),
                Mapping::Data { file, offset, .. } => {
                    let offset = HostOffset(offset.0 + within);
                    push_extent(&mut extents, Source::Data { file, offset }, piece);
                }
                Mapping::Subclusters | Mapping::Mixed | Mapping::Unresolved if may_walk == 0 => break,
                Mapping::Subclusters | Mapping::Mixed | Mapping::Unresolved => {
                    piece = piece.min(may_walk);
                    ready!(self.walk(GuestOffset(at), piece, &mut extents, waker)?);
                    may_walk -= piece;
                }
            }
            at += piece;
        }
        Ok(Answer::Ready(extents))
    }

    /// Where a prefix of a range comes from (at most [`EXACT_BYTES_MAX`]), by the range's own tables, without the map.
    pub fn exact_extents(
        &mut self,
        offset: GuestOffset,
        length: u64,
        waker: &Waker,
    ) -> Result<Answer<Vec<Extent>>, EngineError> {
        let mut extents = Vec::new();
        ready!(self.walk(offset, length.min(EXACT_BYTES_MAX), &mut extents, waker)?);
        Ok(Answer::Ready(extents))
    }

    /// Adds the exact extents of a range by walking the layers for each piece of it.
    fn walk(
        &mut self,
        offset: GuestOffset,
        length: u64,
        extents: &mut Vec<Extent>,
        waker: &Waker,
    ) -> Result<Answer<()>, EngineError> {
        let end = offset.0 + length;
        let mut at = offset.0;
        let mut missing = Missing::default();
        let mut found = Vec::new();
        while at < end {
            let (source, piece) = self.walk_one(GuestOffset(at), end - at, &mut missing)?;
            if let Some(source) = source {
                found.push((source, piece));
            }
            at += piece;
        }
        if missing.any() {
            return self.ask_for(missing, waker);
        }
        for (source, piece) in found {
            push_extent(extents, source, piece);
        }
        Ok(Answer::Ready(()))
    }

    /// The source of the byte at `offset`, and for how many bytes (at most `length`) it surely holds. No source if a
    /// table is missing.
    fn walk_one(
        &mut self,
        offset: GuestOffset,
        length: u64,
        missing: &mut Missing,
    ) -> Result<(Option<Source>, u64), EngineError> {
        let GuestOffset(offset) = offset;
        let mut length = length;
        let State { layers, tables, .. } = self;
        for layer in layers.iter() {
            let Some(left) = layer.size().checked_sub(offset).filter(|left| *left > 0) else {
                return Ok((Some(Source::Zero), length));
            };
            length = length.min(left);
            let layer = match layer {
                Layer::Raw { file, .. } => {
                    return Ok((Some(Source::Data { file: *file, offset: HostOffset(offset) }), length));
                }
                Layer::Qcow2(layer) => layer,
            };
            let within = layer.geometry.in_cluster(offset);
            length = length.min(layer.geometry.cluster_size() - within);
            let cluster = layer.geometry.guest_cluster(GuestOffset(offset));
            match entry_of(layer, tables, cluster, missing)? {
                None => return Ok((None, length)),
                Some(L2Entry::Unallocated) => {}
                Some(L2Entry::Zero | L2Entry::ZeroAllocated { .. }) => {
                    return Ok((Some(Source::Zero), length));
                }
                Some(L2Entry::Data { offset, .. }) => {
                    let source = Source::Data { file: layer.data(), offset: HostOffset(offset.0 + within) };
                    return Ok((Some(source), length));
                }
                Some(L2Entry::Compressed { offset, sectors }) => {
                    let data = compressed_length(offset, sectors);
                    let cluster = CompressedCluster { file: layer.file, offset, length: data };
                    return Ok((Some(Source::Compressed { cluster, within }), length));
                }
                Some(L2Entry::Subclusters(subclusters)) => {
                    let (source, alike) = subcluster_source(layer, &subclusters, within);
                    length = length.min(alike);
                    if let Some(source) = source {
                        return Ok((Some(source), length));
                    }
                }
            }
        }
        Ok((Some(Source::Zero), length))
    }
}

/// The source of the byte at `within` in a cluster of subclusters, and for how many bytes it holds. `None` where the
/// subcluster is unallocated.
fn subcluster_source(layer: &Qcow2Layer, subclusters: &Subclusters, within: u64) -> (Option<Source>, u64) {
    let size = layer.geometry.granule_size();
    let index = within / size;
    let (what, run) = subclusters.at(index as u32);
    let source = match (what, subclusters.host) {
        (Subcluster::Data, Some(host)) => {
            Some(Source::Data { file: layer.data(), offset: HostOffset(host.offset.0 + within) })
        }
        (Subcluster::Zero, _) => Some(Source::Zero),
        _ => None,
    };
    (source, (index + u64::from(run)) * size - within)
}

/// A layer's L2 entry for one of its own clusters; `None` if its table is missing.
fn entry_of(
    layer: &Qcow2Layer,
    tables: &mut Tables,
    cluster: GuestCluster,
    missing: &mut Missing,
) -> Result<Option<L2Entry>, EngineError> {
    let table = layer.geometry.l1_index(cluster);
    if layer.l1_entry(table)? == L1Entry::Unallocated {
        return Ok(Some(L2Entry::Unallocated));
    }
    let place = layer.entry_place(cluster);
    let Some(bytes) = resident(tables, place.table, missing) else { return Ok(None) };
    decode_l2(layer, bytes, place.index, cluster.0).map(Some)
}

fn resident<'a>(tables: &'a mut Tables, id: TableId, missing: &mut Missing) -> Option<&'a [u8]> {
    let found = tables.find(id);
    missing.note(id, &found);
    match found {
        Found::Ready(bytes) => Some(bytes),
        Found::Loading | Found::Missing => None,
    }
}

fn raw_step(file: FileIndex, size: u64, span: Span, in_place: bool) -> Step {
    Step::Answer(if span.start >= size {
        Word::ZERO
    } else if span.end > size {
        Word::MIXED
    } else {
        Word::data(file, HostOffset(span.start), in_place)
    })
}

fn qcow2_step(
    layer: &Qcow2Layer,
    tables: &mut Tables,
    span: Span,
    lowest: bool,
    guard: Option<&mut MetadataGuard>,
    missing: &mut Missing,
) -> Result<Step, EngineError> {
    let geometry = &layer.geometry;
    if span.start >= geometry.size {
        return Ok(Step::Answer(Word::ZERO));
    }
    if span.end > geometry.size {
        return Ok(Step::Answer(Word::MIXED));
    }
    if geometry.cluster_size() < span.cluster {
        return smaller_clusters_step(layer, span);
    }
    let cluster = geometry.guest_cluster(GuestOffset(span.start));
    Ok(match entry_of(layer, tables, cluster, missing)? {
        None => Step::Unknown,
        Some(L2Entry::Unallocated) => Step::Below,
        Some(L2Entry::Zero | L2Entry::ZeroAllocated { .. }) => Step::Answer(Word::ZERO),
        Some(L2Entry::Data { offset, copied }) => {
            let in_place = may_be_written(layer, HostPlace { offset, copied }, guard);
            let place = HostOffset(offset.0 + geometry.in_cluster(span.start));
            Step::Answer(Word::data(layer.data(), place, in_place))
        }
        Some(L2Entry::Compressed { .. }) => Step::Answer(Word::MIXED),
        Some(L2Entry::Subclusters(subclusters)) => {
            // This layer's clusters may be larger than the top image's, and the span a part of one.
            let within = geometry.in_cluster(span.start);
            let (source, alike) = subcluster_source(layer, &subclusters, within);
            match source {
                _ if alike < span.end - span.start && geometry.cluster_size() == span.cluster => {
                    let own = |host| may_be_written(layer, host, guard);
                    let (word, second) = words_of(layer.data(), &subclusters, lowest, own);
                    Step::Subclusters(word, second)
                }
                _ if alike < span.end - span.start => Step::Answer(Word::MIXED),
                Some(Source::Zero) => Step::Answer(Word::ZERO),
                Some(Source::Data { file, offset }) => {
                    let in_place = subclusters.host.is_some_and(|host| may_be_written(layer, host, guard));
                    Step::Answer(Word::data(file, offset, in_place))
                }
                Some(Source::Compressed { .. }) => Step::Answer(Word::MIXED),
                None => Step::Below,
            }
        }
    })
}

/// True if a host cluster may be written in place: it is the top image's own and holds no metadata. From now on it
/// cannot become metadata.
fn may_be_written(layer: &Qcow2Layer, host: HostPlace, guard: Option<&mut MetadataGuard>) -> bool {
    let own = host.copied && layer.number == 0;
    if layer.data_file.is_some() {
        // A data file holds no metadata.
        return own && guard.is_some();
    }
    let run = HostRun { start: layer.geometry.host_cluster(host.offset), count: 1 };
    own && guard.is_some_and(|guard| guard.aim(run).is_ok())
}

/// Notes the tables that these spans would need from a layer and that are not resident.
fn note_tables(layer: &Layer, tables: &mut Tables, spans: impl Iterator<Item = Span>, missing: &mut Missing) {
    let Layer::Qcow2(layer) = layer else { return };
    let mut last = None;
    for span in spans {
        if missing.full() || span.end > layer.geometry.size || layer.geometry.cluster_size() < span.cluster {
            return;
        }
        let cluster = layer.geometry.guest_cluster(GuestOffset(span.start));
        let place = layer.entry_place(cluster);
        let table = layer.l1_entry(layer.geometry.l1_index(cluster));
        if last == Some(place.table) || !matches!(table, Ok(L1Entry::Table { .. })) {
            continue;
        }
        last = Some(place.table);
        let found = tables.find(place.table);
        missing.note(place.table, &found);
    }
}

/// The step for a lower layer with smaller clusters than the top image's: extents, unless it has no table there.
fn smaller_clusters_step(layer: &Qcow2Layer, span: Span) -> Result<Step, EngineError> {
    let geometry = &layer.geometry;
    let first = geometry.l1_index(geometry.guest_cluster(GuestOffset(span.start)));
    let last = geometry.l1_index(geometry.guest_cluster(GuestOffset(span.end - 1)));
    for index in first..=last {
        if layer.l1_entry(index)? != L1Entry::Unallocated {
            return Ok(Step::Answer(Word::MIXED));
        }
    }
    Ok(Step::Below)
}
