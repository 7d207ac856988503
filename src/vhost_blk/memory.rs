//! Guest memory: maps the regions that a frontend shares, and translates guest addresses.
//!
//! Owns every mapping and turns guest addresses into host addresses. It never decides when a mapping ends: each holder
//! of an `Arc<GuestMemory>` keeps it. No number from the frontend or the guest is trusted.
//!
//! Guest memory is excluded from core dumps. `loss` handles pages that are lost.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::mm::Advice;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    Address, ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileMemory,
};

use crate::descriptor::{self, Kind};
use crate::device::GuestSlice;
use crate::error::{BadAddress, MemoryError};
use crate::loss::{MemoryLoss, Watch};

/// The most regions in a table: KVM has the same limit, so no frontend has more.
pub const MAX_MEMORY_SLOTS: usize = 509;

/// The samples of [`GuestMemory::is_untouched`], in pieces of UNTOUCHED_PIECE bytes, from UNTOUCHED_REGIONS regions. Of
/// each region: all of the first UNTOUCHED_BEGIN bytes, then UNTOUCHED_PIECES pieces, one every UNTOUCHED_STEP bytes.
const UNTOUCHED_REGIONS: usize = 8;
const UNTOUCHED_PIECE: usize = 4096;
const UNTOUCHED_BEGIN: usize = 1 << 20;
const UNTOUCHED_PIECES: usize = 1024;
const UNTOUCHED_STEP: usize = 2 << 20;
/// The most rings whose flags may lie in one piece.
const UNTOUCHED_FLAGS: usize = 8;

/// A region as the frontend describes it: a copy, so that nothing is read twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the frontend's own address space; ring addresses are given in it.
    pub user: u64,
    /// Byte offset in the file.
    pub offset: u64,
}

impl From<&VhostUserMemoryRegion> for RegionInfo {
    fn from(region: &VhostUserMemoryRegion) -> Self {
        RegionInfo {
            guest: region.guest_phys_addr,
            size: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        }
    }
}

/// The mapped memory of a guest, immutable. A change creates a new value, which shares the mappings that stay.
#[derive(Debug)]
pub struct GuestMemory {
    /// The locations of the regions of `map`, in order, for the lookup of request addresses. Declared before `map`, so
    /// that the watches drop first.
    spans: Vec<Span>,
    map: GuestMemoryMmap<()>,
    loss: Arc<MemoryLoss>,
}

/// A region of guest memory.
#[derive(Debug)]
struct Span {
    /// Guest address of its first byte.
    start: u64,
    mapped: Mapped,
}

/// A mapping that the handler for lost pages knows. Every holder drops the watch before the mapping, so the last watch
/// is gone before the last mapping.
#[derive(Clone, Debug)]
pub(crate) struct Mapped {
    watch: Arc<Watch>,
    region: Arc<GuestRegionMmap<()>>,
    /// The mapping of whole pages that the region lies in. Dropped last: it unmaps them.
    _pages: Arc<MmapRegion<()>>,
}

impl Mapped {
    /// The mapping as memory that is addressed by offset.
    #[inline]
    pub(crate) fn memory(&self) -> &MmapRegion<()> {
        &self.region
    }
}

impl GuestMemory {
    /// Memory without any byte.
    pub fn empty() -> Self {
        Self::empty_of(Arc::default())
    }

    fn empty_of(loss: Arc<MemoryLoss>) -> Self {
        GuestMemory { spans: Vec::new(), map: GuestMemoryMmap::new(), loss }
    }

    /// The state of loss of the session's memory.
    pub(crate) fn loss(&self) -> &Arc<MemoryLoss> {
        &self.loss
    }

    /// The mappings, for ranges that may lie in several of them.
    pub fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// The mapping that holds a range, and the offset in it. None if the range is not in guest memory or crosses into
    /// the next region.
    pub(crate) fn mapping_of(&self, address: u64, length: usize) -> Option<(&Mapped, usize)> {
        let after = self.spans.partition_point(|span| span.start <= address);
        let Span { start, mapped } = self.spans.get(after.checked_sub(1)?)?;
        let within = usize::try_from(address - start).ok()?;
        let left = mapped.region.size().checked_sub(within)?;
        (left > 0 && length <= left).then_some((mapped, within))
    }

    /// A range as one piece, where [`GuestMemory::mapping_of`] finds it. Use it under the rules of
    /// [`GuestMemory::translate`].
    pub(crate) fn whole(&self, address: u64, length: usize) -> Option<GuestSlice> {
        let (mapped, within) = self.mapping_of(address, length)?;
        let piece = mapped.memory().get_slice(within, length).ok()?;
        // SAFETY: as in `translate`.
        Some(unsafe { GuestSlice::new(piece.ptr_guard_mut().as_ptr(), piece.len()) })
    }

    /// Checks that a range lies in guest memory, in any number of regions. An empty range must still have an address in
    /// guest memory.
    ///
    /// # Errors
    /// When any byte of it is outside, or its end does not fit 64 bits.
    pub fn check(&self, address: GuestAddress, length: u64) -> Result<(), BadAddress> {
        let GuestAddress(address) = address;
        let bad = BadAddress { address, length };
        let bytes = usize::try_from(length).map_err(|_| bad)?;
        if self.mapping_of(address, bytes).is_some() {
            return Ok(());
        }
        // vm-memory lets a walk wrap around to address 0 when it ends exactly at 2^64.
        address.checked_add(length).ok_or(bad)?;
        let sound = bytes > 0 && self.map.get_slices(GuestAddress(address), bytes).all(|piece| piece.is_ok());
        if sound { Ok(()) } else { Err(bad) }
    }

    /// Translates a range, adding its pieces (one for each region it touches) to `pieces`. The slices are valid only
    /// while this memory is kept. The caller must ensure that, which justifies their `'static`.
    ///
    /// # Errors
    /// As for [`GuestMemory::check`]; then nothing was added.
    pub fn translate(
        &self,
        address: u64,
        length: u32,
        pieces: &mut Vec<GuestSlice>,
    ) -> Result<(), BadAddress> {
        if let Some(piece) = self.whole(address, length as usize) {
            if length > 0 {
                pieces.push(piece);
            }
            return Ok(());
        }
        let bad = BadAddress { address, length: u64::from(length) };
        if length == 0 {
            return Err(bad);
        }
        address.checked_add(u64::from(length)).ok_or(bad)?;
        let before = pieces.len();
        for piece in self.map.get_slices(GuestAddress(address), length as usize) {
            let Ok(piece) = piece else {
                pieces.truncate(before);
                return Err(bad);
            };
            // SAFETY: the piece was checked to lie in a mapping of this table. Its user keeps the table (an Arc)
            // until the last use of the slice: see Worker, which drops its queue before its memory. The guest
            // writes this memory at any time, so all other code, too, uses volatile or atomic accesses or the
            // kernel.
            pieces.push(unsafe { GuestSlice::new(piece.ptr_guard_mut().as_ptr(), piece.len()) });
        }
        Ok(())
    }

    /// Whether there is memory that seems never written. The beginning of each region is zero, and so is a page at
    /// every 2 MiB, where firmware and kernels put their tables and code. In a running guest some of these are not
    /// zero.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.spans.is_empty()
            && self.spans.iter().take(UNTOUCHED_REGIONS).all(|span| {
                let memory = span.mapped.memory();
                let begin = (0..UNTOUCHED_BEGIN).step_by(UNTOUCHED_PIECE);
                let further = (1..=UNTOUCHED_PIECES).map(|step| step * UNTOUCHED_STEP);
                begin.chain(further).take_while(|at| *at < memory.size()).all(|at| {
                    let length = UNTOUCHED_PIECE.min(memory.size() - at);
                    let mut bytes = [0; UNTOUCHED_PIECE];
                    memory.get_slice(at, length).is_ok_and(|piece| {
                        piece.copy_to(&mut bytes[..length]);
                        // A running ring's NO_NOTIFY, which we wrote there ourselves, is no sign of a guest.
                        let mut written = bytes.iter().filter(|byte| **byte != 0);
                        written.clone().count() <= UNTOUCHED_FLAGS && written.all(|byte| *byte == 1)
                    })
                })
            })
    }

    /// Copies an object out of guest memory, once.
    ///
    /// # Errors
    /// When any part of it is outside guest memory.
    pub fn read<T: ByteValued>(&self, address: u64) -> Result<T, BadAddress> {
        let length = size_of::<T>() as u64;
        self.map.read_obj(GuestAddress(address)).map_err(|_| BadAddress { address, length })
    }
}

/// The regions of a session in the order of their guest addresses, and the memory they form.
#[derive(Debug)]
pub struct MemoryTable {
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
}

#[derive(Clone, Debug)]
struct Region {
    info: RegionInfo,
    mapped: Mapped,
}

impl MemoryTable {
    /// A table without regions.
    pub fn new() -> Self {
        Self::watched(Arc::default())
    }

    /// A table without regions, for a session that watches for lost pages.
    pub(crate) fn watched(loss: Arc<MemoryLoss>) -> Self {
        MemoryTable { regions: Vec::new(), memory: Arc::new(GuestMemory::empty_of(loss)) }
    }

    /// The first region that lost a page.
    pub(crate) fn lost_region(&self) -> Option<RegionInfo> {
        self.regions.iter().find(|region| region.mapped.watch.is_lost()).map(|region| region.info)
    }

    fn loss(&self) -> &Arc<MemoryLoss> {
        &self.memory.loss
    }

    /// The current memory.
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    /// A table of exactly these regions (SET_MEM_TABLE), in any order. It contains nothing of this table.
    ///
    /// # Errors
    /// When a region is invalid, does not fit its file, or overlaps another. Every file is closed then.
    pub fn with_regions(&self, infos: &[RegionInfo], files: Vec<File>) -> Result<Self, MemoryError> {
        if infos.len() != files.len() {
            return Err(MemoryError::Descriptors { regions: infos.len(), files: files.len() });
        }
        let regions = infos.iter().zip(files).map(|(info, file)| Region::map(*info, file, self.loss()));
        self.assemble(regions.collect::<Result<_, _>>()?)
    }

    /// This table with one more region (ADD_MEM_REG). The new table keeps the mappings of this one.
    ///
    /// # Errors
    /// As for [`MemoryTable::with_regions`].
    pub fn with_region(&self, info: RegionInfo, file: File) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(Region::map(info, file, self.loss())?);
        self.assemble(regions)
    }

    /// This table without one region (REM_MEM_REG), which must match in guest address, user address and size.
    ///
    /// # Errors
    /// When there is no such region.
    pub fn without_region(&self, info: RegionInfo) -> Result<Self, MemoryError> {
        let found = self.regions.iter().position(|region| {
            (region.info.guest, region.info.size, region.info.user) == (info.guest, info.size, info.user)
        });
        let Some(found) = found else {
            return Err(MemoryError::Unknown { guest: info.guest, size: info.size });
        };
        let mut regions = self.regions.clone();
        regions.remove(found);
        self.assemble(regions)
    }

    /// The guest address after the last byte of the last region; 0 without regions.
    pub fn end(&self) -> u64 {
        // Cannot overflow: checked when the region was mapped.
        self.regions.last().map_or(0, |region| region.info.guest + region.info.size)
    }

    /// The guest address of an address in the frontend's address space.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.info.user)?;
            if offset < region.info.size { region.info.guest.checked_add(offset) } else { None }
        })
    }

    fn assemble(&self, mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_MEMORY_SLOTS {
            return Err(MemoryError::TooMany { limit: MAX_MEMORY_SLOTS });
        }
        if regions.is_empty() {
            return Ok(Self::watched(Arc::clone(self.loss())));
        }
        regions.sort_by_key(|region| region.info.guest);
        for pair in regions.windows(2) {
            // Cannot overflow: checked when the region was mapped.
            if pair[0].info.guest + pair[0].info.size > pair[1].info.guest {
                return Err(MemoryError::Overlap { guest: pair[1].info.guest });
            }
        }
        let spans =
            regions.iter().map(|region| Span { start: region.info.guest, mapped: region.mapped.clone() });
        let spans = spans.collect();
        let mapped = regions.iter().map(|region| Arc::clone(&region.mapped.region)).collect();
        let map = GuestMemoryMmap::from_arc_regions(mapped)
            .map_err(|_| MemoryError::Overlap { guest: regions[0].info.guest })?;
        let loss = Arc::clone(self.loss());
        Ok(MemoryTable { regions, memory: Arc::new(GuestMemory { spans, map, loss }) })
    }
}

impl Default for MemoryTable {
    fn default() -> Self {
        Self::new()
    }
}

impl Region {
    fn map(info: RegionInfo, file: File, loss: &Arc<MemoryLoss>) -> Result<Self, MemoryError> {
        let RegionInfo { guest, size, user, offset } = info;
        if size == 0 {
            return Err(MemoryError::Empty { guest });
        }
        let overflow = MemoryError::Overflow { guest, size };
        let Some(end) = offset.checked_add(size) else { return Err(overflow) };
        let Ok(bytes) = usize::try_from(size) else { return Err(overflow) };
        if guest.checked_add(size).is_none() || user.checked_add(size).is_none() || end > i64::MAX as u64 {
            return Err(overflow);
        }
        let failed = |step, source| MemoryError::Host { guest, step, source };
        let kind = descriptor::kind_of(&file);
        if !matches!(kind, Kind::Memory | Kind::Local) {
            return Err(MemoryError::NotAFile { guest });
        }
        let length =
            descriptor::attributes(&file).map_err(|error| failed("stat its file", error.into()))?.stx_size;
        if end > length {
            return Err(MemoryError::BeyondFile { guest, end, length });
        }
        let page = if kind == Kind::Memory { page_bytes(&file) } else { rustix::param::page_size() };
        // Only whole huge pages can be unmapped, and the length of their file is a multiple of them. Any other file may end
        // within a page.
        let mapped = if page > rustix::param::page_size() { bytes.next_multiple_of(page) } else { bytes };
        let unmappable = |error| failed("map it", io::Error::other(error));
        let pages = MmapRegion::<()>::from_file(FileOffset::new(file, offset), mapped).map_err(unmappable)?;
        let start = pages.as_ptr();
        // SAFETY: the whole pages of a mapping of ours; their contents do not change.
        unsafe { rustix::mm::madvise(start.cast(), bytes.next_multiple_of(page), Advice::LinuxDontDump) }
            .map_err(|error| failed("keep it out of core dumps", error.into()))?;
        // SAFETY: these bytes lie in the mapping of the pages. It stays as long as anything uses the region (see `Mapped`),
        // which unmaps nothing itself.
        let mapping = unsafe { MmapRegion::<()>::build_raw(start, bytes, pages.prot(), pages.flags()) }
            .map_err(unmappable)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(overflow)?;
        debug_assert_eq!(region.start_addr().raw_value() + region.len(), guest + size);
        let watch =
            Watch::new(start, bytes, page, loss).ok_or(MemoryError::TooMany { limit: MAX_MEMORY_SLOTS })?;
        let mapped = Mapped { watch: Arc::new(watch), region: Arc::new(region), _pages: Arc::new(pages) };
        Ok(Region { info, mapped })
    }
}

/// The page size, in bytes, of a file in memory.
pub(crate) fn page_bytes(file: &File) -> usize {
    let usual = rustix::param::page_size();
    match rustix::fs::fstatfs(file) {
        Ok(found) if found.f_type == libc::HUGETLBFS_MAGIC => {
            usize::try_from(found.f_bsize).unwrap_or(usual).max(usual)
        }
        _ => usual,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(bytes).expect("its length");
        file
    }

    fn info(guest: u64, size: u64, user: u64, offset: u64) -> RegionInfo {
        RegionInfo { guest, size, user, offset }
    }

    fn table(infos: &[RegionInfo]) -> Result<MemoryTable, MemoryError> {
        let files = infos.iter().map(|info| file(info.offset.wrapping_add(info.size) & 0xfff_ffff)).collect();
        MemoryTable::new().with_regions(infos, files)
    }

    #[test]
    fn regions_are_sorted_and_addresses_found() {
        let table = table(&[info(4 * PAGE, PAGE, 0x7000_0000, 0), info(0, 2 * PAGE, 0x6000_0000, PAGE)])
            .expect("sound regions");
        assert_eq!(table.guest_address(0x7000_0010), Some(4 * PAGE + 0x10));
        assert_eq!(table.guest_address(0x6000_0000), Some(0));
        assert_eq!(table.guest_address(0x6000_0000 + 2 * PAGE), None);
        assert!(table.memory().check(GuestAddress(0), 2 * PAGE).is_ok());
        assert!(table.memory().check(GuestAddress(0), 2 * PAGE + 1).is_err());
    }

    #[test]
    fn impossible_regions_are_refused() {
        let cases: &[(&str, Vec<RegionInfo>)] = &[
            ("empty", vec![info(0, 0, 0, 0)]),
            ("guest overflow", vec![info(u64::MAX - 10, PAGE, 0, 0)]),
            ("user overflow", vec![info(0, PAGE, u64::MAX - 10, 0)]),
            ("offset overflow", vec![info(0, PAGE, 0, u64::MAX - 10)]),
            ("offset beyond off_t", vec![info(0, PAGE, 0, i64::MAX as u64)]),
            ("overlap", vec![info(0, 2 * PAGE, 0, 0), info(PAGE, PAGE, 0, 0)]),
            ("same", vec![info(0, PAGE, 0, 0), info(0, PAGE, 0, 0)]),
            ("unaligned offset", vec![info(0, PAGE, 0, 5)]),
        ];
        for (name, infos) in cases {
            assert!(table(infos).is_err(), "{name}");
        }
        let short = MemoryTable::new().with_regions(&[info(0, 2 * PAGE, 0, 0)], vec![file(PAGE)]);
        assert!(matches!(short, Err(MemoryError::BeyondFile { .. })));
        let null = File::open("/dev/null").expect("/dev/null");
        let device = MemoryTable::new().with_regions(&[info(0, PAGE, 0, 0)], vec![null]);
        assert!(matches!(device, Err(MemoryError::NotAFile { .. })));
        let few = MemoryTable::new().with_regions(&[info(0, PAGE, 0, 0)], Vec::new());
        assert!(matches!(few, Err(MemoryError::Descriptors { .. })));
    }

    /// Mappings of this process that are of this file.
    fn mappings(name: &str) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("the mappings");
        maps.lines().filter(|line| line.contains(name)).count()
    }

    #[test]
    fn a_region_that_ends_within_a_huge_page_is_unmapped() {
        use rustix::fs::MemfdFlags;
        const HUGE: u64 = 2 << 20;
        let name = "ends-within-a-huge-page";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let Ok(file) = rustix::fs::memfd_create(name, flags) else { return };
        let file = File::from(file);
        file.set_len(2 * HUGE).expect("its length");
        let info = info(0, HUGE + PAGE, 0, 0);
        let table = MemoryTable::new().with_regions(&[info], vec![file]).expect("a sound region");
        assert_eq!(mappings(name), 1);
        assert!(table.memory().check(GuestAddress(0), HUGE + PAGE).is_ok());
        assert!(
            table.memory().check(GuestAddress(0), HUGE + PAGE + 1).is_err(),
            "the rest of the page is no guest memory"
        );
        drop(table);
        assert_eq!(mappings(name), 0);
    }

    #[test]
    fn ranges_cross_regions_but_not_holes() {
        let table =
            table(&[info(0, PAGE, 0, 0), info(PAGE, PAGE, PAGE, 0), info(3 * PAGE, PAGE, 2 * PAGE, 0)])
                .expect("sound regions");
        let memory = table.memory();
        let mut pieces = Vec::new();
        memory.translate(PAGE - 10, 20, &mut pieces).expect("two neighbours");
        assert_eq!(pieces.iter().map(|piece| piece.len()).collect::<Vec<_>>(), [10, 10]);
        assert!(memory.translate(2 * PAGE - 10, 20, &mut pieces).is_err(), "a hole");
        assert_eq!(pieces.len(), 2, "nothing was added");
        assert!(memory.translate(u64::MAX - 5, 20, &mut pieces).is_err(), "wraps");
        assert!(memory.translate(2 * PAGE, 0, &mut pieces).is_err(), "empty at a bad address");
        assert!(memory.translate(0, 0, &mut pieces).is_ok());
        assert_eq!(pieces.len(), 2);
    }

    #[test]
    fn wrap_at_the_top_is_refused() {
        let top = u64::MAX - 2 * PAGE + 1;
        let table = table(&[info(0, PAGE, 0, 0), info(top, PAGE, PAGE, 0)]).expect("sound regions");
        assert!(table.memory().check(GuestAddress(top), PAGE).is_ok());
        assert!(table.memory().check(GuestAddress(top + PAGE), 1).is_err());
    }

    #[test]
    fn written_memory_is_distinguished_from_untouched_memory() {
        let size = 9 << 20;
        let table = table(&[info(0, size, 0, 0), info(size, 100 * PAGE, size, 0)]).expect("sound regions");
        let memory = table.memory();
        assert!(memory.is_untouched());
        for at in [0, PAGE - 1, (1 << 20) - 1, 8 << 20, size + 99 * PAGE] {
            memory.map.write_obj(0x55u8, GuestAddress(at)).expect("in memory");
            assert!(!memory.is_untouched(), "{at:#x}");
            memory.map.write_obj(0u8, GuestAddress(at)).expect("in memory");
        }
        assert!(memory.is_untouched());
        assert!(!GuestMemory::empty().is_untouched());
    }

    #[test]
    fn guest_memory_is_not_dumped() {
        let table = table(&[info(0, 3 * PAGE, 0, 0)]).expect("sound regions");
        let (mapped, _) =
            table.memory().mapping_of(0, 1).map(|(mapped, at)| (mapped.clone(), at)).expect("mapped");
        let start = mapped.memory().as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("procfs");
        let ours = maps.split_once(&format!("{start:x}-")).expect("the mapping").1;
        let flags = ours.lines().find_map(|line| line.strip_prefix("VmFlags:")).expect("its flags");
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn regions_come_and_go() {
        let one = table(&[info(0, PAGE, 0, 0)]).expect("sound regions");
        let kept = one.memory();
        let two = one.with_region(info(PAGE, PAGE, PAGE, 0), file(PAGE)).expect("room");
        assert!(two.memory().check(GuestAddress(0), 2 * PAGE).is_ok());
        assert!(two.with_region(info(PAGE, PAGE, 0, 0), file(PAGE)).is_err(), "overlap");
        assert!(two.without_region(info(PAGE, 2 * PAGE, PAGE, 0)).is_err(), "another size");
        let back = two.without_region(info(0, PAGE, 0, 0)).expect("it is there");
        assert!(back.memory().check(GuestAddress(0), 1).is_err());
        let none = back.without_region(info(PAGE, PAGE, PAGE, 0)).expect("it is there");
        assert!(none.memory().check(GuestAddress(PAGE), 1).is_err());
        drop((one, two, back, none));
        assert!(kept.read::<u64>(0).is_ok(), "an old table lives as long as somebody uses it");
    }
}
