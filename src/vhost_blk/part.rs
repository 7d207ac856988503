//! A part of a ring in guest memory: the descriptor table, the available ring or the used ring. It is located once, and
//! then read and written by offset.
//!
//! Consecutive guest addresses may lie in two mappings. Few guests place a ring there; for them, each access searches
//! the mappings for its address. Every access is checked against the part's end, and no contents are trusted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::{ByteValued, Bytes, GuestAddress, VolatileMemory};

use crate::error::BadAddress;
use crate::memory::{GuestMemory, Mapped};

/// The location of a part. It keeps the mappings that hold the part.
#[derive(Debug)]
pub(crate) struct Part {
    base: u64,
    bytes: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// All of it in one mapping, from this offset on.
    Whole(Mapped, usize),
    /// In several mappings.
    Spread(Arc<GuestMemory>),
}

impl Part {
    /// Finds a part of `bytes` bytes.
    ///
    /// # Errors
    /// When some of it is outside guest memory.
    pub(crate) fn find(memory: &Arc<GuestMemory>, base: u64, bytes: usize) -> Result<Self, BadAddress> {
        let place = match memory.mapping_of(base, bytes) {
            Some((mapped, start)) => Place::Whole(mapped.clone(), start),
            None => {
                memory.check(GuestAddress(base), bytes as u64)?;
                Place::Spread(Arc::clone(memory))
            }
        };
        Ok(Part { base, bytes, place })
    }

    /// Loads a little-endian number.
    ///
    /// # Errors
    /// When it is not within the part, or not aligned in our memory.
    // The offset and the order are constants wherever it is called, so most of it goes when it is inlined.
    #[inline(always)]
    pub(crate) fn load(&self, offset: usize, order: Ordering) -> Result<u16, BadAddress> {
        self.check::<u16>(offset)?;
        let raw = match &self.place {
            Place::Whole(mapped, start) => {
                mapped.memory().get_atomic_ref::<AtomicU16>(start + offset).map(|raw| raw.load(order)).ok()
            }
            Place::Spread(memory) => memory.map().load(self.address(offset), order).ok(),
        };
        raw.map(u16::from_le).ok_or_else(|| self.bad::<u16>(offset))
    }

    /// Stores a little-endian number.
    ///
    /// # Errors
    /// As for [`Part::load`].
    #[inline]
    pub(crate) fn store(&self, value: u16, offset: usize, order: Ordering) -> Result<(), BadAddress> {
        #[cfg(test)]
        crate::death::step();
        self.check::<u16>(offset)?;
        let value = value.to_le();
        let stored = match &self.place {
            Place::Whole(mapped, start) => mapped
                .memory()
                .get_atomic_ref::<AtomicU16>(start + offset)
                .map(|raw| raw.store(value, order))
                .ok(),
            Place::Spread(memory) => memory.map().store(value, self.address(offset), order).ok(),
        };
        stored.ok_or_else(|| self.bad::<u16>(offset))
    }

    /// Copies an object out, once.
    ///
    /// # Errors
    /// When it is not within the part.
    #[inline]
    pub(crate) fn read<T: ByteValued>(&self, offset: usize) -> Result<T, BadAddress> {
        self.check::<T>(offset)?;
        let object = match &self.place {
            Place::Whole(mapped, start) => {
                mapped.memory().get_ref::<T>(start + offset).map(|place| place.load()).ok()
            }
            Place::Spread(memory) => memory.map().read_obj(self.address(offset)).ok(),
        };
        object.ok_or_else(|| self.bad::<T>(offset))
    }

    /// Copies an object in.
    ///
    /// # Errors
    /// When it is not within the part.
    #[inline]
    pub(crate) fn write<T: ByteValued>(&self, object: T, offset: usize) -> Result<(), BadAddress> {
        #[cfg(test)]
        crate::death::step();
        self.check::<T>(offset)?;
        let written = match &self.place {
            Place::Whole(mapped, start) => {
                mapped.memory().get_ref::<T>(start + offset).map(|place| place.store(object)).ok()
            }
            Place::Spread(memory) => memory.map().write_obj(object, self.address(offset)).ok(),
        };
        written.ok_or_else(|| self.bad::<T>(offset))
    }

    #[inline]
    fn check<T>(&self, offset: usize) -> Result<(), BadAddress> {
        let within = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.bytes);
        if within { Ok(()) } else { Err(self.bad::<T>(offset)) }
    }

    /// The guest address of an offset in the part.
    fn address(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.base + offset as u64)
    }

    #[cold]
    fn bad<T>(&self, offset: usize) -> BadAddress {
        BadAddress { address: self.base.wrapping_add(offset as u64), length: size_of::<T>() as u64 }
    }
}
