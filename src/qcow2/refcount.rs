//! Refcounts of 1 to 64 bits in a refblock (spec: "Refcount blocks").
//!
//! Owns how they are packed. `order` is the binary logarithm of their width in bits, 0 to 6. Refcounts narrower than a
//! byte fill it from its least significant bit; wider ones are big-endian.

/// The largest value that a refcount of this order holds.
///
/// # Panics
/// If the order is above 6: a parsed header has none such.
pub const fn refcount_max(order: u32) -> u64 {
    assert!(order <= 6, "refcounts are 64 bits wide at most");
    u64::MAX >> (64 - (1 << order))
}

/// The refcount at `index` of a refblock.
///
/// # Panics
/// If the block has no such refcount, or the order is above 6: programmer errors.
pub fn refcount(order: u32, block: &[u8], index: usize) -> u64 {
    match order {
        0..=2 => {
            let (byte, shift) = place_in_byte(order, index);
            (u64::from(block[byte]) >> shift) & refcount_max(order)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes(block.as_chunks().0[index])),
        5 => u64::from(u32::from_be_bytes(block.as_chunks().0[index])),
        6 => u64::from_be_bytes(block.as_chunks().0[index]),
        _ => panic!("refcounts are 64 bits wide at most"),
    }
}

/// Stores a refcount at `index` of a refblock.
///
/// # Panics
/// If the value is above [`refcount_max`], the block has no such refcount, or the order is above 6: programmer errors.
pub fn set_refcount(order: u32, block: &mut [u8], index: usize, value: u64) {
    assert!(value <= refcount_max(order), "refcount {value} does not fit in {} bits", 1 << order);
    match order {
        0..=2 => {
            let (byte, shift) = place_in_byte(order, index);
            let mask = (refcount_max(order) as u8) << shift;
            block[byte] = (block[byte] & !mask) | ((value as u8) << shift);
        }
        3 => block[index] = value as u8,
        4 => block.as_chunks_mut().0[index] = (value as u16).to_be_bytes(),
        5 => block.as_chunks_mut().0[index] = (value as u32).to_be_bytes(),
        _ => block.as_chunks_mut().0[index] = value.to_be_bytes(),
    }
}

/// For refcounts narrower than a byte: which byte, and how far to the left in it.
fn place_in_byte(order: u32, index: usize) -> (usize, u32) {
    let in_byte_bits = 3 - order;
    let within = index & ((1 << in_byte_bits) - 1);
    (index >> in_byte_bits, (within as u32) << order)
}
