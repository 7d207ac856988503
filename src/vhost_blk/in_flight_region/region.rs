//! The in-flight region as memory: a new memfd for a frontend that asks for one, and the mapping of the one that it
//! sends back.
//!
//! Owns the mapping and the only unsafe code of in-flight tracking. No number from the message is trusted: the file is
//! as long as the message claims, and only the bytes of the layout are mapped. The frontend may truncate its file
//! later; `loss` handles that as for guest memory.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::VhostUserInflight;

use super::cells::{AreaKind, MAGIC, OWN_VERSION, Own, Packed, Split};
use super::layout::{JOURNAL_BYTES, Layout, RingKind};
use crate::device::JournalMemory;
use crate::loss::MemoryLoss;
use crate::shared_file::{Mapping, Piece, ShareError, SharedPiece};

/// The values of [`Own::write_cache`].
const CACHE_OFF: u8 = 1;
const CACHE_ON: u8 = 2;

/// The reasons why an in-flight region is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("an in-flight region for {queues} queues: it must be for 1 to {limit}")]
    Queues { queues: u16, limit: u16 },
    #[error("an in-flight region for queues of {size} descriptors: it must be for 1 to {limit}")]
    QueueSize { size: u16, limit: u16 },
    #[error("an in-flight region of {bytes:#x} bytes: its queues need {needed:#x}")]
    TooShort { bytes: u64, needed: u64 },
    #[error("an in-flight region: {0}")]
    File(#[from] ShareError),
    #[error("an in-flight region: cannot {step}: {source}")]
    Host { step: &'static str, source: io::Error },
}

/// What a frontend claims about a region, and the bounds for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    bytes: u64,
    offset: u64,
    layout: Layout,
}

impl Claim {
    /// Checks the claimed numbers of queues and descriptors, each from 1 to its limit in `most`. The region is for rings of
    /// the kind in `most`.
    ///
    /// # Errors
    /// When one is out of its range.
    pub(crate) fn check(claimed: &VhostUserInflight, most: Layout) -> Result<Self, RegionError> {
        // The message is packed, so its fields are copied out.
        let VhostUserInflight { mmap_size: bytes, mmap_offset: offset, num_queues, queue_size } = *claimed;
        if !(1..=most.queues).contains(&num_queues) {
            return Err(RegionError::Queues { queues: num_queues, limit: most.queues });
        }
        if !(1..=most.queue_size).contains(&queue_size) {
            return Err(RegionError::QueueSize { size: queue_size, limit: most.queue_size });
        }
        Ok(Claim { bytes, offset, layout: Layout { queues: num_queues, queue_size, ..most } })
    }

    /// A new region with this layout (GET_INFLIGHT_FD): its file, sealed against any change of its length, and the
    /// message that describes it. All queue areas are zero, which means that they hold nothing.
    ///
    /// # Errors
    /// When the host refuses the file.
    pub(crate) fn create(self) -> Result<(VhostUserInflight, File), RegionError> {
        let failed = |step| move |source: io::Error| RegionError::Host { step, source };
        let bytes = self.layout.bytes() as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let make = |more| rustix::fs::memfd_create("strata-in-flight", flags | more);
        // Linux before 6.3 does not know NOEXEC_SEAL; later ones may refuse a file without it (vm.memfd_noexec).
        let file = make(MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| make(MemfdFlags::empty()))
            .map_err(|error| failed("create its file")(error.into()))?;
        let file = File::from(file);
        file.set_len(bytes).map_err(failed("set its length"))?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| failed("seal its file")(error.into()))?;
        // The two fields of `Own` that say whose page it is.
        let mark = [&MAGIC.to_ne_bytes()[..], &OWN_VERSION.to_ne_bytes()].concat();
        file.write_all_at(&mark, self.layout.own_at() as u64).map_err(failed("mark it"))?;
        let Layout { queues, queue_size, .. } = self.layout;
        Ok((VhostUserInflight::new(bytes, 0, queues, queue_size), file))
    }
}

/// A mapped region.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    mapping: Arc<Mapping>,
    layout: Layout,
    /// The mapping holds Strata's page, whoever it belongs to.
    has_own: bool,
    /// The mapping holds the journal, whoever it belongs to. A region of an earlier version ends before it.
    has_journal: bool,
}

impl Region {
    /// Maps a region that a frontend sent (SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// When its file is shorter than claimed or no file at all, or the host refuses.
    pub(crate) fn map(claim: Claim, file: File, loss: &Arc<MemoryLoss>) -> Result<Self, RegionError> {
        let Claim { bytes, offset, layout } = claim;
        let piece = SharedPiece::check(Piece { offset, bytes }, file)?;
        let needed = layout.areas_bytes() as u64;
        if bytes < needed {
            return Err(RegionError::TooShort { bytes, needed });
        }
        // Never more than the layout has, whatever the claim.
        let has_own = bytes >= layout.journal_at() as u64;
        let has_journal = bytes >= layout.bytes() as u64;
        let used = match (has_own, has_journal) {
            (_, true) => layout.bytes(),
            (true, false) => layout.journal_at(),
            (false, false) => layout.areas_bytes(),
        };
        Ok(Region { mapping: Arc::new(piece.map(used, loss)?), layout, has_own, has_journal })
    }

    /// A new region that no frontend has.
    ///
    /// # Errors
    /// When the host refuses it.
    pub(crate) fn alone(layout: Layout) -> Result<Self, RegionError> {
        let (message, file) = Claim { bytes: 0, offset: 0, layout }.create()?;
        Self::map(Claim::check(&message, layout)?, file, &Arc::default())
    }

    /// Whether a page of the region was lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.mapping.watch.is_lost()
    }

    /// Empties the areas of all queues. No worker runs.
    pub(crate) fn empty(&self) {
        (0..self.layout.queues).for_each(|index| self.empty_queue(index));
    }

    /// Empties the area of a queue, if there is one. Its worker does not run.
    pub(crate) fn empty_queue(&self, index: u16) {
        if let Some(area) = self.queue::<Split>(index) {
            area.header().version.store(0);
        }
        if let Some(area) = self.queue::<Packed>(index) {
            area.header().version.store(0);
        }
    }

    /// The kind of rings that the region is for.
    pub(crate) fn kind(&self) -> RingKind {
        self.layout.kind
    }

    /// The area of a queue; `None` if the region has none for it, or is for the other kind of rings.
    pub(crate) fn queue<K: AreaKind>(&self, index: u16) -> Option<QueueArea<K>> {
        let () = K::SIZES_AND_ALIGNMENT;
        (index < self.layout.queues && self.layout.kind == K::KIND).then(|| QueueArea {
            mapping: Arc::clone(&self.mapping),
            at: self.layout.queue_at(index),
            entries: usize::from(self.layout.queue_size),
            kind: PhantomData,
        })
    }

    /// Whether the region has Strata's page, and so keeps the write cache.
    pub(crate) fn keeps_write_cache(&self) -> bool {
        self.own().is_some()
    }

    /// What the guest last set its write cache to, if the region says so.
    pub(crate) fn write_cache(&self) -> Option<bool> {
        match self.own()?.write_cache.load() {
            CACHE_OFF => Some(false),
            CACHE_ON => Some(true),
            _ => None,
        }
    }

    /// Keeps what the guest set its write cache to. Without effect if the region was made by another program.
    pub(crate) fn keep_write_cache(&self, on: bool) {
        if let Some(own) = self.own() {
            own.write_cache.store(if on { CACHE_ON } else { CACHE_OFF });
        }
    }

    /// The memory of the device's journal, if the region has one. It keeps the mapping.
    pub(crate) fn journal(&self) -> Option<JournalMemory> {
        if !self.has_journal || self.own().is_none() {
            return None;
        }
        let mapping = Arc::clone(&self.mapping);
        Some(Arc::new(JournalArea { mapping, at: self.layout.journal_at() }))
    }

    /// Strata's page, if the region has one.
    fn own(&self) -> Option<&Own> {
        if !self.has_own {
            return None;
        }
        // SAFETY: the page lies in the mapping, which `self` keeps, at a multiple of 4096 bytes. It consists of atomics,
        // for which every bit pattern is a value, and which others may change at any time.
        let own = unsafe { &*self.mapping.memory.as_ptr().add(self.layout.own_at()).cast::<Own>() };
        (own.magic.load() == MAGIC && own.version.load() == OWN_VERSION).then_some(own)
    }
}

/// One queue's area. It keeps the mapping.
#[derive(Debug)]
pub(crate) struct QueueArea<K> {
    mapping: Arc<Mapping>,
    /// Offset in the mapping, in bytes.
    at: usize,
    /// Descriptor states, at least 1.
    entries: usize,
    kind: PhantomData<K>,
}

impl<K: AreaKind> QueueArea<K> {
    #[inline]
    pub(super) fn header(&self) -> &K::Header {
        // SAFETY: the area lies in the mapping, which `self` keeps, at a multiple of 64 bytes, and the mapping is laid
        // out for this kind of rings (see `Layout` and `Region::queue`). The header consists of atomics (`AreaKind`),
        // for which every bit pattern is a value, and which others may change at any time.
        unsafe { &*self.mapping.memory.as_ptr().add(self.at).cast::<K::Header>() }
    }

    #[inline]
    pub(super) fn entries(&self) -> &[K::Entry] {
        // SAFETY: as for the header. So many entries follow it within the mapping.
        unsafe {
            let first = self.mapping.memory.as_ptr().add(self.at + size_of::<K::Header>()).cast::<K::Entry>();
            std::slice::from_raw_parts(first, self.entries)
        }
    }
}

/// The device's journal. It keeps the mapping.
#[derive(Debug)]
struct JournalArea {
    mapping: Arc<Mapping>,
    /// Offset in the mapping, in bytes.
    at: usize,
}

impl AsRef<[AtomicU64]> for JournalArea {
    #[inline]
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: the area lies in the mapping, which `self` keeps, at a multiple of 4096 bytes (see `Layout`). It
        // consists of atomics, for which every bit pattern is a value, and which others may change at any time.
        unsafe {
            let first = self.mapping.memory.as_ptr().add(self.at).cast::<AtomicU64>();
            std::slice::from_raw_parts(first, JOURNAL_BYTES / size_of::<AtomicU64>())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    const MOST: Layout = Layout { kind: RingKind::Split, queues: 4, queue_size: 256 };

    fn claim(bytes: u64, offset: u64, queues: u16, size: u16) -> Result<Claim, RegionError> {
        Claim::check(&VhostUserInflight::new(bytes, offset, queues, size), MOST)
    }

    fn map(bytes: u64, offset: u64, file: &File) -> Result<Region, RegionError> {
        let file = file.try_clone().expect("a copy");
        Region::map(claim(bytes, offset, 2, 128)?, file, &Arc::default())
    }

    #[test]
    fn a_new_region_is_sealed_and_empty() {
        let (message, file) = claim(0, 0, 2, 128).and_then(Claim::create).expect("a region");
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = message;
        assert_eq!((mmap_size, mmap_offset, num_queues, queue_size), (12288 + (1 << 20), 0, 2, 128));
        assert_eq!(file.metadata().expect("its length").len(), mmap_size);
        assert!(file.set_len(0).is_err() && file.set_len(2 * mmap_size).is_err());
        let region = map(mmap_size, 0, &file).expect("it fits");
        for index in 0..2 {
            let area = region.queue::<Split>(index).expect("an area");
            assert_eq!((area.header().version.load(), area.entries().len()), (0, 128));
        }
        assert!(region.queue::<Split>(2).is_none());
        assert!(region.queue::<Packed>(1).is_none(), "of another kind");
    }

    #[test]
    fn the_write_cache_outlives_the_mapping() {
        let (message, file) = claim(0, 0, 2, 128).and_then(Claim::create).expect("a region");
        let bytes = message.mmap_size;
        assert_eq!(map(bytes, 0, &file).expect("it fits").write_cache(), None);
        for on in [false, true] {
            map(bytes, 0, &file).expect("it fits").keep_write_cache(on);
            assert_eq!(map(bytes, 0, &file).expect("it fits").write_cache(), Some(on));
        }
        let foreign = map(8192, 0, &file).expect("the areas of another program fit");
        foreign.keep_write_cache(false);
        assert_eq!((foreign.keeps_write_cache(), foreign.write_cache()), (false, None));
        assert_eq!(map(bytes, 0, &file).expect("it fits").write_cache(), Some(true), "left alone");
        file.write_all_at(&[9], 8192).expect("another magic");
        assert_eq!(map(bytes, 0, &file).expect("it fits").write_cache(), None);
    }

    #[test]
    fn a_journal_outlives_the_mapping_and_stays_within_its_part() {
        let (message, file) = claim(0, 0, 2, 128).and_then(Claim::create).expect("a region");
        let bytes = message.mmap_size;
        let words = |journal: &JournalMemory| (**journal).as_ref().len();
        let journal = map(bytes, 0, &file).expect("it fits").journal().expect("a journal");
        assert_eq!(words(&journal), (1 << 20) / 8);
        (*journal).as_ref()[0].store(1, Ordering::Relaxed);
        (*journal).as_ref()[words(&journal) - 1].store(2, Ordering::Relaxed);
        drop(journal);
        let again = map(bytes, 0, &file).expect("it fits").journal().expect("a journal");
        let ends = [0, words(&again) - 1].map(|at| (*again).as_ref()[at].load(Ordering::Relaxed));
        assert_eq!(ends, [1, 2]);
        let mut raw = [0; 8];
        for (at, word) in [(12288, 1), (bytes - 8, 2)] {
            file.read_exact_at(&mut raw, at).expect("its bytes");
            assert_eq!(u64::from_ne_bytes(raw), word);
        }
        assert!(map(12288, 0, &file).expect("it fits").journal().is_none(), "of an earlier version");
        file.write_all_at(&[9], 8192).expect("another magic");
        assert!(map(bytes, 0, &file).expect("it fits").journal().is_none(), "of another program");
    }

    #[test]
    fn impossible_numbers_are_refused() {
        for (queues, size) in [(0, 128), (5, 128), (2, 0), (2, 257), (u16::MAX, u16::MAX)] {
            assert!(claim(1 << 40, 0, queues, size).is_err(), "{queues} queues of {size}");
        }
        let (_, file) = claim(0, 0, 2, 128).and_then(Claim::create).expect("a region");
        let cases = [
            (0, 0, "nothing"),
            (4223, 0, "shorter than the areas"),
            (12289 + (1 << 20), 0, "longer than the file"),
            (u64::MAX, 0, "as long as can be"),
            (12288 + (1 << 20), 4096, "its end is beyond the file"),
            (4224, u64::MAX - 4095, "its end overflows"),
            (4224, i64::MAX as u64 & !4095, "its end overflows a file offset"),
            (4224, 64, "an offset inside a page"),
        ];
        for (bytes, offset, what) in cases {
            assert!(map(bytes, offset, &file).is_err(), "{what}");
        }
        assert!(map(4224, 4096, &file).is_ok());
        let null = File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
        assert!(matches!(map(4224, 0, &null), Err(RegionError::File(ShareError::NotAFile))));
        let (pipe, _) = io::pipe().expect("a pipe");
        assert!(map(4224, 0, &File::from(std::os::fd::OwnedFd::from(pipe))).is_err());
    }

    #[test]
    fn a_file_that_is_truncated_is_noticed() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(12288).expect("its length");
        let loss = Arc::new(MemoryLoss::new().expect("an eventfd"));
        let checked = claim(12288, 0, 2, 128).expect("in range");
        let region = Region::map(checked, file.try_clone().expect("a copy"), &loss).expect("it fits");
        let area = region.queue::<Split>(1).expect("an area");
        area.header().used_idx.store(7);
        assert!(!region.is_lost() && !loss.is_lost());
        file.set_len(0).expect("it is cut");
        area.entries()[127].counter.store(1);
        assert!(region.is_lost() && loss.is_lost());
    }
}
