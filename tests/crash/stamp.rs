//! Sectors that say whose they are: which sector of the disk, and by which write. So that bytes in the wrong place, of
//! the wrong time, or torn, are recognised for what they are.

use std::fmt;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
const WORDS: usize = SECTOR as usize / 8;
const MAGIC: u64 = 0x5354_5241_5441_1e55;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// Zeros.
    Zero,
    /// What a write with this number wrote there.
    Write(u32),
    /// What a write wrote to another sector.
    Foreign {
        /// The sector it was written to.
        sector: u32,
        /// The write.
        write: u32,
    },
    /// Nothing that was ever written to a sector of this disk.
    Garbage,
    /// The disk ends before it.
    NoSector,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Zero => f.write_str("zero"),
            Value::Write(write) => write!(f, "write {write}"),
            Value::Foreign { sector, write } => write!(f, "write {write} to SECTOR {sector}"),
            Value::Garbage => f.write_str("garbage"),
            Value::NoSector => f.write_str("no sector"),
        }
    }
}

/// Fills a sector's bytes.
pub fn stamp(sector: u64, write: u32, bytes: &mut [u8]) {
    let (name, words) = words(sector as u32, write);
    let head = [MAGIC, name].into_iter();
    for (target, word) in bytes.chunks_exact_mut(8).zip(head.chain(words)) {
        target.copy_from_slice(&word.to_le_bytes());
    }
}

/// What the bytes of a sector are.
pub fn read_stamp(sector: u64, bytes: &[u8]) -> Value {
    let mut found =
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let (magic, name) = (found.next().unwrap_or(0), found.next().unwrap_or(0));
    if magic == 0 {
        return if name == 0 && found.all(|word| word == 0) { Value::Zero } else { Value::Garbage };
    }
    let (owner, write) = ((name >> 32) as u32, name as u32);
    if magic != MAGIC || !found.eq(words(owner, write).1) {
        return Value::Garbage;
    }
    if u64::from(owner) == sector { Value::Write(write) } else { Value::Foreign { sector: owner, write } }
}

/// A stamp's name and all the words after it, so that no part of a sector is like another's.
fn words(sector: u32, write: u32) -> (u64, impl Iterator<Item = u64>) {
    let name = u64::from(sector) << 32 | u64::from(write);
    let seed = name.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (2..WORDS as u64).map(move |word| seed ^ word.wrapping_mul(0xd134_2543_de82_ef95));
    (name, words)
}

/// The values of consecutive sectors.
pub fn read_stamps(first: u64, bytes: &[u8]) -> Vec<Value> {
    let sectors = bytes.chunks_exact(SECTOR as usize);
    sectors.zip(first..).map(|(bytes, sector)| read_stamp(sector, bytes)).collect()
}
