//! Memory of ours for I/O: aligned buffers, a pool of them, and copies between them and guest memory.
//!
//! It never touches a file. Guest memory is only ever copied, never borrowed as a slice of bytes: the guest may change
//! it at any moment.

use std::alloc::{self, Layout};
use std::cell::RefCell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use smallvec::SmallVec;

use crate::GuestSlice;

/// The alignment of an [`AlignedBuf`] in bytes unless more is asked for. No host that we open for direct I/O asks for
/// more.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// The smallest and the largest buffer that a [`BufferPool`] keeps, in bytes.
const CLASS_BYTES_MIN: usize = BUFFER_ALIGNMENT;
const CLASS_BYTES_MAX: usize = 4 << 20;
const CLASSES: usize = (CLASS_BYTES_MAX / CLASS_BYTES_MIN).trailing_zeros() as usize + 1;

/// A list of guest slices, short enough most of the time to need no heap.
pub type GuestSlices = SmallVec<[GuestSlice; 4]>;

/// A heap buffer whose address is a multiple of 4096 (or more) and whose bytes are always initialised.
pub struct AlignedBuf {
    pointer: NonNull<u8>,
    len: usize,
    /// What was allocated; its size is a multiple of its alignment and at least one alignment.
    layout: Layout,
}

// SAFETY: the buffer owns its allocation alone, so it may move between threads and be shared like a Vec<u8>.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; a shared reference gives only shared access to the bytes.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes, aligned to [`BUFFER_ALIGNMENT`].
    pub fn new(len: usize) -> Self {
        Self::with_alignment(len, BUFFER_ALIGNMENT)
    }

    /// `len` zero bytes at an address that is a multiple of `alignment`, a power of two; less than
    /// [`BUFFER_ALIGNMENT`] counts as that.
    ///
    /// # Panics
    /// When `alignment` is not a power of two or `len` is beyond the address space: both are errors of the program,
    /// as a length that comes from outside must have been bounded long before.
    pub fn with_alignment(len: usize, alignment: usize) -> Self {
        let alignment = alignment.max(BUFFER_ALIGNMENT);
        let layout = Layout::from_size_align(len.max(1), alignment)
            .and_then(|layout| {
                let padded = layout.size().checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
                Layout::from_size_align(padded, alignment)
            })
            .expect("a buffer's alignment is a power of two and its length fits the address space");
        // SAFETY: the layout's size is at least one alignment, so it is not zero.
        let pointer = unsafe { alloc::alloc_zeroed(layout) };
        let pointer = NonNull::new(pointer).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        AlignedBuf { pointer, len, layout }
    }

    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes allocated: the most that [`AlignedBuf::set_len`] takes.
    pub fn capacity(&self) -> usize {
        self.layout.size()
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` is at most the allocation's size, every byte was initialised by alloc_zeroed, and writing
        // needs `&mut self`. The kernel writes only while the buffer is inside an operation, where nobody has a borrow.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }

    /// Forgets all bytes from `len` on; nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Sets the length to `len`, up or down. Bytes that come back into view hold whatever they held before.
    ///
    /// # Panics
    /// When `len` is above [`AlignedBuf::capacity`].
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit a buffer of {}", self.capacity());
        self.len = len;
    }

    /// The address, for the kernel: reading and writing through it is for operations that own the buffer.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout by alloc_zeroed, and freed only here.
        unsafe { alloc::dealloc(self.pointer.as_ptr(), self.layout) };
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// One thread's stock of buffers, so that the steady state allocates nothing. Free buffers lie in lists by size, powers
/// of two from 4 KiB to 4 MiB; together they never hold more than a bound. Larger buffers are not kept.
pub struct BufferPool {
    free: RefCell<Free>,
    bytes_max: usize,
}

struct Free {
    classes: [Vec<AlignedBuf>; CLASSES],
    bytes: usize,
}

impl BufferPool {
    /// An empty pool that keeps at most `bytes_max` bytes of free buffers.
    pub fn new(bytes_max: usize) -> Self {
        let free = Free { classes: std::array::from_fn(|_| Vec::new()), bytes: 0 };
        BufferPool { free: RefCell::new(free), bytes_max }
    }

    /// A buffer of `len` bytes which hold anything (initialised, but perhaps by an earlier request: never show them to
    /// a guest unwritten).
    pub fn take(&self, len: usize) -> AlignedBuf {
        let Some(class) = class_of(len) else { return AlignedBuf::new(len) };
        let kept = self.free.borrow_mut().pop(class);
        let mut buffer = kept.unwrap_or_else(|| AlignedBuf::new(CLASS_BYTES_MIN << class));
        buffer.set_len(len);
        buffer
    }

    /// A buffer of `len` zero bytes.
    pub fn take_zeroed(&self, len: usize) -> AlignedBuf {
        let Some(class) = class_of(len) else { return AlignedBuf::new(len) };
        let kept = self.free.borrow_mut().pop(class);
        match kept {
            Some(mut buffer) => {
                buffer.set_len(len);
                buffer.as_mut_slice().fill(0);
                buffer
            }
            None => {
                let mut buffer = AlignedBuf::new(CLASS_BYTES_MIN << class);
                buffer.set_len(len);
                buffer
            }
        }
    }

    /// Takes a buffer back: kept if it is of a kept size and there is room, else freed.
    pub fn give(&self, buffer: AlignedBuf) {
        let capacity = buffer.capacity();
        let Some(class) = class_of(capacity) else { return };
        if CLASS_BYTES_MIN << class != capacity {
            return;
        }
        let mut free = self.free.borrow_mut();
        if free.bytes + capacity <= self.bytes_max {
            free.bytes += capacity;
            free.classes[class].push(buffer);
        }
    }

    /// Bytes of free buffers held.
    pub fn held_bytes(&self) -> usize {
        self.free.borrow().bytes
    }
}

impl Free {
    fn pop(&mut self, class: usize) -> Option<AlignedBuf> {
        let buffer = self.classes[class].pop()?;
        self.bytes -= buffer.capacity();
        Some(buffer)
    }
}

/// The size class that serves `len` bytes, if the pool keeps such sizes.
fn class_of(len: usize) -> Option<usize> {
    if len > CLASS_BYTES_MAX {
        return None;
    }
    let size = len.max(CLASS_BYTES_MIN).next_power_of_two();
    Some((size / CLASS_BYTES_MIN).trailing_zeros() as usize)
}

/// Bytes that the slices add up to.
pub fn guest_len(slices: &[GuestSlice]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// The slices that make up `len` bytes from `offset` bytes on.
///
/// # Panics
/// When the slices hold fewer than `offset + len` bytes.
pub fn subrange(slices: &[GuestSlice], offset: usize, len: usize) -> GuestSlices {
    let mut out = GuestSlices::new();
    subrange_into(&mut out, slices, offset, len);
    out
}

/// As [`subrange`], in place of what is in `out`, so that its memory is used again.
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

/// Copies all of the slices' bytes into the buffer, from `offset` bytes on. The guest may be changing them meanwhile.
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

/// Fills all of the slices with bytes, from `offset` on.
///
/// # Panics
/// When there are too few.
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

/// Takes memory of the heap away from words that nobody needs: they read as zero afterwards, or as they do now where they
/// and their neighbours among these do not fill a page of the system's. The memory comes back when they are written.
pub fn give_back<'a>(pieces: impl Iterator<Item = &'a [AtomicU64]>) {
    let mut spans: Vec<(usize, &[AtomicU64])> =
        pieces.map(|words| (words.as_ptr() as usize, words)).collect();
    spans.sort_unstable_by_key(|(address, _)| *address);
    for together in spans.chunk_by(|(address, words), (next, _)| address + size_of_val(*words) == *next) {
        let length = together.iter().map(|(_, words)| size_of_val(*words)).sum();
        let (address, first) = together[0];
        drop_pages(first.as_ptr().cast_mut().cast(), address, length);
    }
}

/// Has the system drop its whole pages within a range of words, which lies in one piece at this address.
fn drop_pages(start: *mut u8, address: usize, length: usize) {
    let page = rustix::param::page_size();
    let begin = address.next_multiple_of(page);
    let end = (address + length) / page * page;
    if begin < end {
        // SAFETY: the pages lie within words that the caller has shared references to, and of which any value is valid at any
        // time. If the call fails they are as they were.
        unsafe {
            libc::madvise(start.wrapping_add(begin - address).cast(), end - begin, libc::MADV_DONTNEED)
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    /// Guest slices over memory that is leaked, so that `'static` holds.
    fn guest(lens: &[usize]) -> Vec<GuestSlice> {
        lens.iter().map(|len| GuestSlice::from(Box::leak(vec![0u8; *len].into_boxed_slice()))).collect()
    }

    #[test]
    fn buffers_are_aligned_zeroed_and_sized() {
        for (len, alignment) in [(0, 1), (1, 512), (4096, 4096), (5000, 65536)] {
            let mut buffer = AlignedBuf::with_alignment(len, alignment);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_slice().as_ptr() as usize % alignment.max(4096), 0);
            assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
            buffer.as_mut_slice().fill(7);
            buffer.truncate(len / 2);
            buffer.truncate(len);
            assert_eq!(buffer.len(), len / 2);
        }
    }

    #[test]
    fn words_given_back_read_as_zero_and_hold_what_is_stored_then() {
        let words: Vec<AtomicU64> = (1..=5 * 512).map(AtomicU64::new).collect();
        // In pieces, of which none has a page to itself, in no order.
        let pieces = [2, 0, 5, 4, 1, 3].map(|n| &words[100 + n * 256..100 + (n + 1) * 256]);
        give_back(pieces.into_iter());
        let values = || words.iter().map(|word| word.load(Ordering::Relaxed));
        let zeros = values().filter(|value| *value == 0).count();
        assert_eq!(zeros % 512, 0);
        assert!((2 * 512..=3 * 512).contains(&zeros), "{zeros} words: all pages within the range");
        assert!(values().zip(1..).all(|(value, before)| value == 0 || value == before));
        assert!(values().take(100).chain(values().skip(100 + 3 * 512)).all(|value| value != 0));
        words.iter().zip(7..).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        assert!(values().zip(7..).all(|(value, stored)| value == stored));
        give_back([&words[..3], &words[4..5]].into_iter());
        assert_eq!(values().next(), Some(7), "less than a page stays");
    }

    #[test]
    fn pool_reuses_zeroes_and_is_bounded() {
        let pool = BufferPool::new(16384);
        let mut buffer = pool.take(5000);
        assert_eq!((buffer.len(), buffer.capacity()), (5000, 8192));
        buffer.as_mut_slice().fill(9);
        let address = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(pool.held_bytes(), 8192);
        let again = pool.take_zeroed(8192);
        assert_eq!(again.as_ptr(), address);
        assert!(again.as_slice()[..5000].iter().all(|byte| *byte == 0));
        pool.give(again);
        pool.give(AlignedBuf::new(16384));
        pool.give(AlignedBuf::new(3 * 4096));
        pool.give(AlignedBuf::new(8 << 20));
        assert_eq!(pool.held_bytes(), 8192);
        assert_eq!(pool.take(8 << 20).len(), 8 << 20);
        assert!(pool.take(0).is_empty());
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
