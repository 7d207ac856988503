//! Checks and repairs an image file: drives the engine's checker and its repair plans on a [`Storage`].
//!
//! Owns the reads of a check; `file_steps` carries a repair out. The engine decides what is wrong, and what to write
//! in which order. It handles one image file by itself: backing files are not opened.

use std::path::Path;

use engine::check::{Checked, Checker, Step};
use storage::{FileId, FileInfo, IoQueue, OpenOptions, Storage};

pub use engine::check::{
    Finding, FindingKind, ImagePart, NotRepairable, Progress, RepairKind, Report, Tally, Verdict,
};

use crate::error::OpenError;
use crate::image::file_steps::FileSteps;
use crate::image::image_file::ImageFile;
pub use crate::image::image_file::Sharing;
use crate::options::DiskOptions;
use crate::range::ByteRange;
use crate::runtime::driver::Driver;

/// Operations in flight: reads go one by one, as each determines the next.
const QUEUE_DEPTH: u32 = 8;
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

/// Checks the qcow2 image at `path`. Takes a shared lock, so that no writer may have the image open, and writes
/// nothing. Of the options, `direct` and `lock_timeout` matter. The file stays open, and locked, as long as the
/// storage lives: use a new storage for each check.
///
/// # Errors
/// If the image cannot be opened, read, or checked by name. A damaged image is no error but a [`Report`].
pub fn check<S: Storage>(storage: &S, path: &Path, options: &DiskOptions) -> Result<Report, OpenError> {
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
) -> Result<Report, OpenError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH)?);
    let (id, info) = sharing.open(storage, path, options)?;
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
) -> Result<Repaired, OpenError> {
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
) -> Result<Repaired, OpenError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH)?);
    let how = OpenOptions { writable: true, direct: options.direct, lock_timeout: options.lock_timeout };
    let (id, info) = storage.open(path, &how)?;
    if info.block_device {
        return Err(OpenError::WritableBlockDevice { path: path.to_path_buf() });
    }
    driver.block_on(async {
        let (found, writes) = repair_open(&driver, id, &info, kind, watch).await?;
        let length = storage.length(id)?;
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
) -> Result<(Report, u64), OpenError> {
    let image = ImageFile { driver, id, info };
    let checked = image.examine(info.length, watch).await?;
    let found = checked.report().clone();
    let repair = match checked.plan_repair(kind) {
        Ok(repair) => repair,
        Err(source) => {
            let (path, found) = (info.path.clone(), Box::new(found));
            return Err(OpenError::NotRepairable { path, source, found });
        }
    };
    let mut steps = FileSteps::new(&image);
    for step in repair {
        steps.carry_out(step).await?;
    }
    Ok((found, steps.writes()))
}

impl<Q: IoQueue> ImageFile<'_, Q> {
    async fn examine(&self, length: u64, watch: &mut dyn FnMut(Progress)) -> Result<Checked, OpenError> {
        let refused = |source| OpenError::NotCheckable { path: self.info.path.clone(), source };
        let salvaged = self.salvaged_header(length).await?;
        let mut checker = Checker::of_salvaged(&salvaged, length).map_err(refused)?;
        while let Step::Read { offset, length } = checker.step() {
            watch(checker.progress());
            checker.feed(&self.read("metadata", ByteRange::new(offset.0, length as u64)).await?);
        }
        Ok(checker.finish())
    }
}
