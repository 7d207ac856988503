//! Checks and repairs an image file: drives the engine's checker and its repair plans on a [`Storage`].
//!
//! Owns the reads and writes, with the host's alignment, and the syncs between the stages of a repair. The engine
//! decides what is wrong, and what to write in which order. It handles one image file by itself: backing files are
//! not opened.

use std::path::{Path, PathBuf};

use engine::check::{Checked, Checker, Refusal, RepairStep, Step};
use names::shown;
use qcow2::{FormatError, Header, Salvaged};
use storage::{AlignedBuf, FileId, FileInfo, IoQueue, Kind, OpenOptions, Operation, Storage};
use thiserror::Error;

pub use engine::check::{
    Finding, FindingKind, NotRepairable, Part, Progress, RepairKind, Report, Tally, Verdict,
};

use crate::error::OpenError;
use crate::open::chain::DiskOptions;
use crate::open::foreign;
use crate::runtime::driver::Driver;

/// Operations in flight: reads go one by one, as each determines the next.
const QUEUE_DEPTH: u32 = 8;
/// The least unit of a write in bytes. Smaller writes read, change and write back a unit.
const SECTOR: u64 = 512;

/// Why an image could not be checked or repaired.
#[derive(Debug, Error)]
pub enum CheckError {
    /// It could not be opened, read or written, or its header is broken.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The image has something that cannot be checked yet.
    #[error("{}: {source}", shown(path))]
    Refused {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: Refusal,
    },
    /// New refcounts cannot repair the image. Nothing was written.
    #[error("{}: {source}", shown(path))]
    NotRepairable {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: NotRepairable,
        /// The report of the check.
        found: Box<Report>,
    },
}

/// The problems that a repair found, and those that it left.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// The report before the repair.
    pub found: Report,
    /// The report of another check after the repair.
    pub left: Report,
    /// The number of writes; 0 if there was nothing to repair.
    pub writes: u64,
}

/// Which other processes may use an image while it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Readers only: a shared lock.
    Readers,
    /// All: no lock. The report may be wrong, as the image may have been changing.
    All,
}

/// Checks the qcow2 image at `path`. Takes a shared lock, so that no writer may have the image open, and writes
/// nothing. Of the options, `direct` and `lock_timeout` matter. The file stays open, and locked, as long as the
/// storage lives: use a new storage for each check.
///
/// # Errors
/// If the image cannot be opened, read, or checked by name. A damaged image is no error but a [`Report`].
pub fn check<S: Storage>(storage: &S, path: &Path, options: &DiskOptions) -> Result<Report, CheckError> {
    check_watched(storage, path, Sharing::Readers, options, &mut |_| {})
}

/// As [`check`], with a choice of which others may use the image, and with a call before each read.
///
/// # Errors
/// As for [`check`].
pub fn check_watched<S: Storage>(
    storage: &S,
    path: &Path,
    sharing: Sharing,
    options: &DiskOptions,
    watch: &mut dyn FnMut(Progress),
) -> Result<Report, CheckError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH).map_err(OpenError::from)?);
    let how = OpenOptions { writable: false, direct: options.direct, lock_timeout: options.lock_timeout };
    let opened = match sharing {
        Sharing::Readers => storage.open(path, &how),
        Sharing::All => storage.open_shared(path, options.direct),
    };
    let (id, info) = opened.map_err(OpenError::from)?;
    driver.block_on(async {
        let image = ImageFile { driver: &driver, id, info: &info };
        Ok(image.examine(info.length, watch).await?.into_report())
    })
}

/// Checks the qcow2 image at `path`, repairs what `kind` names, and checks it again. Takes an exclusive lock, so that
/// nothing else may have the image open. A crash leaves an image that can be repaired again; see
/// [`engine::check::Repair`].
///
/// # Errors
/// As for [`check`], and if new refcounts cannot repair the image.
pub fn repair<S: Storage>(
    storage: &S,
    path: &Path,
    kind: RepairKind,
    options: &DiskOptions,
) -> Result<Repaired, CheckError> {
    repair_watched(storage, path, kind, options, &mut |_| {})
}

/// As [`repair`], with a call before each read of its two checks.
///
/// # Errors
/// As for [`repair`].
pub fn repair_watched<S: Storage>(
    storage: &S,
    path: &Path,
    kind: RepairKind,
    options: &DiskOptions,
    watch: &mut dyn FnMut(Progress),
) -> Result<Repaired, CheckError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH).map_err(OpenError::from)?);
    let how = OpenOptions { writable: true, direct: options.direct, lock_timeout: options.lock_timeout };
    let (id, info) = storage.open(path, &how).map_err(OpenError::from)?;
    if info.block_device {
        return Err(OpenError::WritableBlockDevice { path: path.to_path_buf() }.into());
    }
    driver.block_on(async {
        let (found, writes) = repair_open(&driver, id, &info, kind, watch).await?;
        let length = storage.length(id).map_err(OpenError::from)?;
        let image = ImageFile { driver: &driver, id, info: &info };
        let left = image.examine(length, watch).await?.into_report();
        Ok(Repaired { found, left, writes })
    })
}

/// Repairs an image that is open for writing and not in use yet. Returns the problems found, and the number of
/// writes. The file's length and its header may change.
pub(crate) async fn repair_open<Q: IoQueue>(
    driver: &Driver<Q>,
    id: FileId,
    info: &FileInfo,
    kind: RepairKind,
    watch: &mut dyn FnMut(Progress),
) -> Result<(Report, u64), CheckError> {
    let image = ImageFile { driver, id, info };
    let checked = image.examine(info.length, watch).await?;
    let found = checked.report().clone();
    let repair = match checked.plan_repair(kind) {
        Ok(repair) => repair,
        Err(source) => {
            let (path, found) = (info.path.clone(), Box::new(found));
            return Err(CheckError::NotRepairable { path, source, found });
        }
    };
    let (mut writes, mut punches, mut end) = (0, true, info.length);
    for step in repair {
        match step {
            RepairStep::Write { offset, bytes } => {
                writes += 1;
                end = end.max(offset.0 + bytes.len() as u64);
                image.write(offset.0, &bytes).await?;
            }
            RepairStep::Sync => image.sync().await?,
            RepairStep::Punch { offset, length } => {
                punches = punches && image.give_back(offset.0, length).await;
            }
            RepairStep::Cut { length } => image.cut(length, end).await,
        }
    }
    Ok((found, writes))
}

/// One open image file.
pub(crate) struct ImageFile<'a, Q> {
    pub driver: &'a Driver<Q>,
    pub id: FileId,
    pub info: &'a FileInfo,
}

impl<Q: IoQueue> ImageFile<'_, Q> {
    pub async fn header(&self, length: u64) -> Result<Header, OpenError> {
        let area = self.header_area(length).await?;
        Header::parse(&area, length).map_err(|source| self.broken(source))
    }

    /// Likewise, for a header that may name impossible tables.
    async fn salvaged_header(&self, length: u64) -> Result<Salvaged, OpenError> {
        let area = self.header_area(length).await?;
        Header::salvage(&area, length).map_err(|source| self.broken(source))
    }

    fn broken(&self, source: FormatError) -> OpenError {
        OpenError::Format { path: self.info.path.clone(), source }
    }

    /// The bytes that the header may take: the first cluster.
    async fn header_area(&self, length: u64) -> Result<Vec<u8>, OpenError> {
        let prefix = self.read("header", 0, length.min(Header::PREFIX_MAX as u64)).await?;
        let wanted = match Header::cluster_size_hint(&prefix) {
            Ok(wanted) => wanted,
            Err(source) => return Err(foreign::explain(self, source).await),
        };
        self.read("header", 0, wanted.min(length)).await
    }

    async fn examine(&self, length: u64, watch: &mut dyn FnMut(Progress)) -> Result<Checked, CheckError> {
        let refused = |source| CheckError::Refused { path: self.info.path.clone(), source };
        let salvaged = self.salvaged_header(length).await?;
        let mut checker = Checker::of_salvaged(&salvaged, length).map_err(refused)?;
        while let Step::Read { offset, length } = checker.step() {
            watch(checker.progress());
            checker.feed(&self.read("metadata", offset.0, length as u64).await?);
        }
        Ok(checker.finish())
    }

    /// The host's unit of I/O on this file, in bytes.
    pub fn unit(&self) -> u64 {
        SECTOR.max(self.info.offset_alignment.into()).max(self.info.memory_alignment.into())
    }

    /// Reads a range of any alignment; zeros past the end of the file.
    pub async fn read(
        &self,
        structure: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<u8>, OpenError> {
        let (start, mut buffer) = self.read_around(structure, offset, length).await?;
        let at = (offset - start) as usize;
        buffer.truncate(at + length as usize);
        Ok(buffer.as_slice()[at..].to_vec())
    }

    /// Reads the whole units that a range touches; returns also where they begin.
    async fn read_around(
        &self,
        structure: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<(u64, AlignedBuf), OpenError> {
        let start = offset - offset % self.unit();
        let bytes = (offset + length - start).next_multiple_of(self.unit());
        let operation = Operation::bare(self.id, Kind::Read, start);
        let (result, buffer) = self.driver.run_buffer(operation, AlignedBuf::new(bytes as usize)).await;
        let path = self.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure, offset, source })?;
        Ok((start, buffer))
    }

    /// Writes bytes at any alignment, and leaves the other bytes of their units as they are. A change within a unit
    /// is one write, so that the header is never half changed.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OpenError> {
        let unit = self.unit();
        let length = bytes.len() as u64;
        let (start, mut buffer) = if offset.is_multiple_of(unit) && length.is_multiple_of(unit) {
            (offset, AlignedBuf::new(bytes.len()))
        } else {
            self.read_around("metadata", offset, length).await?
        };
        let at = (offset - start) as usize;
        buffer.as_mut_slice()[at..at + bytes.len()].copy_from_slice(bytes);
        let operation = Operation::bare(self.id, Kind::Write, start);
        let (result, _) = self.driver.run_buffer(operation, buffer).await;
        let path = self.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure: "metadata", offset, source })
    }

    pub async fn sync(&self) -> Result<(), OpenError> {
        let path = self.info.path.clone();
        let result = self.driver.run_bare(Operation::bare(self.id, Kind::Sync, 0)).await;
        result.map_err(|source| OpenError::Io { path, structure: "metadata (fdatasync)", offset: 0, source })
    }
}
