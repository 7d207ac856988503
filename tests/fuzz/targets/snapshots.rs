//! A table of internal snapshots, walked as by a disk.

use qcow2::snapshot::{encode_table, find, next_id};
use qcow2::{HostOffset, SnapshotTable};

use super::values::Values;

/// The input: the claimed number of snapshots, then the table, which ends the file.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let count = u32::from(values.u16());
    let table = values.0;
    let start = 512;
    let mut walk = SnapshotTable::new(HostOffset(start), count, start + table.len() as u64);
    let (mut found, mut places) = (Vec::new(), Vec::new());
    while let Some(qcow2::HostRange { offset, length }) = walk.next_piece() {
        let at = (offset.0 - start) as usize;
        walk.feed(&table[at..at + length as usize], |entry| {
            assert_eq!(entry.index as usize, found.len());
            places.push(entry.offset.0 - start);
            found.push(entry.snapshot);
        });
    }
    assert_eq!(
        walk.is_broken(),
        found.len() < count as usize,
        "every entry, or it is said that one is broken"
    );
    let encoded = encode_table(&found);
    assert_eq!(walk.length(), encoded.len() as u64);
    for (snapshot, at) in found.iter().zip(places) {
        let _ = (snapshot.vm_state_size(), snapshot.disk_size(), snapshot.icount());
        assert!(at < table.len() as u64, "an entry is in the file");
        assert_eq!(found[find(&found, &snapshot.id).expect("it is there")].id, snapshot.id);
    }
    let id = next_id(&found);
    assert!(found.iter().all(|snapshot| snapshot.id != id), "an ID that none has");
    // Every byte with a meaning is written back: all but the padding that aligns the entries.
    let mut again = SnapshotTable::new(HostOffset(start), found.len() as u32, start + encoded.len() as u64);
    let mut second = Vec::new();
    while let Some(qcow2::HostRange { offset, length }) = again.next_piece() {
        let at = (offset.0 - start) as usize;
        again.feed(&encoded[at..at + length as usize], |entry| second.push(entry.snapshot));
    }
    assert_eq!(second, found);
}
