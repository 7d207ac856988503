//! Sectors that describe themselves: address, generation, checksum.
//!
//! Each generation belongs to one request, so a sector identifies the request that wrote it, and shows whether it is at
//! the right offset.

pub use strata_kit::client::SECTOR;
/// 64-bit words in a sector: the address in bytes, the generation, filling, and the checksum of the words before it.
const WORDS: usize = 64;

/// The contents of a valid sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes only.
    Zero,
    /// The stamp of this generation, for this address.
    Written(u64),
}

/// Contents that no sector may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// A valid stamp of another address.
    Elsewhere {
        /// The byte offset in the stamp.
        address: u64,
        /// The generation in the stamp.
        generation: u64,
    },
    /// Neither zeroes nor a valid stamp; the first two words.
    Broken(u64, u64),
}

fn filling(address: u64, generation: u64, index: usize) -> u64 {
    let key = address.rotate_left(23) ^ generation.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // The number is odd, so that no word of a stamp is zero.
    (key ^ (index as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9)).wrapping_mul(0x94d0_49bb_1331_11eb) | 1
}

fn checksum(words: &[u64]) -> u64 {
    words
        .iter()
        .fold(0x5354_5241_5441, |sum: u64, word| (sum ^ word).rotate_left(13).wrapping_mul(0x0100_0000_01b3))
        | 1
}

/// The words of the sector at byte `address`, for the request of this generation.
fn words(address: u64, generation: u64) -> [u64; WORDS] {
    let mut words: [u64; WORDS] = std::array::from_fn(|index| filling(address, generation, index));
    words[0] = address;
    words[1] = generation;
    words[WORDS - 1] = checksum(&words[..WORDS - 1]);
    words
}

/// Fills `bytes` with whole sectors, of which the first is at byte `address` of the disk.
pub fn fill(bytes: &mut [u8], address: u64, generation: u64) {
    for (sector, at) in bytes.chunks_mut(SECTOR as usize).zip((address..).step_by(SECTOR as usize)) {
        for (place, word) in sector.chunks_mut(8).zip(words(at, generation)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Reads the sector found at byte `address`.
///
/// # Errors
/// If the sector holds neither zeroes nor a stamp for this address.
pub fn read(sector: &[u8], address: u64) -> Result<Value, Foreign> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(Value::Zero);
    }
    let word = |index: usize| {
        sector[index * 8..].first_chunk().map_or(0, |bytes: &[u8; 8]| u64::from_le_bytes(*bytes))
    };
    let found: [u64; WORDS] = std::array::from_fn(word);
    let (place, generation) = (found[0], found[1]);
    if found != words(place, generation) {
        return Err(Foreign::Broken(place, generation));
    }
    if place != address {
        return Err(Foreign::Elsewhere { address: place, generation });
    }
    Ok(Value::Written(generation))
}

#[test]
fn a_stamp_is_valid_at_its_own_address_only() {
    let mut bytes = vec![0; 1024];
    assert_eq!(read(&bytes[..512], 0), Ok(Value::Zero));
    fill(&mut bytes, 8192, 7);
    assert_eq!(read(&bytes[..512], 8192), Ok(Value::Written(7)));
    assert_eq!(read(&bytes[512..], 8704), Ok(Value::Written(7)));
    assert_eq!(read(&bytes[512..], 8192), Err(Foreign::Elsewhere { address: 8704, generation: 7 }));
    bytes[300] ^= 1;
    assert_eq!(read(&bytes[..512], 8192), Err(Foreign::Broken(8192, 7)));
    bytes[..512].fill(0);
    bytes[100] = 1;
    assert!(read(&bytes[..512], 0).is_err(), "a partly zeroed sector is accepted");
}
