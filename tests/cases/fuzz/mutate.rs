//! Changes inputs at random, mostly in terms of what formats consist of: big-endian numbers, bits, offsets,
//! lengths.

use storage_sim::Random;

/// Numbers at the edges of ranges.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    9,
    0x1ff,
    0x200,
    0x201,
    0xffff,
    0x1_0000,
    0xffff_ffff,
    1 << 32,
    (1 << 56) - 512,
    1 << 56,
    1 << 61,
    1 << 62,
    1 << 63,
    i64::MAX as u64,
    u64::MAX,
];

/// An input derived from one seed, or from two.
pub fn mutated(seed: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    if bytes.is_empty() {
        bytes.push(0);
    }
    for _ in 0..=random.below(6) {
        change(&mut bytes, other, random);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let length = bytes.len() as u64;
    let at = random.below(length.max(1)) as usize;
    // Most fields are aligned to 8 bytes.
    let aligned = at / 8 * 8;
    match random.below(12) {
        0..3 => flip(bytes, at, random),
        3 => put(bytes, aligned, 8, EDGES[random.below(EDGES.len() as u64) as usize]),
        4 => put(bytes, at / 4 * 4, 4, EDGES[random.below(EDGES.len() as u64) as usize]),
        5 => put(bytes, at / 2 * 2, 2, random.below(1 << 16)),
        6 => nudge(bytes, aligned, random),
        7 => copy(bytes, random.below(length.max(1)) as usize / 8 * 8, aligned, 8),
        8 => bytes.truncate(at),
        9 => {
            let end = (at + random.below(64) as usize).min(bytes.len());
            drop(bytes.drain(at.min(end)..end));
        }
        10 => {
            let piece: Vec<u8> = (0..=random.below(32)).map(|_| random.below(256) as u8).collect();
            drop(bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece));
        }
        _ => {
            let from = random.below(other.len().max(1) as u64) as usize;
            bytes.truncate(at);
            bytes.extend(&other[from.min(other.len())..]);
        }
    }
}

fn flip(bytes: &mut [u8], at: usize, random: &mut Random) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// Stores the low bytes of a number.
fn put(bytes: &mut [u8], at: usize, count: usize, value: u64) {
    let value = &value.to_be_bytes()[8 - count..];
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// Adds a small value to a number, or subtracts it.
fn nudge(bytes: &mut [u8], at: usize, random: &mut Random) {
    let Some(field) = bytes.get(at..at + 8) else { return };
    let value = u64::from_be_bytes(field.try_into().expect("eight bytes"));
    let by = (random.below(16) + 1) << random.below(20);
    let value = if random.chance(1, 2) { value.wrapping_add(by) } else { value.wrapping_sub(by) };
    put(bytes, at, 8, value);
}

fn copy(bytes: &mut [u8], from: usize, to: usize, count: usize) {
    if from.max(to) + count <= bytes.len() {
        bytes.copy_within(from..from + count, to);
    }
}
