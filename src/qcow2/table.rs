//! Tables of big-endian 64-bit entries in byte slices: L1, L2 and the refcount table.
//!
//! Owns the byte order only; [`entry`](mod@crate::entry) owns the meaning of an entry.

/// Bytes in an entry of the L1 table and of the refcount table.
pub const ENTRY_SIZE: usize = 8;

/// The raw entry at `index`, counted in 8-byte entries.
///
/// # Panics
/// If the table has no such entry: a programmer error.
pub fn entry(table: &[u8], index: usize) -> u64 {
    u64::from_be_bytes(table.as_chunks().0[index])
}

/// Stores a raw entry at `index`, counted in 8-byte entries.
///
/// # Panics
/// If the table has no such entry: a programmer error.
pub fn set_entry(table: &mut [u8], index: usize, value: u64) {
    table.as_chunks_mut().0[index] = value.to_be_bytes();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_big_endian_and_do_not_overlap() {
        let mut table = [0xee; 24];
        set_entry(&mut table, 1, 0x0102_0304_0506_0708);
        assert_eq!(table[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(entry(&table, 1), 0x0102_0304_0506_0708);
        assert_eq!([entry(&table, 0), entry(&table, 2)], [0xeeee_eeee_eeee_eeee; 2]);
    }

    #[test]
    #[should_panic(expected = "index out of bounds")]
    fn loading_half_an_entry_panics() {
        entry(&[0; 12], 1);
    }
}
