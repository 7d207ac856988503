//! Resizes the disk of an image that is not in use.
//!
//! Owns the choice of the size, and the rest of the cluster in which the old end lies. That rest must read as zero
//! once the disk extends past it. The engine plans all other changes and their order. Backing files are opened to
//! find how much of them the new part of the disk would show; they are not changed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use engine::LayerFormat;
use engine::change::{Change, Resize};
use qcow2::{GuestOffset, Header, SECTOR};
use storage::{FileId, Kind, Operation, Storage};

use crate::disk::Disk;
use crate::error::OpenError;
use crate::image::change::{ChangeError, carry_out, plan};
use crate::image::image_file::ImageFile;
use crate::layer::DiskFile;
use crate::open::chain::{Chain, open_chain};
use crate::open::file_end::fill_last_block;
use crate::open::{close, data_file};
use crate::options::DiskOptions;
use crate::rules;
use crate::runtime::driver::Driver;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared};
use block::{Request, RequestId};

pub use crate::size::{InUseError, NewSize, ResizeError, Resized, Shrinking};

/// Resizes the disk of the image at `path`. Takes an exclusive lock, so that nothing else may have the image open.
/// The new part reads as zero. A crash at any instant leaves the disk in its old or its new state, and all snapshots
/// as they are. See docs/durability.md, "Changes of an image that nobody uses". Of the options, the formats, `direct`
/// and `lock_timeout` matter, and those that name data files.
///
/// # Errors
/// See [`ResizeError`].
pub fn resize<S: Storage>(
    storage: S,
    path: &Path,
    wanted: NewSize,
    shrinking: Shrinking,
    options: &DiskOptions,
) -> Result<Resized, ResizeError> {
    let options = &DiskOptions { read_only: false, snapshot: None, ..options.clone() };
    let driver = Driver::new(storage.queue(SIDE_QUEUE_DEPTH).map_err(OpenError::from)?);
    let chain = driver.block_on(open_chain(&driver, &storage, path, options))?;
    let top = &chain.layers[0];
    let from = if top.header.is_some() { top.size } else { top.file_length };
    let resized = Resized { from, to: wanted.of(from, path)? };
    if resized.to < from && shrinking == Shrinking::Refused {
        return Err(ResizeError::WouldShrink { path: path.to_owned(), from, to: resized.to });
    }
    if resized.to == from {
        return Ok(resized);
    }
    if top.header.is_none() {
        driver.block_on(resize_raw(&driver, &chain.files[0], resized))?;
    } else {
        resize_qcow2(storage, path, options, &driver, chain, resized)?;
    }
    Ok(resized)
}

async fn resize_raw<Q: storage::IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
    Resized { to, .. }: Resized,
) -> Result<(), ResizeError> {
    let path = || file.info.path.clone();
    if file.info.block_device {
        return Err(ResizeError::BlockDevice { path: path() });
    }
    let failed = |source| OpenError::Io { path: path(), structure: "end of the file", offset: to, source };
    driver.run_bare(Operation::bare(file.id, Kind::SetLength, to)).await.map_err(failed)?;
    driver.run_bare(Operation::bare(file.id, Kind::Sync, 0)).await.map_err(failed)?;
    Ok(())
}

fn resize_qcow2<S: Storage>(
    storage: S,
    path: &Path,
    options: &DiskOptions,
    driver: &Driver<S::Queue>,
    mut chain: Chain,
    Resized { from, to }: Resized,
) -> Result<(), ResizeError> {
    let header = chain.layers[0].header.as_ref().expect("a qcow2 image has a header");
    let cluster_size = header.geometry().cluster_size();
    let backing_size = chain.layers.get(1).map_or(0, |below| below.size);
    let backing_size = rules::hidden_backing_size(backing_size);
    let change = Change::Resize(Resize { size: to, backing_size, compacts: false });
    let is_raw = header.is_data_file_raw();
    let data = usize::from(chain.specs[0].data_file().0);
    if to < from {
        let image = Alone { storage: &storage, driver, file: &chain.files[0] };
        driver.block_on(image.change(change))?;
        let compacts = Resize { size: to, backing_size, compacts: true };
        driver.block_on(image.compact(Change::Resize(compacts)))?;
        return match chain.files.get_mut(data).filter(|_| data > 0) {
            Some(file) => Ok(driver.block_on(data_file::resize(driver, file, to))?),
            None => Ok(()),
        };
    }
    // Refuse what is impossible before anything is written.
    let file = &chain.files[0];
    let image = ImageFile { driver, id: file.id, info: &file.info };
    driver.block_on(plan(&image, header, change.clone()))?;
    if data > 0 {
        let file = &mut chain.files[data];
        if is_raw && file.info.block_device {
            return Err(ResizeError::BlockDevice { path: file.info.path.clone() });
        }
        if is_raw {
            // Bytes past the disk's end would become part of the disk.
            driver.block_on(data_file::resize(driver, file, from / SECTOR * SECTOR))?;
        }
        driver.block_on(data_file::resize(driver, file, to))?;
    }
    if !rules::must_zero_tail(GuestOffset(from), cluster_size) {
        let image = Alone { storage: &storage, driver, file: &chain.files[0] };
        return Ok(driver.block_on(image.change(change))?);
    }
    let end = from.next_multiple_of(cluster_size).min(to);
    let shared = zero_tail(storage, path, options, driver, chain, from / SECTOR * SECTOR..end)?;
    let image = Alone { storage: &shared.storage, driver, file: shared.top_image() };
    Ok(driver.block_on(image.change(change))?)
}

/// Makes the rest of the cluster in which the disk ends read as zero, as far as the disk will extend into it. No
/// reader of the present disk can notice. So this is done before the engine's plan, by an ordinary write to a disk
/// that reaches that far.
fn zero_tail<S: Storage>(
    storage: S,
    path: &Path,
    options: &DiskOptions,
    driver: &Driver<S::Queue>,
    mut chain: Chain,
    tail: Range<u64>,
) -> Result<Arc<Shared<S>>, OpenError> {
    let LayerFormat::Qcow2 { geometry, .. } = &mut chain.specs[0].format else {
        panic!("the engine knows the format that was opened");
    };
    geometry.size = tail.end;
    chain.layers[0].size = tail.end;
    let disk = Disk::of_chain(storage, path, options, driver, chain)?;
    let mut queue = disk.queue(SIDE_QUEUE_DEPTH)?;
    let (offset, length) = (tail.start, tail.end - tail.start);
    let zeroes = Request::WriteZeroes { offset, length, unmap: false, write_through: true };
    queue.submit(RequestId(0), zeroes, &[]);
    let mut done = Vec::new();
    loop {
        queue.poll(&mut done);
        if !done.is_empty() {
            break;
        }
        queue.wait(None);
    }
    drop(queue);
    for completed in done {
        completed.result.map_err(|source| OpenError::Request { path: path.to_owned(), source })?;
    }
    close::close(&disk.shared)?;
    Ok(Arc::clone(&disk.shared))
}

/// The image of a resize, which no other work uses meanwhile.
struct Alone<'a, S: Storage> {
    storage: &'a S,
    driver: &'a Driver<S::Queue>,
    file: &'a DiskFile,
}

/// The image file as it is now.
struct Present {
    file: DiskFile,
    header: Header,
}

impl<S: Storage> Alone<'_, S> {
    /// Changes the image.
    async fn change(&self, change: Change) -> Result<(), ChangeError> {
        let now = self.present().await?;
        let mut plan = plan(&self.image(&now), &now.header, change).await?;
        fill_last_block(self.driver, &now.file).await?;
        carry_out(&self.image(&now), &mut plan).await
    }

    /// Moves the tables of a shrunk disk to where it had data before, if there is room. They were written past the end
    /// of the file, when nothing was free yet, and keep the file long.
    async fn compact(&self, change: Change) -> Result<(), ChangeError> {
        let now = self.present().await?;
        // The resize is done: tables that cannot be moved stay.
        let Ok(mut plan) = plan(&self.image(&now), &now.header, change).await else { return Ok(()) };
        if plan.new_l1().is_none_or(|place| place.0 > now.header.l1_offset.0) {
            return Ok(());
        }
        carry_out(&self.image(&now), &mut plan).await
    }

    async fn present(&self) -> Result<Present, OpenError> {
        let id: FileId = self.file.id;
        let length = self.storage.length(id)?;
        let file = DiskFile { id, info: storage::FileInfo { length, ..self.file.info.clone() } };
        let header = ImageFile { driver: self.driver, id, info: &file.info }.header(length).await?;
        Ok(Present { file, header })
    }

    fn image<'b>(&'b self, now: &'b Present) -> ImageFile<'b, S::Queue> {
        ImageFile { driver: self.driver, id: now.file.id, info: &now.file.info }
    }
}
