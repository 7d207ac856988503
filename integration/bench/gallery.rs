//! The images of one place: a full image, which is created once, and the image for each turn of a case.
//!
//! Owns the folder, which is removed on drop. Loads that only read share an image. Every other turn gets a new image or
//! a copy, so that no server sees another's changes.

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise, statfs};
use std::fs::{File, remove_dir_all, remove_file};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use strata_integration::command;
use strata_integration::daemon::workspace;
use strata_integration::image::{self, Backing};
use strata_kit::load::stamp_block;
use tempfile::TempDir;

use super::case::{CLUSTER_EXTENDED, Case, Image};

/// The seed of the stamps of every full image.
pub const SEED: u64 = 1;

/// The prefix of the folders' names.
const PREFIX: &str = "strata-bench-";
/// The file in each folder whose lock means that the folder is in use.
const OWNER: &str = "owner";

/// The places for images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// /dev/shm: memory.
    Shm,
    /// The repository's target folder: a disk.
    Disk,
}

impl Place {
    /// Its name for `--where`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Disk => "disk",
        }
    }

    fn folder(self) -> Result<TempDir> {
        let parent = match self {
            Self::Shm => PathBuf::from("/dev/shm"),
            Self::Disk => workspace().join("target").join("bench-peers"),
        };
        std::fs::create_dir_all(&parent).with_context(|| parent.display().to_string())?;
        remove_abandoned(&parent)?;
        tempfile::Builder::new().prefix(PREFIX).tempdir_in(&parent).context("a folder for images")
    }
}

/// Removes the folders of killed runs: those whose lock is free. A folder without the lock file is still being created.
fn remove_abandoned(parent: &Path) -> Result<()> {
    for entry in std::fs::read_dir(parent).with_context(|| parent.display().to_string())? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let owner = File::options().write(true).open(entry.path().join(OWNER));
        if owner.is_ok_and(|file| file.try_lock().is_ok()) {
            remove_dir_all(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    Ok(())
}

/// Virtual sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Of full images, and of overlays over them.
    pub full: u64,
    /// Of images with allocated, unwritten clusters.
    pub allocated: u64,
    /// Of empty images.
    pub fresh: u64,
    /// Of empty images that are written from end to end.
    pub sequential: u64,
}

/// The images of a place.
pub struct Gallery {
    folder: TempDir,
    /// Locked while the folder is in use.
    _owner: File,
    sizes: Sizes,
    full: PathBuf,
    number: u64,
}

/// An image for one turn. It is removed on drop unless it is shared.
#[derive(Debug)]
pub struct Specimen {
    /// The path of the image to serve.
    pub path: PathBuf,
    own: bool,
}

impl Drop for Specimen {
    fn drop(&mut self) {
        if self.own {
            // If this fails, the file is removed with the folder.
            let _ = remove_file(&self.path);
        }
    }
}

impl Gallery {
    /// Creates the folder and the full image.
    pub fn open(place: Place, sizes: Sizes) -> Result<Self> {
        let folder = place.folder()?;
        let owner = File::create(folder.path().join(OWNER))?;
        owner.lock().context("the lock of a new folder")?;
        let (full, raw) = (folder.path().join("full.qcow2"), folder.path().join("full.raw"));
        write_stamped(&raw, sizes.full).with_context(|| raw.display().to_string())?;
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-S", "0", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&full);
        command::output(&mut convert)?;
        settle(&full)?;
        settle(&raw)?;
        Ok(Self { folder, _owner: owner, sizes, full, number: 0 })
    }

    /// The raw file with the full image's contents. All turns share it: earlier writes to it do not affect later turns.
    pub fn raw(&self) -> Result<PathBuf> {
        let path = self.folder.path().join("full.raw");
        settle(&path)?;
        Ok(path)
    }

    /// The type of the file system, from Linux's magic number.
    pub fn file_system(&self) -> Result<String> {
        Ok(match statfs(self.folder.path())?.f_type {
            0x0102_1994 => "tmpfs".to_owned(),
            0xef53 => "ext4".to_owned(),
            0x5846_5342 => "xfs".to_owned(),
            0x9123_683e => "btrfs".to_owned(),
            other => format!("{other:#x}"),
        })
    }

    /// The image for the verifying turn of a case. Its data can be distinguished from the case's own data.
    pub fn specimen_with_data(&mut self, case: &Case) -> Result<Specimen> {
        if case.image == Image::Allocated { self.copy_of_full() } else { self.specimen(case) }
    }

    /// The image for a turn of a case.
    pub fn specimen(&mut self, case: &Case) -> Result<Specimen> {
        let shared = |path: PathBuf| Specimen { path, own: false };
        match case.image {
            Image::Full if !case.writes() => Ok(shared(self.full.clone())),
            Image::Chain(layers) => self.chain(layers).map(shared),
            Image::Full => self.copy_of_full(),
            Image::Allocated => self.fresh(self.sizes.allocated, None, "preallocation=metadata"),
            Image::Fresh if case.block() > super::case::BLOCK => self.fresh(self.sizes.sequential, None, ""),
            Image::Fresh => self.fresh(self.sizes.fresh, None, ""),
            Image::FreshExtended => {
                let options = format!("extended_l2=on,cluster_size={CLUSTER_EXTENDED}");
                self.fresh(self.sizes.fresh, None, &options)
            }
            Image::OverFull => {
                let below = self.full.clone();
                self.fresh(self.sizes.full, Some(&below), "")
            }
        }
    }

    fn next_path(&mut self) -> PathBuf {
        self.number += 1;
        self.folder.path().join(format!("turn-{}.qcow2", self.number))
    }

    fn copy_of_full(&mut self) -> Result<Specimen> {
        let path = self.next_path();
        let mut copy = Command::new("cp");
        copy.args(["--sparse=auto", "--reflink=never"]).arg(&self.full).arg(&path);
        command::output(&mut copy)?;
        settle(&path)?;
        Ok(Specimen { path, own: true })
    }

    fn fresh(&mut self, bytes: u64, below: Option<&Path>, options: &str) -> Result<Specimen> {
        let path = self.next_path();
        let backing = below.map(|image| Backing { image, format: "qcow2" });
        image::create(&path, "qcow2", bytes, backing, options)?;
        settle(&path)?;
        Ok(Specimen { path, own: true })
    }

    fn chain_folder(&self, layers: usize) -> PathBuf {
        self.folder.path().join(format!("chain-{layers}"))
    }

    /// The top of a chain, which is created on first use.
    fn chain(&mut self, layers: usize) -> Result<PathBuf> {
        let folder = self.chain_folder(layers);
        let path = |layer: usize| folder.join(format!("{layer}.qcow2"));
        if !folder.exists() {
            std::fs::create_dir(&folder)?;
            let mut below = self.full.clone();
            for layer in 1..=layers {
                let backing = Backing { image: &below, format: "qcow2" };
                image::create(&path(layer), "qcow2", self.sizes.full, Some(backing), "")?;
                below = path(layer);
            }
            settle(&below)?;
        }
        Ok(path(layers))
    }
}

/// Writes a raw file in which every sector describes itself.
fn write_stamped(path: &Path, bytes: u64) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let words: Vec<AtomicU64> = (0..PIECE / 8).map(|_| AtomicU64::new(0)).collect();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for offset in (0..bytes).step_by(PIECE as usize) {
        stamp_block(&words, SEED, offset);
        for word in &words {
            file.write_all(&word.load(Ordering::Relaxed).to_ne_bytes())?;
        }
    }
    Ok(file.flush()?)
}

/// Writes the file to its disk and drops it from the page cache, so that its creation affects no server.
fn settle(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_abandoned_folders_are_removed() -> Result<()> {
        let parent = tempfile::tempdir()?;
        let folder = |name: &str| -> Result<PathBuf> {
            let path = parent.path().join(name);
            std::fs::create_dir(&path)?;
            Ok(path)
        };
        let (used, left) = (folder("strata-bench-used")?, folder("strata-bench-left")?);
        let (new, foreign) = (folder("strata-bench-new")?, folder("something-else")?);
        let owner = File::create(used.join(OWNER))?;
        owner.lock()?;
        for path in [&left, &foreign] {
            File::create(path.join(OWNER))?;
        }
        remove_abandoned(parent.path())?;
        assert!(used.exists() && new.exists() && foreign.exists() && !left.exists());
        Ok(())
    }
}
