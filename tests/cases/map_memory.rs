//! The memory of the chain map: a contiguous image needs almost none, the rest is bounded, and unused memory is given
//! back.
//!
//! Tests the engine alone: it moves no data, and writes only metadata, to a sparse file. The housekeeper, which
//! triggers giving back, is tested in housekeeping.rs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::task::Waker;

use engine::{
    Allocation, Answer, Engine, EngineError, EngineSpec, Entries, FileIndex, FlushStep, IdleMap, LayerFormat,
    LayerSpec, Mapping, SLICE_WORDS, Source, TableSlot, TopSpec, Turn, WritePlan,
};
use qcow2::{Geometry, GuestOffset, Header, HostOffset, NewImage, Version};
use storage::pages::give_back;
use strata_kit::Qemu;
use strata_kit::images::{ImageSpec, Preallocation};

const CLUSTER: u64 = 64 << 10;
/// Guest bytes that a slice of the map covers.
const SLICE: u64 = SLICE_WORDS * CLUSTER;
/// 1 TiB must need at most 16 MiB. These tests use a sixteenth of both.
const SIZE: u64 = 64 << 30;
const LIMIT: usize = 1 << 20;
/// The default of `serve`.
const MAP_BYTES: usize = 32 << 20;
/// Bytes of the words of a slice.
const FRAME: usize = SLICE_WORDS as usize * 8;
/// Bytes that the directory needs once anything is resident.
const LEAF: usize = 32 << 10;

/// An engine and the file of its only image.
struct Bench {
    engine: Engine,
    file: File,
}

impl Bench {
    fn open(path: &Path, map_bytes: usize) -> Self {
        let file = File::options().read(true).write(true).open(path).expect("the image");
        let file_length = file.metadata().expect("its length").len();
        let first = bytes(&file, 0, CLUSTER as usize);
        let header = Header::parse(&first, file_length).expect("a header");
        let entries = u64::from(header.refcount_table_clusters) * CLUSTER / 8;
        let engine = Engine::new(EngineSpec {
            layers: vec![LayerSpec {
                file: FileIndex(0),
                format: LayerFormat::Qcow2 {
                    geometry: header.geometry(),
                    l1: table(&file, header.l1_offset, u64::from(header.l1_entries)),
                    data_file: None,
                },
            }],
            writable: true,
            top: Some(TopSpec {
                l1_offset: header.l1_offset,
                refcount_table_offset: header.refcount_table_offset,
                refcount_table: table(&file, header.refcount_table_offset, entries),
                file_length,
                bitmaps: Vec::new(),
                snapshots: Default::default(),
                keep_discarded: false,
                may_search_leaks: false,
            }),
            map_bytes,
            table_bytes: 16 << 20,
            workers: 1,
        });
        Bench { engine: engine.expect("an engine"), file }
    }

    /// A new image, with the layout that `strata` makes.
    fn fresh(folder: &Path, extended_l2: bool, map_bytes: usize) -> Self {
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: CLUSTER.trailing_zeros(),
            refcount_order: 4,
            extended_l2,
            size: SIZE,
        };
        let path = folder.join("fresh.qcow2");
        let file = File::create(&path).expect("a file");
        for (offset, piece) in NewImage::new(geometry).layout().expect("a valid image") {
            file.write_all_at(&piece, offset.0).expect("room");
        }
        Bench::open(&path, map_bytes)
    }

    /// Repeats a question to the engine until it answers, and does the I/O that it requests.
    fn ask<T>(&self, question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>) -> T {
        self.ask_in_turn(&Turn::default(), question)
    }

    /// The same for a question with a turn, which is over then.
    fn ask_in_turn<T>(
        &self,
        turn: &Turn,
        mut question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> T {
        loop {
            match question(&self.engine, Waker::noop()).expect("a sound image") {
                Answer::Ready(value) => {
                    self.engine.end_turn(turn);
                    return value;
                }
                Answer::Load(loads) => {
                    for load in loads {
                        let read = bytes(&self.file, load.offset.0, load.length);
                        self.engine.table_loaded(&load, read.into());
                    }
                }
                Answer::Allocate(places) => {
                    places.iter().for_each(|place| self.engine.table_allocated(place));
                }
                Answer::Crowded => panic!("nothing is freed here"),
                Answer::Reserve => self.reserve(turn),
                Answer::Flush => self.flush(),
                Answer::Table(slot) => self.make_table(slot),
                Answer::Wait => panic!("there is nobody to wait for"),
            }
        }
    }

    fn reserve(&self, turn: &Turn) {
        if let Some(plan) = self.ask(|engine, waker| engine.plan_reserve(turn, waker)) {
            self.engine.commit_reserve(plan);
        }
    }

    fn make_table(&self, slot: TableSlot) {
        let turn = Turn::default();
        let plan = self.ask_in_turn(&turn, |engine, waker| engine.plan_table(slot, &turn, waker));
        if let Some(plan) = plan {
            self.engine.commit_table(plan);
        }
    }

    fn flush(&self) {
        let ticket = self.engine.begin_flush().expect("a writable disk");
        while let FlushStep::Lead(cut) = self.engine.plan_flush(ticket, Waker::noop()).expect("a sound disk")
        {
            if let Some(length) = cut.lengthen {
                self.engine.file_was_lengthened(Some(length));
            }
            for write in cut.stage0.iter().chain(&cut.stage1).chain(&cut.stage2) {
                self.file.write_all_at(&write.bytes, write.offset.0).expect("room");
            }
            // A moved refcount table need not be recorded in the header: the image is not opened again.
            self.engine.commit_cut(&cut);
        }
    }

    /// Plans a whole write of unallocated clusters. The caller must commit the returned parts.
    fn plan(&self, offset: u64, length: u64) -> Vec<(u64, Allocation)> {
        let mut parts = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let left = offset + length - at;
            if self.engine.lookup(GuestOffset(at)) == Mapping::Unresolved {
                // As the disk does: the slice starts as zeros, which are a run.
                self.ask(|engine, waker| engine.plan_read(GuestOffset(at), 1, waker));
            }
            let turn = Turn::default();
            let plan = self
                .ask_in_turn(&turn, |engine, waker| engine.plan_write(GuestOffset(at), left, &turn, waker));
            let WritePlan::Allocate(part) = plan else { panic!("{at:#x} has a place already") };
            let begin = at;
            at += part.length;
            parts.push((begin, part));
        }
        parts
    }

    /// Writes the whole disk from end to end, in requests of this length. Of `in_flight` requests the last ends first.
    /// Returns the offset of each cluster.
    fn write_in_order(&self, length: u64, in_flight: u64) -> Vec<u64> {
        let mut places = vec![0; (SIZE / CLUSTER) as usize];
        for group in (0..SIZE).step_by((length * in_flight) as usize) {
            let mut parts: Vec<_> =
                (0..in_flight).flat_map(|n| self.plan(group + n * length, length)).collect();
            for (offset, part) in parts.drain(..).rev() {
                let first = (offset / CLUSTER) as usize;
                for (at, place) in places[first..][..(part.length / CLUSTER) as usize].iter_mut().enumerate()
                {
                    *place = part.offset.0 + at as u64 * CLUSTER;
                }
                self.engine.commit_write(part);
            }
        }
        places
    }

    /// Makes everything resident, as far as memory allows.
    fn read_in_order(&self) {
        for slice in (0..SIZE).step_by(SLICE as usize) {
            let found = self.ask(|engine, waker| engine.plan_read(GuestOffset(slice), CLUSTER, waker));
            assert!(!found.is_empty());
        }
    }

    /// The idle memory that a sweep of the whole map finds.
    fn swept(&self) -> Vec<IdleMap<'_>> {
        let mut all = vec![self.engine.sweep_map(0)];
        while let Some(next) = all.last().and_then(IdleMap::next) {
            all.push(self.engine.sweep_map(next));
        }
        all
    }

    fn map_bytes(&self) -> usize {
        self.engine.status().map_bytes
    }

    fn mapping(&self, cluster: u64) -> Mapping {
        self.engine.lookup(GuestOffset(cluster * CLUSTER))
    }
}

fn bytes(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut read = vec![0; length];
    match file.read_exact_at(&mut read, offset) {
        // Past the end of the file there is no data yet.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        result => result.expect("readable"),
    }
    read
}

fn table(file: &File, offset: HostOffset, entries: u64) -> Entries {
    let raw = bytes(file, offset.0, entries as usize * 8);
    (0..entries as usize).map(|index| qcow2::entry(&raw, index)).collect()
}

fn data(offset: u64) -> Mapping {
    Mapping::Data { file: FileIndex(0), offset: HostOffset(offset), in_place: true }
}

#[test]
fn an_image_written_in_order_is_resident_as_a_whole_in_little_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    for extended_l2 in [false, true] {
        let bench = Bench::fresh(folder.path(), extended_l2, MAP_BYTES);
        let places = bench.write_in_order(256 << 10, 8);
        for (cluster, place) in (0..).zip(places) {
            assert_eq!(bench.mapping(cluster), data(place), "cluster {cluster}");
        }
        let taken = bench.map_bytes();
        assert!(taken <= LIMIT, "{taken} bytes of map");
        println!("{taken} bytes of map for {SIZE} bytes of disk, subclusters: {extended_l2}");
    }
}

#[test]
fn a_preallocated_image_is_resident_as_a_whole_in_little_memory() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("allocated.qcow2");
    let spec = ImageSpec::qcow2(SIZE).preallocation(Preallocation::Metadata);
    qemu.create(&path, &spec).expect("an image");
    let bench = Bench::open(&path, MAP_BYTES);
    bench.read_in_order();
    for cluster in 0..SIZE / CLUSTER {
        let found = bench.mapping(cluster);
        assert!(matches!(found, Mapping::Data { in_place: true, .. }), "{found:?} for cluster {cluster}");
        if cluster % 61 == 0 {
            let at = GuestOffset(cluster * CLUSTER);
            let exact = bench.ask(|engine, waker| engine.plan_read_exact(at, CLUSTER, waker));
            let Source::Data { offset, .. } = exact[0].source else { panic!("{exact:?}") };
            assert_eq!(found, data(offset.0), "cluster {cluster}");
        }
    }
    let taken = bench.map_bytes();
    assert!(taken <= LIMIT, "{taken} bytes of map");
    println!("{taken} bytes of map for {SIZE} bytes of disk");
}

#[test]
fn an_image_in_no_order_is_held_to_the_bound() {
    let folder = tempfile::tempdir().expect("a folder");
    let bench = Bench::fresh(folder.path(), false, LIMIT);
    let slices = SIZE / SLICE;
    let mut places = Vec::new();
    for slice in 0..slices {
        // One cluster of data ends the run of zeros.
        for (_, part) in bench.plan(slice * SLICE, CLUSTER) {
            places.push(part.offset.0);
            bench.engine.commit_write(part);
        }
        assert_eq!(bench.mapping(slice * SLICE_WORDS), data(places[slice as usize]));
    }
    let taken = bench.map_bytes();
    assert!(taken <= LIMIT + LEAF, "{taken} bytes of map");
    let mut resident = 0;
    for (slice, place) in (0..slices).zip(places) {
        let found = bench.mapping(slice * SLICE_WORDS);
        assert!(found == data(place) || found == Mapping::Unresolved, "{found:?} for slice {slice}");
        resident += usize::from(found != Mapping::Unresolved);
    }
    assert_eq!(resident, LIMIT / FRAME, "as many as there is room for");
}

#[test]
fn swept_words_are_resolved_again() {
    let folder = tempfile::tempdir().expect("a folder");
    for extended_l2 in [false, true] {
        let bench = Bench::fresh(folder.path(), extended_l2, MAP_BYTES);
        let mut places = Vec::new();
        for slice in 0..SIZE / SLICE {
            for (_, part) in bench.plan(slice * SLICE, CLUSTER) {
                places.push(part.offset.0);
                bench.engine.commit_write(part);
            }
        }
        let before = bench.map_bytes();
        // The first sweep finds nothing: all slices were filled a moment ago.
        assert!(bench.swept().iter().all(|idle| idle.pages().next().is_none()));
        let idle = bench.swept();
        let pages = idle.iter().flat_map(IdleMap::pages).count();
        assert!(pages * FRAME >= before - LEAF - FRAME * 2, "{pages} pages of {before} bytes");
        // While these pages are idle, the map works without them.
        bench.read_in_order();
        give_back(idle.iter().flat_map(IdleMap::pages));
        for (slice, place) in (0..).zip(&places) {
            let found = bench.mapping(slice * SLICE_WORDS);
            assert!(found == data(*place) || found == Mapping::Unresolved, "{found:?} for slice {slice}");
        }
        drop(idle);
        assert!(bench.map_bytes() <= LEAF + FRAME * 2, "{} bytes are left", bench.map_bytes());
        bench.read_in_order();
        for (slice, place) in (0..).zip(&places) {
            assert_eq!(bench.mapping(slice * SLICE_WORDS), data(*place), "slice {slice}");
            assert_eq!(bench.mapping(slice * SLICE_WORDS + 1), Mapping::Zero, "slice {slice}");
        }
        assert_eq!(bench.map_bytes(), before);
    }
}
