//! The seal of a record: SipHash-1-3 (Aumasson, Bernstein, "SipHash: a fast short-input PRF") under a secret key.
//!
//! The key comes from a number in the image's header. Whoever has the journal but cannot read the image cannot make a
//! record that passes.

/// Seals words under a key.
#[derive(Clone, Copy)]
pub(crate) struct Seal {
    keys: [u64; 2],
}

impl Seal {
    /// The seal under a secret number.
    pub fn of(number: u64) -> Self {
        // The number has fewer bits than a key, so the second half is derived from the same bits.
        Seal { keys: [number, number.rotate_left(29) ^ 0x5374_7261_7461_4a4c] }
    }

    /// The seal over some words.
    #[inline]
    pub fn over<const N: usize>(self, words: [u64; N]) -> u64 {
        let [first, second] = self.keys;
        let mut state = [
            first ^ 0x736f_6d65_7073_6575,
            second ^ 0x646f_7261_6e64_6f6d,
            first ^ 0x6c79_6765_6e65_7261,
            second ^ 0x7465_6462_7974_6573,
        ];
        for word in words {
            state[3] ^= word;
            round(&mut state);
            state[0] ^= word;
        }
        // The last block holds the length in bytes, modulo 256, in its highest byte.
        let last = (N as u64 * 8) << 56;
        state[3] ^= last;
        round(&mut state);
        state[0] ^= last;
        state[2] ^= 0xff;
        (0..3).for_each(|_| round(&mut state));
        state[0] ^ state[1] ^ state[2] ^ state[3]
    }
}

#[inline]
fn round(state: &mut [u64; 4]) {
    let [v0, v1, v2, v3] = state;
    *v0 = v0.wrapping_add(*v1);
    *v2 = v2.wrapping_add(*v3);
    *v1 = v1.rotate_left(13) ^ *v0;
    *v3 = v3.rotate_left(16) ^ *v2;
    *v0 = v0.rotate_left(32);
    *v2 = v2.wrapping_add(*v1);
    *v0 = v0.wrapping_add(*v3);
    *v1 = v1.rotate_left(17) ^ *v2;
    *v3 = v3.rotate_left(21) ^ *v0;
    *v2 = v2.rotate_left(32);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// The standard library's hasher is the same function today, with keys of zero. It is not promised to stay so, and a
    /// successor may be another build.
    #[test]
    fn it_is_siphash() {
        use std::hash::{DefaultHasher, Hasher};
        let words = [1, u64::MAX, 0x0123_4567_89ab_cdef, 0];
        let mut hasher = DefaultHasher::new();
        words.iter().for_each(|word| hasher.write(&word.to_le_bytes()));
        assert_eq!(Seal { keys: [0, 0] }.over(words), hasher.finish());
    }

    #[test]
    fn every_bit_of_number_and_words_counts() {
        let seal = |number: u64, words| Seal::of(number).over(words);
        let plain = seal(5, [1, 2, 3, 4]);
        for bit in 0..64 {
            assert_ne!(plain, seal(5, [1, 2, 3, 4 ^ 1 << bit]));
            assert_ne!(plain, seal(5 ^ 1 << bit, [1, 2, 3, 4]));
        }
    }
}
