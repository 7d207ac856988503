//! Stamped sectors: each records its sector number and the number of its write. The stamp identifies bytes that are
//! misplaced, stale or torn.

use std::fmt;

pub use qcow2::SECTOR;

const WORDS: usize = SECTOR as usize / 8;
const MAGIC: u64 = 0x5354_5241_5441_1e55;

/// The contents of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// Zeros.
    Zero,
    /// Data of the write with this number.
    Write(u32),
    /// Data that a write wrote to another sector.
    Foreign {
        /// The sector it was written to.
        sector: u32,
        /// The write.
        write: u32,
    },
    /// Bytes that were never written to a sector of this disk.
    Garbage,
    /// The disk ends before this sector.
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

/// Fills a sector with its stamp.
pub fn stamp(sector: u64, write: u32, bytes: &mut [u8]) {
    let (name, words) = words(sector as u32, write);
    let head = [MAGIC, name].into_iter();
    for (target, word) in bytes.chunks_exact_mut(8).zip(head.chain(words)) {
        target.copy_from_slice(&word.to_le_bytes());
    }
}

/// The value that the bytes of a sector hold.
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

/// A stamp's name and the words after it. Every part of a sector differs from other sectors.
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
