//! Slices of guest memory: cutting them, filling them, and copies between them and buffers.
//!
//! Guest memory is only ever copied, never borrowed as a slice of bytes: the guest may change it at any moment.

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use crate::AlignedBuf;

/// A span of guest memory. The code that creates one from a guest mapping guarantees that the mapping outlives
/// every operation that uses the slice. This justifies the `'static` (docs/concurrency.md, "Guest memory").
pub type GuestSlice = VolatileSlice<'static, ()>;

/// A list of guest slices, usually short enough to need no heap.
pub type GuestSlices = SmallVec<[GuestSlice; 4]>;

/// The total length of the slices in bytes.
pub fn guest_len(slices: &[GuestSlice]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// The slices that cover `len` bytes from `offset` on.
///
/// # Panics
/// When the slices hold fewer than `offset + len` bytes.
pub fn subrange(slices: &[GuestSlice], offset: usize, len: usize) -> GuestSlices {
    let mut out = GuestSlices::new();
    subrange_into(&mut out, slices, offset, len);
    out
}

/// As [`subrange`], but replaces the contents of `out` and so reuses its memory.
///
/// # Panics
/// As [`subrange`].
pub fn subrange_into(out: &mut GuestSlices, slices: &[GuestSlice], offset: usize, len: usize) {
    out.clear();
    let (mut skip, mut left) = (offset, len);
    for slice in slices {
        if left == 0 {
            break;
        }
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let count = left.min(slice.len() - skip);
        out.push(slice.subslice(skip, count).expect("the count is cut to the slice"));
        skip = 0;
        left -= count;
    }
    assert!(left == 0 && skip <= guest_len(slices), "{len} bytes at {offset} are beyond the guest slices");
}

/// Copies all bytes of the slices into the buffer at `offset`. The guest may change them meanwhile.
///
/// # Panics
/// When the buffer is too short.
pub fn copy_from_guest(slices: &[GuestSlice], buffer: &mut AlignedBuf, offset: usize) {
    let mut target = buffer.as_mut_slice().get_mut(offset..).expect("the offset is inside the buffer");
    for slice in slices {
        let (head, rest) =
            target.split_at_mut_checked(slice.len()).expect("the buffer holds what the slices hold");
        slice.copy_to(head);
        target = rest;
    }
}

/// Fills all slices with the bytes from `offset` on.
///
/// # Panics
/// When there are too few bytes.
pub fn copy_to_guest(bytes: &[u8], offset: usize, slices: &[GuestSlice]) {
    let mut source = bytes.get(offset..).expect("the offset is inside the buffer");
    for slice in slices {
        let (head, rest) =
            source.split_at_checked(slice.len()).expect("there are as many bytes as the slices take");
        slice.copy_from(head);
        source = rest;
    }
}

/// Fills the slices with zeros.
pub fn fill_guest_zero(slices: &[GuestSlice]) {
    for slice in slices {
        zero_from(slice, 0);
    }
}

/// Fills a slice with zeros from `offset` bytes on.
pub(crate) fn zero_from(slice: &GuestSlice, offset: usize) {
    static ZEROS: [u8; 4096] = [0; 4096];
    let mut done = offset;
    while done < slice.len() {
        let count = ZEROS.len().min(slice.len() - done);
        let piece = slice.subslice(done, count).expect("the count is cut to the slice");
        piece.copy_from(&ZEROS[..count]);
        done += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guest slices over memory that is leaked, so that `'static` holds.
    fn guest(lens: &[usize]) -> Vec<GuestSlice> {
        lens.iter().map(|len| GuestSlice::from(Box::leak(vec![0u8; *len].into_boxed_slice()))).collect()
    }

    #[test]
    fn copies_cut_and_join_guest_slices() {
        let slices = guest(&[3, 0, 10, 5000]);
        assert_eq!(guest_len(&slices), 5013);
        let mut buffer = AlignedBuf::new(6000);
        for (at, byte) in buffer.as_mut_slice().iter_mut().enumerate() {
            *byte = (at % 251) as u8;
        }
        copy_to_guest(buffer.as_slice(), 100, &slices);
        let cut = subrange(&slices, 2, 4000);
        assert_eq!(cut.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [1, 10, 3989]);
        let mut back = AlignedBuf::new(4001);
        copy_from_guest(&cut, &mut back, 1);
        assert_eq!(&back.as_slice()[1..], &buffer.as_slice()[102..4102]);
        fill_guest_zero(&cut);
        copy_from_guest(&subrange(&slices, 0, 4001), &mut back, 0);
        assert_eq!(&back.as_slice()[..3], &[100, 101, 0]);
        assert!(subrange(&slices, 5013, 0).is_empty());
    }

    #[test]
    #[should_panic(expected = "beyond the guest slices")]
    fn a_range_beyond_the_slices_is_a_program_error() {
        subrange(&guest(&[10]), 5, 6);
    }
}
