//! Refcounts of 1 to 64 bits in a refblock (spec: "Refcount blocks").
//!
//! Owns how they are packed. `order` is the binary logarithm of their width in bits, 0 to 6. Refcounts narrower than a
//! byte fill it from its least significant bit; wider refcounts are big-endian.

/// The largest value that a refcount of this order holds.
///
/// # Panics
/// If the order is above 6, which no parsed header has: a programmer error.
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

/// The byte and the shift in it of a refcount narrower than a byte.
fn place_in_byte(order: u32, index: usize) -> (usize, u32) {
    let in_byte_bits = 3 - order;
    let within = index & ((1 << in_byte_bits) - 1);
    (index >> in_byte_bits, (within as u32) << order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_has_as_many_bits_as_the_width() {
        let maxima = [0, 1, 2, 3, 4, 5, 6].map(refcount_max);
        assert_eq!(maxima, [1, 3, 15, 255, 65_535, u32::MAX.into(), u64::MAX]);
    }

    #[test]
    fn narrow_refcounts_fill_a_byte_from_its_lowest_bit() {
        assert_eq!([0, 1, 7, 8].map(|index| refcount(0, &[0b1000_0001, 1], index)), [1, 0, 1, 1]);
        assert_eq!([0, 1, 2, 3].map(|index| refcount(1, &[0b11_10_01_00], index)), [0, 1, 2, 3]);
        assert_eq!([0, 1, 2].map(|index| refcount(2, &[0x5a, 0x0c], index)), [0xa, 0x5, 0xc]);
    }

    #[test]
    fn wide_refcounts_are_big_endian() {
        let block: Vec<u8> = (1..=16).collect();
        assert_eq!(refcount(3, &block, 1), 0x02);
        assert_eq!(refcount(4, &block, 1), 0x0304);
        assert_eq!(refcount(5, &block, 1), 0x0506_0708);
        assert_eq!(refcount(6, &block, 1), 0x090a_0b0c_0d0e_0f10);
    }

    #[test]
    fn storing_a_refcount_changes_no_other() {
        for order in 0..=6 {
            let count = (64 * 8) >> order;
            let pattern = |index: u64| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 5) & refcount_max(order);
            let mut block = [0xff; 64];
            for index in 0..count {
                set_refcount(order, &mut block, index, pattern(index as u64));
            }
            for changed in 0..count {
                for value in [0, refcount_max(order)] {
                    let mut block = block;
                    set_refcount(order, &mut block, changed, value);
                    for index in 0..count {
                        let expected = if index == changed { value } else { pattern(index as u64) };
                        assert_eq!(refcount(order, &block, index), expected, "order {order}, index {index}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_value_that_does_not_fit_is_refused() {
        for order in 0..6 {
            let result = std::panic::catch_unwind(|| {
                set_refcount(order, &mut [0; 8], 0, refcount_max(order) + 1);
            });
            assert!(result.is_err(), "order {order}");
        }
    }
}
