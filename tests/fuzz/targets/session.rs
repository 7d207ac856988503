//! An open disk on a simulated host, with one request at a time, and a model of its known contents. Every sector
//! that was read or written must read the same, until it is written again.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use disk::{Completed, Disk, DiskOptions, DiskQueue, Keeper, OpenError, Request, RequestError, RequestId};
pub use qcow2::SECTOR;
use storage::GuestSlice;
use storage_sim::{SimStorage, SimWorld};

use super::host::TOP;

/// The most bytes that a request transfers.
pub const WINDOW: u64 = 128 << 10;
/// Turns without a completion after which a request counts as hanging.
const VAIN_TURNS_MAX: u32 = 20_000;

/// The known contents of sectors.
#[derive(Clone, Debug, Default)]
pub struct Known(BTreeMap<u64, Box<[u8]>>);

impl Known {
    /// The known contents of a disk that ends at `end`.
    pub fn below(mut self, end: u64) -> Known {
        self.0.retain(|sector, _| (sector + 1) * SECTOR <= end);
        self
    }

    /// The sectors whose contents are known.
    pub fn sectors(&self) -> Vec<u64> {
        self.0.keys().copied().collect()
    }
}

/// An open disk.
pub struct Session {
    queue: DiskQueue<SimStorage>,
    keeper: Option<Keeper<SimStorage>>,
    disk: Disk<SimStorage>,
    /// The expected contents; none if nothing can be required of the image.
    pub known: Option<Known>,
    /// The errors of failed requests.
    pub failures: Vec<RequestError>,
}

thread_local! {
    /// Leaked, so that its slices are really 'static; one per thread, so that little leaks.
    static MEMORY: OnceCell<GuestSlice> = const { OnceCell::new() };
}

fn memory(bytes: u64) -> GuestSlice {
    MEMORY.with(|memory| {
        let whole = *memory.get_or_init(|| {
            let bytes = Box::leak(vec![0_u8; 2 * WINDOW as usize].into_boxed_slice());
            let skip = bytes.as_ptr().align_offset(4096);
            GuestSlice::from(&mut bytes[skip..skip + WINDOW as usize])
        });
        whole.subslice(0, bytes as usize).expect("a request fits")
    })
}

impl Session {
    /// Opens the image; `known` holds its known contents.
    ///
    /// # Errors
    /// As for [`Disk::open`].
    pub fn open(world: &SimWorld, options: &DiskOptions, known: Option<Known>) -> Result<Self, OpenError> {
        let disk = Disk::open_unkept(world.storage(), Path::new(TOP), options)?;
        let queue = disk.queue(16)?;
        let keeper = (!disk.is_read_only()).then(|| disk.keeper()).transpose()?;
        Ok(Session { queue, keeper, disk, known, failures: Vec::new() })
    }

    /// Bytes of the disk, in whole sectors.
    pub fn size(&self) -> u64 {
        self.disk.size() / SECTOR * SECTOR
    }

    /// The disk.
    pub fn disk(&self) -> &Disk<SimStorage> {
        &self.disk
    }

    /// Closes the disk; returns its known contents.
    ///
    /// # Errors
    /// As for [`Disk::close`].
    pub fn close(self) -> (Option<Known>, Result<(), OpenError>) {
        let Session { queue, keeper, disk, known, .. } = self;
        drop((queue, keeper));
        (known, disk.close())
    }

    /// Lets the housekeeper do the work that is due after `time`.
    pub fn rest(&mut self, world: &SimWorld, time: Duration) {
        world.pass(time);
        for _ in 0..64 {
            let Some(keeper) = &mut self.keeper else { return };
            keeper.poll();
            keeper.wait(Some(Duration::ZERO));
            if !world.step() && world.is_idle() {
                return;
            }
        }
    }

    fn run(&mut self, request: Request, slices: &[GuestSlice]) -> Result<(), RequestError> {
        self.queue.submit(RequestId(0), request, slices);
        let mut done: Vec<Completed> = Vec::new();
        for _ in 0..VAIN_TURNS_MAX {
            self.queue.poll(&mut done);
            if let Some(completed) = done.pop() {
                return completed.result;
            }
            if let Some(keeper) = &mut self.keeper {
                keeper.poll();
            }
            self.queue.wait(Some(Duration::from_millis(1)));
        }
        panic!("a request hangs: {:?}", self.disk.status());
    }

    fn note<T>(&mut self, result: Result<T, RequestError>) -> Option<T> {
        result.map_err(|error| self.failures.push(error)).ok()
    }

    /// Reads sectors, and compares them with the known contents; none if the read fails.
    pub fn read(&mut self, offset: u64, length: u64) -> Option<Vec<u8>> {
        let slice = memory(length);
        let result = self.run(Request::Read { offset }, &[slice]);
        self.note(result)?;
        let mut found = vec![0; length as usize];
        slice.copy_to(&mut found[..]);
        let Some(Known(known)) = &mut self.known else { return Some(found) };
        for (sector, bytes) in (offset / SECTOR..).zip(found.chunks_exact(SECTOR as usize)) {
            let expected = known.entry(sector).or_insert_with(|| bytes.into());
            assert!(**expected == *bytes, "sector {sector} holds {bytes:x?}, not {expected:x?}");
        }
        Some(found)
    }

    /// Writes sectors, each filled with one byte value.
    pub fn write(&mut self, offset: u64, length: u64, seed: u8, write_through: bool) {
        let bytes: Vec<u8> = (0..length).map(|at| (at / SECTOR) as u8 ^ seed).collect();
        let slice = memory(length);
        slice.copy_from(&bytes[..]);
        let result = self.run(Request::Write { offset, write_through }, &[slice]);
        let done = self.note(result).is_some();
        self.learn(offset, length, |at| done.then(|| bytes[at as usize..(at + SECTOR) as usize].into()));
    }

    /// Writes zeroes.
    pub fn zero(&mut self, offset: u64, length: u64, unmap: bool) {
        let request = Request::WriteZeroes { offset, length, unmap, write_through: false };
        let result = self.run(request, &[]);
        let done = self.note(result).is_some();
        self.learn(offset, length, |_| done.then(|| vec![0; SECTOR as usize].into()));
    }

    /// Discards: each sector retains its contents or becomes zeros.
    pub fn discard(&mut self, offset: u64, length: u64) {
        let before = self.known.clone();
        let result = self.run(Request::Discard { offset, length, write_through: false }, &[]);
        self.note(result);
        self.learn(offset, length, |_| None);
        let Some(after) = self.read(offset, length) else { return };
        let Some(Known(before)) = before else { return };
        for (sector, bytes) in (offset / SECTOR..).zip(after.chunks_exact(SECTOR as usize)) {
            let same = before.get(&sector).is_none_or(|old| **old == *bytes);
            assert!(
                same || bytes.iter().all(|byte| *byte == 0),
                "discarded sector {sector} holds {bytes:x?}"
            );
        }
    }

    /// Flushes.
    pub fn flush(&mut self) {
        let result = self.run(Request::Flush, &[]);
        self.note(result);
    }

    /// Records the new contents of sectors; those for which `now` returns none become unknown.
    fn learn(&mut self, offset: u64, length: u64, now: impl Fn(u64) -> Option<Box<[u8]>>) {
        let Some(Known(known)) = &mut self.known else { return };
        for at in (0..length).step_by(SECTOR as usize) {
            let sector = (offset + at) / SECTOR;
            match now(at) {
                Some(bytes) => known.insert(sector, bytes),
                None => known.remove(&sector),
            };
        }
    }
}
