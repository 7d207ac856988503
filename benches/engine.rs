//! The cost of a lookup in the chain map. Run by `cargo bench-paths` (docs/performance.md, "What an operation costs").
//!
//! It uses the engine as its workers do, and generates the tables that the engine loads.

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

/// Lookups per run.
const LOOKUPS: u64 = 1024;
/// Bytes of a cluster.
const CLUSTER: u64 = 65536;
/// Where the generated, consecutive L2 tables are.
const L2_TABLES: HostOffset = HostOffset(4 * CLUSTER);
/// Where the data is.
const DATA: HostOffset = HostOffset(1 << 30);

const CASES: &[Named] = &[
    ("lookup in a run (the whole disk in one piece)", || lookups(raw(2 << 20))),
    ("lookup, map of 4 KiB", || lookups(scattered(SLICE_WORDS))),
    ("lookup, map of 16 MiB", || lookups(scattered(2 << 20))),
    ("lookup with subclusters", || lookups_of_subclusters(extended())),
];

fn main() {
    harness::main("engine", CASES);
}

/// An engine over a raw image of `clusters` clusters, whose slices are runs of 8 bytes each in the map.
fn raw(clusters: u64) -> Engine {
    resolved(LayerFormat::Raw { size: clusters * CLUSTER }, |_| panic!("a raw image has no tables"))
}

/// An engine over an image of `clusters` clusters, of which no two consecutive ones are consecutive on the host.
fn scattered(clusters: u64) -> Engine {
    image(geometry(clusters, false), |cluster| L2Entry::Data { offset: host(cluster ^ 1), copied: true })
}

/// An engine over an image with extended L2 entries; in each cluster half of the subclusters are data.
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

/// An engine with every cluster in the map.
fn resolved(format: LayerFormat, read: impl Fn(&TableLoad) -> Vec<u8>) -> Engine {
    let spec = EngineSpec {
        layers: vec![LayerSpec { file: FileIndex(0), format }],
        writable: false,
        top: None,
        map_bytes: 64 << 20,
        table_bytes: 1 << 20,
        workers: 1,
    };
    let engine = Engine::new(spec).expect("valid layers");
    for offset in (0..engine.size()).step_by((SLICE_WORDS * CLUSTER) as usize) {
        resolve(&engine, GuestOffset(offset), &read);
    }
    engine
}

/// Makes the engine fill the slice of the map at an offset.
fn resolve(engine: &Engine, offset: GuestOffset, read: impl Fn(&TableLoad) -> Vec<u8>) {
    loop {
        match engine.plan_read(offset, 512, Waker::noop()).expect("valid tables") {
            Answer::Ready(_) => return,
            Answer::Load(loads) => {
                loads.iter().for_each(|load| engine.table_loaded(load, read(load).into()));
            }
            other => panic!("no other request is in flight: {other:?}"),
        }
    }
}

/// Random offsets on the disk.
fn offsets(engine: &Engine) -> Vec<GuestOffset> {
    let clusters = engine.size() / CLUSTER;
    let mut state = 1u64;
    let mut next = || {
        // Knuth's MMIX generator, whose upper bits are the random ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        GuestOffset((state >> 32) % clusters * CLUSTER)
    };
    (0..LOOKUPS).map(|_| next()).collect()
}

fn lookups(engine: Engine) -> Case {
    let offsets = offsets(&engine);
    let known = |offset: &GuestOffset| matches!(engine.lookup(*offset), Mapping::Data { .. });
    assert!(offsets.iter().all(known), "a cluster is not in the map");
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

/// Looks up the second word too, which the fast path needs if the first word says that the cluster has subclusters.
fn lookups_of_subclusters(engine: Engine) -> Case {
    let offsets = offsets(&engine);
    Case::new(
        LOOKUPS,
        (engine, offsets),
        |_| {},
        |(engine, offsets)| {
            for offset in offsets {
                let offset = black_box(*offset);
                assert_eq!(engine.lookup(offset), Mapping::Subclusters);
                black_box(engine.lookup_subclusters(offset).expect("a cluster in the map"));
            }
        },
    )
}
