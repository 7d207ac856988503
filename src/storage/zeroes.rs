//! Finds the parts of guest memory that are all zeros.
//!
//! The guest may write there at any moment: a result was true at some instant, and each byte is read at most once.
//! Small chunks are copied and the copy is examined, so that the compiler can use wide registers.

use std::ops::ControlFlow;

use crate::GuestSlice;
use crate::bounds::{ZEROES_CHUNK_BYTES as CHUNK_BYTES, ZEROES_FIRST_BYTES as FIRST_BYTES};

/// Divides the bytes of the slices into pieces: one of `first` bytes, then pieces of `piece` bytes; the last may be
/// shorter. Calls `each` with the length of a piece and whether it is all zeros, until it breaks. Within a piece, bytes
/// after the first nonzero chunk are not read.
///
/// # Panics
/// If `piece` is 0.
pub fn zero_pieces(
    slices: &[GuestSlice],
    first: usize,
    piece: usize,
    mut each: impl FnMut(usize, bool) -> ControlFlow<()>,
) {
    assert!(piece > 0, "pieces have bytes");
    let (mut wanted, mut length, mut zero) = (if first == 0 { piece } else { first }, 0, true);
    for slice in slices {
        let mut at = 0;
        while at < slice.len() {
            let count = (slice.len() - at).min(wanted - length);
            zero = zero && is_zero(slice, at, count);
            (at, length) = (at + count, length + count);
            if length == wanted {
                if each(length, zero).is_break() {
                    return;
                }
                (wanted, length, zero) = (piece, 0, true);
            }
        }
    }
    if length > 0 {
        // The last piece: there is nothing to stop.
        let _ = each(length, zero);
    }
}

/// True if a part of a slice is all zeros.
fn is_zero(slice: &GuestSlice, start: usize, count: usize) -> bool {
    let mut copy = [0; CHUNK_BYTES];
    let (mut at, end) = (start, start + count);
    let mut most = FIRST_BYTES;
    while at < end {
        let chunk = &mut copy[..most.min(end - at)];
        let part = slice.subslice(at, chunk.len()).expect("the part is cut to the slice");
        part.copy_to(chunk);
        let (words, rest) = chunk.as_chunks::<8>();
        // All of them, without a branch in between.
        let any = words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word));
        if any != 0 || rest.iter().any(|byte| *byte != 0) {
            return false;
        }
        at += chunk.len();
        most = CHUNK_BYTES;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slices of these lengths over bytes of which those at `set` are not zero.
    fn guest(lengths: &[usize], set: &[usize]) -> Vec<GuestSlice> {
        let mut bytes = vec![0u8; lengths.iter().sum()];
        for at in set {
            bytes[*at] = 1;
        }
        let mut rest: &'static mut [u8] = Box::leak(bytes.into_boxed_slice());
        let mut slices = Vec::new();
        for length in lengths {
            let (head, tail) = rest.split_at_mut(*length);
            slices.push(GuestSlice::from(head));
            rest = tail;
        }
        slices
    }

    fn pieces(slices: &[GuestSlice], first: usize, piece: usize) -> Vec<(usize, bool)> {
        let mut found = Vec::new();
        zero_pieces(slices, first, piece, |length, zero| {
            found.push((length, zero));
            ControlFlow::Continue(())
        });
        found
    }

    #[test]
    fn a_nonzero_byte_marks_its_own_piece_alone() {
        let lengths = [3, 0, 61, 2000, 1, 1031];
        let bounds = [0, 100, 1124, 2148, 3096];
        for at in 0..3096 {
            let expected: Vec<(usize, bool)> = bounds
                .windows(2)
                .map(|ends| (ends[1] - ends[0], !(ends[0]..ends[1]).contains(&at)))
                .collect();
            assert_eq!(pieces(&guest(&lengths, &[at]), 100, 1024), expected, "byte {at}");
        }
    }

    #[test]
    fn the_first_and_the_last_piece_may_be_short() {
        assert_eq!(pieces(&guest(&[512, 512], &[600]), 0, 512), [(512, true), (512, false)]);
        assert_eq!(pieces(&guest(&[100], &[]), 512, 512), [(100, true)]);
        assert_eq!(pieces(&guest(&[700], &[699]), 0, 512), [(512, true), (188, false)]);
        assert_eq!(pieces(&[], 0, 512), []);
    }

    #[test]
    fn no_piece_is_examined_after_a_break() {
        let mut count = 0;
        zero_pieces(&guest(&[4096], &[]), 0, 512, |_, _| {
            count += 1;
            if count == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(count, 3);
    }
}
