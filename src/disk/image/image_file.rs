//! One open image file: reads and writes of its structures, at any alignment.
//!
//! Owns the host's alignment, and the reading of headers and tables. It changes nothing by itself, and opens no other
//! file.

use std::path::Path;

use engine::Entries;
use qcow2::{FormatError, FormatErrorKind, Header, HostRange, SECTOR, Salvaged};
use storage::{AlignedBuf, FileId, FileInfo, IoQueue, Kind, OpenOptions, Operation, Storage, StorageError};

use crate::bounds::READ_PIECE_BYTES as PIECE;
use crate::error::OpenError;
use crate::open::foreign::{Foreign, HEAD, ISO_DESCRIPTOR};
use crate::options::DiskOptions;
use crate::range::ByteRange;
use crate::runtime::driver::Driver;

/// Which other processes may use an image while it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Readers only: a shared lock.
    Readers,
    /// All: no lock. The report may be wrong, as the image may have been changing.
    All,
}

impl Sharing {
    /// Opens an image to read it.
    pub(crate) fn open<S: Storage>(
        self,
        storage: &S,
        path: &Path,
        options: &DiskOptions,
    ) -> Result<(FileId, FileInfo), StorageError> {
        let how = OpenOptions { writable: false, direct: options.direct, lock_timeout: options.lock_timeout };
        match self {
            Sharing::Readers => storage.open(path, &how),
            Sharing::All => storage.open_shared(path, options.direct),
        }
    }
}

/// One open image file.
pub(crate) struct ImageFile<'a, Q> {
    pub driver: &'a Driver<Q>,
    pub id: FileId,
    pub info: &'a FileInfo,
}

impl<Q: IoQueue> ImageFile<'_, Q> {
    /// The header of a file that is `length` bytes long now.
    pub async fn header(&self, length: u64) -> Result<Header, OpenError> {
        let area = self.header_area(length).await?;
        Header::parse(&area, length).map_err(|source| self.broken(source))
    }

    /// As [`ImageFile::header`], for a header that may name impossible tables.
    pub async fn salvaged_header(&self, length: u64) -> Result<Salvaged, OpenError> {
        let area = self.header_area(length).await?;
        Header::salvage(&area, length).map_err(|source| self.broken(source))
    }

    fn broken(&self, source: FormatError) -> OpenError {
        OpenError::Format { path: self.info.path.clone(), source }
    }

    /// The bytes that the header may take: the first cluster.
    async fn header_area(&self, length: u64) -> Result<Vec<u8>, OpenError> {
        let prefix = self.read("header", ByteRange::new(0, length.min(Header::PREFIX_MAX as u64))).await?;
        let wanted = match Header::cluster_size_hint(&prefix) {
            Ok(wanted) => wanted,
            Err(source) => return Err(self.explain(source).await),
        };
        self.read("header", ByteRange::new(0, wanted.min(length))).await
    }

    /// The host's unit of I/O on this file, in bytes.
    pub fn unit(&self) -> u64 {
        SECTOR.max(self.info.offset_alignment.into()).max(self.info.memory_alignment.into())
    }

    /// Reads a range of any alignment; zeros past the end of the file.
    pub async fn read(&self, structure: &'static str, range: ByteRange) -> Result<Vec<u8>, OpenError> {
        let (start, mut buffer) = self.read_around(structure, range).await?;
        let at = (range.offset - start) as usize;
        buffer.truncate(at + range.length as usize);
        Ok(buffer.as_slice()[at..].to_vec())
    }

    /// Reads the whole units that a range touches; returns also where they begin.
    async fn read_around(
        &self,
        structure: &'static str,
        range: ByteRange,
    ) -> Result<(u64, AlignedBuf), OpenError> {
        let offset = range.offset;
        let start = offset - offset % self.unit();
        let bytes = (range.end() - start).next_multiple_of(self.unit());
        let operation = Operation::bare(self.id, Kind::Read, start);
        let (result, buffer) = self.driver.run_buffer(operation, AlignedBuf::new(bytes as usize)).await;
        let path = self.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure, offset, source })?;
        Ok((start, buffer))
    }

    /// The entries of a table of which `present` is read. The other entries are zero, and so is half an entry at its
    /// end.
    pub async fn table(
        &self,
        structure: &'static str,
        present: ByteRange,
        entries: u64,
    ) -> Result<Entries, OpenError> {
        let mut table = Entries::new(entries);
        for piece in present.pieces(PIECE) {
            table.read((piece.offset - present.offset) / 8, &self.read(structure, piece).await?);
        }
        Ok(table)
    }

    /// The part of a range that is in the file.
    pub fn in_file(&self, range: HostRange) -> ByteRange {
        ByteRange::new(range.offset.0, range.length.min(self.info.length.saturating_sub(range.offset.0)))
    }

    /// Writes bytes at any alignment, and leaves the other bytes of their units as they are. A change within a unit
    /// is one write, so that the header is never half changed.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OpenError> {
        let unit = self.unit();
        let length = bytes.len() as u64;
        let (start, mut buffer) = if offset.is_multiple_of(unit) && length.is_multiple_of(unit) {
            (offset, AlignedBuf::new(bytes.len()))
        } else {
            self.read_around("metadata", ByteRange::new(offset, length)).await?
        };
        let at = (offset - start) as usize;
        buffer.as_mut_slice()[at..at + bytes.len()].copy_from_slice(bytes);
        let operation = Operation::bare(self.id, Kind::Write, start);
        let (result, _) = self.driver.run_buffer(operation, buffer).await;
        let path = self.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure: "metadata", offset, source })
    }

    /// Makes all writes to the file durable.
    pub async fn sync(&self) -> Result<(), OpenError> {
        let path = self.info.path.clone();
        let result = self.driver.run_bare(Operation::bare(self.id, Kind::Sync, 0)).await;
        result.map_err(|source| OpenError::Io { path, structure: "metadata (fdatasync)", offset: 0, source })
    }

    /// The format of the file by its marks; none if it has no mark, or cannot be read.
    pub async fn recognise(&self) -> Option<Foreign> {
        let length = self.info.length;
        if length == 0 {
            return Some(Foreign::Empty);
        }
        let part = async |offset: u64, bytes: u64| {
            let bytes = bytes.min(length.saturating_sub(offset));
            if bytes == 0 { Ok(Vec::new()) } else { self.read("start", ByteRange::new(offset, bytes)).await }
        };
        let head = part(0, HEAD).await.ok()?;
        let descriptor = part(ISO_DESCRIPTOR, SECTOR).await.ok()?;
        let tail = part(length.saturating_sub(SECTOR), SECTOR).await.ok()?;
        Foreign::of_bytes(&head, &descriptor, &tail)
    }

    /// The error for a file without a qcow2 header, with the format that the file has instead.
    async fn explain(&self, source: FormatError) -> OpenError {
        let path = self.info.path.clone();
        let no_header = match source.kind {
            FormatErrorKind::BadMagic { .. } => true,
            FormatErrorKind::Truncated { .. } => self.info.length == 0,
            _ => false,
        };
        match if no_header { self.recognise().await } else { None } {
            Some(foreign) => OpenError::NotQcow2 { path, source, foreign },
            None => OpenError::Format { path, source },
        }
    }
}
