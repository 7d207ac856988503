//! Tables of big-endian 64-bit entries in byte slices: L1, L2 and the refcount table.
//!
//! Owns the byte order only; what an entry means is in [`entry`](mod@crate::entry).

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
