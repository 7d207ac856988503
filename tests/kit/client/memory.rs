//! The guest memory of the client: one memfd, mapped once, shared with the device.
//!
//! Owns the mapping and all unsafe code of the kit. It never hands out plain references into the mapping, because
//! the device may write there at any time. Access is by atomics ([`View`]) or by copying.

use std::fs::File;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

// virtio 1.x fields are little-endian, and the kit stores them as they are.
const _: () = assert!(cfg!(target_endian = "little"), "the client is written for little-endian hosts");

/// Guest address of the first byte of the mapping. Not 0, to expose a device that confuses guest addresses with
/// offsets. Below 4 GiB on purpose: no device may depend on that either way.
pub const GUEST_BASE: u64 = 0x4000_0000;

/// The page size of the layout, in bytes.
pub const PAGE: usize = 4096;

/// A mapped memfd of fixed length.
#[derive(Debug)]
pub struct SharedMemory {
    base: NonNull<u8>,
    length: usize,
    file: File,
}

// SAFETY: the mapping belongs to this value until it is dropped, and is not tied to a thread. It is only reached
// through atomics and copies of raw bytes, for which no exclusive access is claimed.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; every method takes &self and treats the bytes as changing at any time.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Allocates and maps zeroed memory of `length` bytes, rounded up to whole pages. Pages cost nothing until
    /// touched.
    ///
    /// # Errors
    /// When the host refuses the memfd, its length or the mapping.
    pub fn new(length: usize) -> std::io::Result<Self> {
        let length = length.max(1).next_multiple_of(PAGE);
        let fd = memfd_create("strata-tests", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, length as u64)?;
        // SAFETY: a new shared mapping of a file of exactly `length` bytes at an address the kernel chooses.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(address.cast::<u8>()).expect("mmap never maps at address 0 unless asked to");
        Ok(Self { base, length, file: File::from(fd) })
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The memfd, to be sent to the device.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The guest address of the byte at `offset`.
    pub fn guest_address(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// The address of the byte at `offset` in this process, for SET_VRING_ADDR.
    pub fn user_address(&self, offset: usize) -> u64 {
        self.base.as_ptr() as u64 + offset as u64
    }

    /// Describes the memory as `count` adjacent regions of whole pages, sorted by guest address. Returns fewer
    /// regions if there are fewer pages.
    pub fn regions(&self, count: usize) -> Vec<VhostUserMemoryRegionInfo> {
        let pages = self.length / PAGE;
        let count = count.clamp(1, pages);
        (0..count)
            .map(|index| {
                let start = pages * index / count * PAGE;
                let end = pages * (index + 1) / count * PAGE;
                VhostUserMemoryRegionInfo {
                    guest_phys_addr: self.guest_address(start),
                    memory_size: (end - start) as u64,
                    userspace_addr: self.user_address(start),
                    mmap_offset: start as u64,
                    mmap_handle: self.file.as_raw_fd(),
                }
            })
            .collect()
    }

    /// Copies bytes into the memory.
    ///
    /// # Panics
    /// When the range is not inside the memory.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.assert_inside(offset, bytes.len());
        // SAFETY: the destination range was just checked. A borrowed slice cannot be part of the mapping, because
        // no reference into the mapping exists.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(offset), bytes.len());
        }
    }

    /// Copies bytes out of the memory.
    ///
    /// # Panics
    /// When the range is not inside the memory.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.assert_inside(offset, bytes.len());
        // SAFETY: the source range was just checked, and a borrowed slice cannot be part of the mapping. The device
        // may write at the same time only if it breaks the protocol; bytes of any value are valid here.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Sets `length` bytes from `offset` to `value`.
    ///
    /// # Panics
    /// When the range is not inside the memory.
    pub fn fill(&self, offset: usize, length: usize, value: u8) {
        self.assert_inside(offset, length);
        // SAFETY: the range was just checked; see `write`.
        unsafe {
            std::ptr::write_bytes(self.base.as_ptr().add(offset), value, length);
        }
    }

    fn assert_inside(&self, offset: usize, length: usize) {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.length);
        assert!(
            inside,
            "range {offset:#x}+{length:#x} is outside the {:#x} bytes of shared memory",
            self.length
        );
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: `new` created the mapping with this address and length, and no View outlives its Arc. A failure
        // to unmap only leaves the mapping behind, which is harmless.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// An integer that the device may change at any time.
///
/// # Safety
/// Every bit pattern must be a valid value, and shared access must be allowed.
pub unsafe trait Shared {}
// SAFETY: any bits are valid for atomics, and they may be shared.
unsafe impl Shared for AtomicU8 {}
// SAFETY: as above.
unsafe impl Shared for AtomicU16 {}
// SAFETY: as above.
unsafe impl Shared for AtomicU32 {}
// SAFETY: as above.
unsafe impl Shared for AtomicU64 {}

/// A run of atomics inside a [`SharedMemory`], which it keeps mapped. Dereferences to a slice.
#[derive(Debug)]
pub struct View<T: Shared> {
    memory: Arc<SharedMemory>,
    start: NonNull<T>,
    count: usize,
    kind: PhantomData<T>,
}

// SAFETY: a View is an owned handle on shared memory, whose items are atomics.
unsafe impl<T: Shared> Send for View<T> {}

impl<T: Shared> View<T> {
    /// Views `count` items from the byte `offset` on.
    ///
    /// # Panics
    /// When the range is not inside the memory or not aligned for `T`.
    pub fn new(memory: &Arc<SharedMemory>, offset: usize, count: usize) -> Self {
        let bytes = count.checked_mul(size_of::<T>()).expect("a view's length fits in memory");
        memory.assert_inside(offset, bytes);
        assert!(offset.is_multiple_of(align_of::<T>()), "a view must be aligned");
        // SAFETY: the offset is inside the mapping, as was just checked.
        let start = unsafe { memory.base.add(offset) }.cast::<T>();
        Self { memory: Arc::clone(memory), start, count, kind: PhantomData }
    }
}

impl<T: Shared> Deref for View<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        debug_assert!(self.memory.length > 0);
        // SAFETY: `new` checked range and alignment, the Arc keeps the mapping, and `Shared` items may change under
        // a shared reference.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn bytes_and_views_meet() {
        let memory = Arc::new(SharedMemory::new(3 * PAGE - 7).expect("memfd"));
        assert_eq!(memory.length(), 3 * PAGE);
        let view = View::<AtomicU32>::new(&memory, PAGE, 4);
        memory.write(PAGE + 4, &[1, 2, 3, 4]);
        assert_eq!(view[1].load(Ordering::Relaxed), 0x0403_0201);
        view[3].store(u32::MAX, Ordering::Relaxed);
        let mut bytes = [0; 4];
        memory.read(PAGE + 12, &mut bytes);
        assert_eq!(bytes, [255; 4]);
    }

    #[test]
    fn regions_cover_the_memory_in_order() {
        let memory = SharedMemory::new(10 * PAGE).expect("memfd");
        for count in [1, 3, 10, 99] {
            let regions = memory.regions(count);
            assert_eq!(regions.len(), count.min(10));
            let mut next = 0;
            for region in &regions {
                assert_eq!(region.mmap_offset, next);
                assert_eq!(region.guest_phys_addr, GUEST_BASE + next);
                next += region.memory_size;
            }
            assert_eq!(next, 10 * PAGE as u64);
        }
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_range_outside_is_a_programmer_error() {
        SharedMemory::new(PAGE).expect("memfd").write(PAGE - 1, &[0, 0]);
    }
}
