//! The top image's first sector: the few header fields that change while it is open.
//!
//! A change is one write of one 512-byte sector, so that it happens completely or not at all. Only one such write is
//! in flight at a time: of two, the host might keep the older.

use std::future::poll_fn;
use std::sync::Mutex;
use std::task::Poll;

use engine::Waiters;
use qcow2::position::Patch;
use storage::{AlignedBuf, IoQueue, Kind, Operation, Part};

use crate::error::OpenError;
use crate::layer::DiskFile;
use crate::runtime::driver::Driver;

/// Bytes of the sector that has the header.
const SECTOR: usize = qcow2::SECTOR as usize;

pub(crate) struct HeaderSector {
    /// Leaf lock, held only to copy.
    inner: Mutex<Inner>,
}

struct Inner {
    /// The sector as it is on disk, or will be after the write in flight.
    bytes: Box<[u8; SECTOR]>,
    /// A thread has the right to write the sector.
    taken: bool,
    waiters: Waiters,
}

/// The right to change the sector. Drop it after the write of the change has ended.
#[must_use]
pub(crate) struct HeaderChange<'a> {
    sector: &'a HeaderSector,
}

impl HeaderSector {
    pub async fn load<Q: IoQueue>(driver: &Driver<Q>, file: &DiskFile) -> Result<Self, OpenError> {
        let operation = Operation::bare(file.id, Kind::Read, 0);
        let (result, buffer) = driver.run_buffer(operation, AlignedBuf::new(SECTOR)).await;
        let path = file.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure: "header", offset: 0, source })?;
        let mut bytes = Box::new([0; SECTOR]);
        bytes.copy_from_slice(buffer.as_slice());
        Ok(HeaderSector { inner: Mutex::new(Inner { bytes, taken: false, waiters: Waiters::default() }) })
    }

    /// Waits for the right to change the sector.
    pub async fn change(&self) -> HeaderChange<'_> {
        poll_fn(|context| {
            let mut inner = self.inner.lock().expect("no panic under this lock");
            if inner.taken {
                inner.waiters.add(context.waker());
                return Poll::Pending;
            }
            inner.taken = true;
            Poll::Ready(())
        })
        .await;
        HeaderChange { sector: self }
    }

    /// The present bytes of a field.
    pub fn field<const LENGTH: usize>(&self, at: usize) -> [u8; LENGTH] {
        let inner = self.inner.lock().expect("no panic under this lock");
        let mut field = [0; LENGTH];
        field.copy_from_slice(&inner.bytes[at..at + LENGTH]);
        field
    }

    /// Changes a field durably.
    pub async fn patch_and_sync<Q: IoQueue, const LENGTH: usize>(
        &self,
        driver: &Driver<Q>,
        file: &DiskFile,
        patch: Patch<LENGTH>,
    ) -> Result<(), OpenError> {
        let change = self.change().await;
        let operation = change.write(file, patch);
        let failed =
            |source| OpenError::Io { path: file.info.path.clone(), structure: "header", offset: 0, source };
        driver.run_all([operation]).await.map_err(failed)?;
        driver.run_bare(Operation::bare(file.id, Kind::Sync, 0)).await.map_err(failed)
    }
}

impl HeaderChange<'_> {
    /// The write of the sector with a change in it.
    pub fn write<const LENGTH: usize>(&self, file: &DiskFile, patch: Patch<LENGTH>) -> Operation {
        let mut inner = self.sector.inner.lock().expect("no panic under this lock");
        let at = patch.offset.0 as usize;
        inner.bytes[at..at + LENGTH].copy_from_slice(&patch.bytes);
        let mut buffer = AlignedBuf::new(SECTOR);
        buffer.as_mut_slice().copy_from_slice(&inner.bytes[..]);
        drop(inner);
        let mut operation = Operation::bare(file.id, Kind::Write, 0);
        operation.parts.push(Part::Owned(buffer));
        operation
    }
}

impl Drop for HeaderChange<'_> {
    fn drop(&mut self) {
        let waiters = {
            let mut inner = self.sector.inner.lock().expect("no panic under this lock");
            inner.taken = false;
            inner.waiters.take()
        };
        waiters.wake();
    }
}
