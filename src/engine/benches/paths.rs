//! What a look-up in the chain map costs. Run by `cargo bench-paths` (docs/performance.md, "What an operation costs").
//!
//! Uses the engine as its workers do, and makes up the tables that it asks for.

#[path = "../../../integration/paths/harness.rs"]
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
/// Where the one L2 table is, in made-up bytes.
const L2_TABLE: HostOffset = HostOffset(4 * CLUSTER);

const CASES: &[Named] = &[
    ("look-up, map of 4 KiB", || lookups(raw(SLICE_WORDS))),
    ("look-up, map of 16 MiB", || lookups(raw(2 << 20))),
    ("look-up with subclusters", || lookups_of_parts(extended())),
];

fn main() {
    harness::main("engine", CASES);
}

/// An engine over a raw image of so many clusters, all of which are in the map.
fn raw(clusters: u64) -> Engine {
    resolved(LayerFormat::Raw { size: clusters * CLUSTER })
}

/// An engine over an image with extended L2 entries, each cluster of which is half data and half zeros.
fn extended() -> Engine {
    let geometry = extended_geometry();
    let l1 = vec![L1Entry::Table { offset: L2_TABLE, copied: true }.encode()];
    resolved(LayerFormat::Qcow2 { geometry, l1, data_file: None })
}

fn extended_geometry() -> Geometry {
    let size = SLICE_WORDS * CLUSTER;
    Geometry { version: Version::V3, cluster_bits: 16, refcount_order: 4, extended_l2: true, size }
}

fn resolved(format: LayerFormat) -> Engine {
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
        resolve(&engine, GuestOffset(offset));
    }
    engine
}

/// Lets the engine fill the slice of the map that an offset is in.
fn resolve(engine: &Engine, offset: GuestOffset) {
    loop {
        match engine.plan_read(offset, 512, Waker::noop()).expect("sound tables") {
            Answer::Ready(_) => return,
            Answer::Load(loads) => {
                loads.iter().for_each(|load| engine.table_loaded(load, half_data(load).into()));
            }
            other => panic!("nobody else is at work: {other:?}"),
        }
    }
}

/// A piece of an L2 table of extended entries.
fn half_data(load: &TableLoad) -> Vec<u8> {
    let first = (load.offset.0 - L2_TABLE.0) / 16;
    let entry = |index: u64| {
        let offset = HostOffset(L2_TABLE.0 + (1 + first + index) * CLUSTER);
        let place = HostPlace { offset, copied: true };
        let subclusters =
            Subclusters { host: Some(place), allocated: SubclusterSet(0xffff), zero: SubclusterSet::EMPTY };
        L2Entry::Subclusters(subclusters).encode(&extended_geometry())
    };
    let words = (0..load.length as u64 / 16).map(entry).flat_map(|raw| [raw.descriptor, raw.bitmap]);
    words.flat_map(u64::to_be_bytes).collect()
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
