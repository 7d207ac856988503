//! External data files: which image of a chain has its data in which file, by the operator's word alone.
//!
//! Owns the choice, the opening and the refusals. The name of the data file in a header is only reported, never
//! followed. Otherwise any writer of an image could make it name any file of the host.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use qcow2::{Header, SECTOR};
use storage::{FileIdentity, IoQueue, Kind, OpenOptions, Operation, Storage};

use crate::error::OpenError;
use crate::layer::DiskFile;
use crate::options::DiskOptions;
use crate::runtime::driver::Driver;

/// The operator's choice of data files, and which of them were used.
pub(crate) struct DataFiles<'a> {
    /// The top image's data file.
    top: Option<&'a Path>,
    /// By the name of the backing file: its data file, and whether that backing file was met.
    below: Vec<(&'a Path, &'a Path, bool)>,
    /// Opened data files by the number of their layer.
    opened: Vec<(usize, DiskFile)>,
}

impl<'a> DataFiles<'a> {
    pub fn new(options: &'a DiskOptions) -> Self {
        let below = &options.backing_data_files;
        DataFiles {
            top: options.data_file.as_deref(),
            below: below.iter().map(|(layer, file)| (layer.as_path(), file.as_path(), false)).collect(),
            opened: Vec::new(),
        }
    }

    /// Opens the data file of a layer, locked like the image. `header` is none for a raw image, which has no data
    /// file.
    pub fn open<S: Storage>(
        &mut self,
        storage: &S,
        layer: (usize, &Path),
        header: Option<&Header>,
        how: &OpenOptions,
        seen: &mut HashSet<FileIdentity>,
    ) -> Result<(), OpenError> {
        let (number, image) = layer;
        let given = if number == 0 { self.top } else { self.given_below(image) };
        let has_one = header.is_some_and(Header::has_data_file);
        let file = match (has_one, given) {
            (false, None) => return Ok(()),
            (true, Some(file)) => file,
            (false, Some(file)) => {
                return Err(OpenError::DataFileNotWanted { image: image.into(), file: file.into() });
            }
            (true, None) => {
                let recorded = header.and_then(Header::data_file_name).map(<[u8]>::to_vec);
                return Err(OpenError::DataFileMissing { image: image.into(), recorded, top: number == 0 });
            }
        };
        let (id, info) = storage.open(file, how)?;
        if !seen.insert(info.identity) {
            return Err(OpenError::DataFileTwice { image: image.into(), file: file.into() });
        }
        self.opened.push((number, DiskFile { id, info }));
        Ok(())
    }

    fn given_below(&mut self, image: &Path) -> Option<&'a Path> {
        let (_, file, met) = self.below.iter_mut().find(|(layer, ..)| *layer == image)?;
        *met = true;
        Some(file)
    }

    /// The files, by the number of their layer; an error if one was named for an image that is not in the chain.
    pub fn finish(self) -> Result<Vec<(usize, DiskFile)>, OpenError> {
        match self.below.iter().find(|(.., met)| !met) {
            Some((layer, ..)) => Err(OpenError::DataFileOfNoLayer { layer: PathBuf::from(layer) }),
            None => Ok(self.opened),
        }
    }
}

/// Extends a data file to the length of the disk before any other write to it. So it never grows while it is in use
/// (`FileInfo::block_size`), and a program that reads it as a raw image finds the whole disk.
pub(crate) async fn extend<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &mut DiskFile,
    disk: u64,
) -> Result<(), OpenError> {
    let length = disk.next_multiple_of(SECTOR);
    if file.info.length >= length {
        return Ok(());
    }
    let path = || file.info.path.clone();
    if file.info.block_device {
        return Err(OpenError::DataFileTooShort { path: path(), length: file.info.length, disk });
    }
    set_length(driver, file, length).await
}

/// Gives a data file the new length of its disk. Its bytes past the old end must have been cut off before, if they
/// are to show.
pub(crate) async fn resize<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &mut DiskFile,
    disk: u64,
) -> Result<(), OpenError> {
    if file.info.block_device {
        // A device that is too short is refused; the rest of a longer one is not used.
        return extend(driver, file, disk).await;
    }
    set_length(driver, file, disk).await?;
    let path = || file.info.path.clone();
    let failed = |source| OpenError::Io { path: path(), structure: "end of the file", offset: disk, source };
    driver.run_bare(Operation::bare(file.id, Kind::Sync, 0)).await.map_err(failed)
}

async fn set_length<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &mut DiskFile,
    length: u64,
) -> Result<(), OpenError> {
    let path = || file.info.path.clone();
    let failed =
        |source| OpenError::Io { path: path(), structure: "end of the file", offset: length, source };
    driver.run_bare(Operation::bare(file.id, Kind::SetLength, length)).await.map_err(failed)?;
    file.info.length = length;
    Ok(())
}
