//! The daemon's own memory for I/O: aligned buffers and a pool of them. It never touches a file or guest memory.

use std::alloc::{self, Layout};
use std::cell::RefCell;
use std::fmt;
use std::ptr::NonNull;

/// The alignment of an [`AlignedBuf`] in bytes, unless a larger one is requested. No file that we open for direct I/O
/// needs more.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// The smallest and the largest buffer that a [`BufferPool`] keeps, in bytes.
const CLASS_BYTES_MIN: usize = BUFFER_ALIGNMENT;
const CLASS_BYTES_MAX: usize = 4 << 20;
const CLASSES: usize = (CLASS_BYTES_MAX / CLASS_BYTES_MIN).trailing_zeros() as usize + 1;

/// A heap buffer whose address is a multiple of 4096 (or more) and whose bytes are always initialised.
pub struct AlignedBuf {
    pointer: NonNull<u8>,
    len: usize,
    /// The allocation. Its size is a multiple of its alignment, and not 0.
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
    /// When `alignment` is not a power of two or `len` exceeds the address space. Both are programmer errors: untrusted
    /// lengths are bounded long before.
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
        // SAFETY: `len` is at most the allocation's size, every byte was initialised by alloc_zeroed, and writing needs
        // `&mut self`. The kernel writes only while an operation owns the buffer, and then no borrow exists.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }

    /// Shortens the buffer to `len` bytes; no effect if it is shorter.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Sets the length to `len`, up or down. Bytes that become visible again keep their old values.
    ///
    /// # Panics
    /// When `len` is above [`AlignedBuf::capacity`].
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit a buffer of {}", self.capacity());
        self.len = len;
    }

    /// The address, for the kernel: only an operation that owns the buffer may read or write through it.
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

/// One thread's free buffers, so that the steady state allocates nothing. They are listed by size, powers of two from 4
/// KiB to 4 MiB, and bounded in total. Larger buffers are freed at once.
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

    /// A buffer of `len` bytes with old contents: initialised, but perhaps by an earlier request. Never show them to a
    /// guest unwritten.
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

    /// Takes a buffer back. It is freed if its size has no list or the bound is reached.
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
