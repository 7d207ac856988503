//! Damages of compressed clusters: their entries, and the streams themselves. The images have guest clusters 6 and 7
//! compressed into one host cluster.

use qcow2::entry::{COMPRESSED, COPIED};

use super::{Damage, FAR, Raw};

impl Raw {
    fn packed(&self) -> u64 {
        self.l2_entry(6)
    }

    /// The offset of the first stream.
    fn stream(&self) -> usize {
        (self.get(self.packed()) & ((1 << self.sector_shift()) - 1)) as usize
    }

    /// The bit position of the number of sectors in the entry.
    fn sector_shift(&self) -> u32 {
        62 - (self.geometry.cluster_bits - 8)
    }

    /// Changes the offset of the first stream in its entry.
    fn move_stream(&mut self, offset: u64) -> bool {
        self.put(self.packed(), COMPRESSED | offset)
    }
}

/// Damages of compressed clusters.
pub const PACKED: &[Damage] = &[
    ("a stream damaged in its first byte", |i| {
        let at = i.stream();
        i.put_bytes(at, &[0xff])
    }),
    ("a stream of zeros", |i| {
        let at = i.stream();
        i.put_bytes(at, &[0; 64])
    }),
    ("a stream that begins a byte too late", |i| i.put(i.packed(), i.get(i.packed()) + 1)),
    ("a stream said to be as long as can be", |i| {
        let length = (1 << (62 - i.sector_shift())) - 1;
        i.put(i.packed(), i.get(i.packed()) | length << i.sector_shift())
    }),
    ("a stream a sector longer than it is", |i| {
        i.put(i.packed(), i.get(i.packed()) + (1 << i.sector_shift()))
    }),
    ("the stream of another cluster", |i| i.put(i.packed(), i.get(i.l2_entry(7)))),
    ("a compressed cluster with COPIED", |i| i.flip(i.packed(), COPIED)),
    ("a stream in the header", |i| i.move_stream(0)),
    ("a stream in the L1 table", |i| i.move_stream(i.l1)),
    ("a stream in its L2 table", |i| i.move_stream(i.l2)),
    ("a stream in the refblock", |i| i.move_stream(i.refblock)),
    ("a stream in guest data", |i| i.move_stream(i.data(0) << i.geometry.cluster_bits)),
    ("a stream over the end of the file", |i| i.move_stream(i.bytes.len() as u64 - 8)),
    ("a stream right past the file", |i| i.move_stream(i.end())),
    ("a stream far past the file", |i| i.move_stream(FAR)),
    ("a stream at the largest offset", |i| i.move_stream((1 << i.sector_shift().min(56)) - 1)),
    ("a compressed cluster that is none", |i| i.flip(i.packed(), COMPRESSED)),
];
