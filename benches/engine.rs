//! What a look-up in the chain map costs. Run by `cargo bench-paths` (docs/performance.md, "What an operation costs").
//!
//! Uses the engine as its workers do, and makes up the tables that it asks for.

mod harness;

use std::hint::black_box;
use std::task::Waker;

use engine::{
    Answer, Engine, EngineSpec, FileIndex, LayerFormat, LayerSpec, Mapping, SLICE_WORDS, TableLoad,
};
use qcow2::{
    Geometry, GuestOffset, HostOffset, HostPlace, L1Entry, L2Entry, SubclusterSet, Subclusters, Version,
};

use harness::{Case, Named};

/// Look-ups in a run.
const LOOKUPS: u64 = 1024;
/// Bytes of a cluster.
const CLUSTER: u64 = 65536;
/// Where the L2 tables are, one behind the other, in made-up bytes.
const L2_TABLES: HostOffset = HostOffset(4 * CLUSTER);
/// Where the data is.
const DATA: HostOffset = HostOffset(1 << 30);

const CASES: &[Named] = &[
    ("look-up, all in one piece", || lookups(raw(2 << 20))),
    ("look-up, map of 4 KiB", || lookups(scattered(SLICE_WORDS))),
    ("look-up, map of 16 MiB", || lookups(scattered(2 << 20))),
    ("look-up with subclusters", || lookups_of_parts(extended())),
];

fn main() {
    harness::main("engine", CASES);
}

/// An engine over a raw image of so many clusters: in the map it takes 8 bytes a slice.
fn raw(clusters: u64) -> Engine {
    resolved(LayerFormat::Raw { size: clusters * CLUSTER }, |_| panic!("a raw image has no tables"))
}

/// An engine over an image of so many clusters, of which no two that follow each other do so on the host.
fn scattered(clusters: u64) -> Engine {
    image(geometry(clusters, false), |cluster| L2Entry::Data { offset: host(cluster ^ 1), copied: true })
}

/// An engine over an image with extended L2 entries, each cluster of which is half data and half zeros.
fn extended() -> Engine {
    image(geometry(SLICE_WORDS, true), |cluster| {
        let place = HostPlace { offset: host(cluster), copied: true };
        L2Entry::Subclusters(Subclusters {
            host: Some(place),
            allocated: SubclusterSet(0xffff),
            zero: SubclusterSet::EMPTY,
        })
    })
}

fn geometry(clusters: u64, extended_l2: bool) -> Geometry {
    let size = clusters * CLUSTER;
    Geometry { version: Version::V3, cluster_bits: 16, refcount_order: 4, extended_l2, size }
}

fn host(cluster: u64) -> HostOffset {
    HostOffset(DATA.0 + cluster * CLUSTER)
}

/// An engine over an image whose clusters have these entries.
fn image(geometry: Geometry, entry: impl Fn(u64) -> L2Entry) -> Engine {
    let table = |index| L1Entry::Table { offset: HostOffset(L2_TABLES.0 + index * CLUSTER), copied: true };
    let l1 = (0..geometry.l1_entries()).map(|index| table(index).encode()).collect();
    resolved(LayerFormat::Qcow2 { geometry, l1, data_file: None }, |load| {
        let first = (load.offset.0 - L2_TABLES.0) / geometry.l2_entry_size();
        let mut bytes = vec![0; load.length];
        for index in 0..load.length / geometry.l2_entry_size() as usize {
            entry(first + index as u64).encode(&geometry).store(&mut bytes, index, &geometry);
        }
        bytes
    })
}

/// An engine that has every cluster in the map.
fn resolved(format: LayerFormat, read: impl Fn(&TableLoad) -> Vec<u8>) -> Engine {
    let spec = EngineSpec {
        layers: vec![LayerSpec { file: FileIndex(0), format }],
        writable: false,
        top: None,
        map_bytes: 64 << 20,
        table_bytes: 1 << 20,
        workers: 1,
    };
    let engine = Engine::new(spec).expect("sound layers");
    for offset in (0..engine.size()).step_by((SLICE_WORDS * CLUSTER) as usize) {
        resolve(&engine, GuestOffset(offset), &read);
    }
    engine
}

/// Lets the engine fill the slice of the map that an offset is in.
fn resolve(engine: &Engine, offset: GuestOffset, read: impl Fn(&TableLoad) -> Vec<u8>) {
    loop {
        match engine.plan_read(offset, 512, Waker::noop()).expect("sound tables") {
            Answer::Ready(_) => return,
            Answer::Load(loads) => {
                loads.iter().for_each(|load| engine.table_loaded(load, read(load).into()));
            }
            other => panic!("nobody else is at work: {other:?}"),
        }
    }
}

/// Offsets all over the disk, in no order.
fn offsets(engine: &Engine) -> Vec<GuestOffset> {
    let clusters = engine.size() / CLUSTER;
    let mut state = 1u64;
    let mut next = || {
        // Knuth's MMIX generator; its upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        GuestOffset((state >> 32) % clusters * CLUSTER)
    };
    (0..LOOKUPS).map(|_| next()).collect()
}

fn lookups(engine: Engine) -> Case {
    let offsets = offsets(&engine);
    let known = |offset: &GuestOffset| matches!(engine.lookup(*offset), Mapping::Data { .. });
    assert!(offsets.iter().all(known), "the map has every cluster");
    Case::new(
        LOOKUPS,
        (engine, offsets),
        |_| {},
        |(engine, offsets)| {
            for offset in offsets {
                black_box(engine.lookup(black_box(*offset)));
            }
        },
    )
}

/// The second word, too: what the fast path asks for where the first says that there is one.
fn lookups_of_parts(engine: Engine) -> Case {
    let offsets = offsets(&engine);
    Case::new(
        LOOKUPS,
        (engine, offsets),
        |_| {},
        |(engine, offsets)| {
            for offset in offsets {
                let offset = black_box(*offset);
                assert_eq!(engine.lookup(offset), Mapping::Parts);
                black_box(engine.lookup_parts(offset).expect("the map has it"));
            }
        },
    )
}
