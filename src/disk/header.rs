//! The top image's first sector: the few header fields that change while it is open.
//!
//! A change is one write of one 512-byte sector, so that it is whole or not at all.

use std::sync::Mutex;

use qcow2::position::Patch;
use storage::{AlignedBuf, IoQueue, Kind, Operation, Part};

use crate::driver::Driver;
use crate::error::{OpenError, RequestError};
use crate::layer::DiskFile;

const SECTOR: usize = 512;

pub(crate) struct HeaderSector {
    /// As it is on disk, or about to be. Leaf lock, held to copy only.
    bytes: Mutex<Box<[u8; SECTOR]>>,
}

impl HeaderSector {
    pub async fn load<Q: IoQueue>(driver: &Driver<Q>, file: &DiskFile) -> Result<Self, OpenError> {
        let operation = Operation::bare(file.id, Kind::Read, 0);
        let (result, buffer) = driver.run_buffer(operation, AlignedBuf::new(SECTOR)).await;
        let path = file.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure: "header", offset: 0, source })?;
        let mut bytes = Box::new([0; SECTOR]);
        bytes.copy_from_slice(buffer.as_slice());
        Ok(HeaderSector { bytes: Mutex::new(bytes) })
    }

    /// The sector with a change in it, to be written at offset 0.
    pub fn patched<const LENGTH: usize>(&self, patch: Patch<LENGTH>) -> AlignedBuf {
        let mut bytes = self.bytes.lock().expect("no panic under this lock");
        let at = patch.offset.0 as usize;
        bytes[at..at + LENGTH].copy_from_slice(&patch.bytes);
        let mut buffer = AlignedBuf::new(SECTOR);
        buffer.as_mut_slice().copy_from_slice(&bytes[..]);
        buffer
    }

    /// The present bytes of a field.
    pub fn field<const LENGTH: usize>(&self, at: usize) -> [u8; LENGTH] {
        let bytes = self.bytes.lock().expect("no panic under this lock");
        let mut field = [0; LENGTH];
        field.copy_from_slice(&bytes[at..at + LENGTH]);
        field
    }

    /// The write of a changed sector.
    pub fn write(file: &DiskFile, sector: AlignedBuf) -> Operation {
        let mut operation = Operation::bare(file.id, Kind::Write, 0);
        operation.parts.push(Part::Owned(sector));
        operation
    }

    /// Changes a field durably.
    pub async fn patch_and_sync<Q: IoQueue, const LENGTH: usize>(
        &self,
        driver: &Driver<Q>,
        file: &DiskFile,
        patch: Patch<LENGTH>,
    ) -> Result<(), OpenError> {
        let operation = Self::write(file, self.patched(patch));
        let failed =
            |source| OpenError::Io { path: file.info.path.clone(), structure: "header", offset: 0, source };
        driver.run_all([operation]).await.map_err(failed)?;
        driver.run_bare(Operation::bare(file.id, Kind::Sync, 0)).await.map_err(failed)
    }
}

impl<S: storage::Storage> crate::Shared<S> {
    /// Sets the incompatible bit "corrupt" in the top image's header, once, if it can have one.
    pub(crate) async fn mark_corrupt(&self, driver: &Driver<S::Queue>) -> Result<(), RequestError> {
        let Some(header) = &self.header else { return Ok(()) };
        let version3 =
            self.layers[0].header.as_ref().is_some_and(|header| header.version == qcow2::Version::V3);
        if !version3 || !self.claim_corrupt_mark() {
            return Ok(());
        }
        let bits = u64::from_be_bytes(header.field(qcow2::position::INCOMPATIBLE));
        let marked = qcow2::Incompatible(bits).with(qcow2::Incompatible::CORRUPT);
        let sector = header.patched(qcow2::position::patch_incompatible(marked));
        driver
            .run_all([HeaderSector::write(&self.files[0], sector)])
            .await
            .map_err(RequestError::io("header write"))?;
        let sync = Operation::bare(self.top_file(), Kind::Sync, 0);
        driver.run_bare(sync).await.map_err(RequestError::io("fdatasync"))
    }
}
