//! Sizes of a disk, and why it cannot have one: for resizes of images that are in use or not.

use std::path::{Path, PathBuf};

use names::shown;
use qcow2::SECTOR;
use thiserror::Error;

use crate::error::{OpenError, RequestError};
use crate::image::change::ChangeError;

/// A size, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This size.
    Of(u64),
    /// Larger by this much.
    Larger(u64),
    /// Smaller by this much.
    Smaller(u64),
}

/// How to treat data past the new end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrinking {
    /// Shrinking is refused.
    Refused,
    /// The data is lost.
    Accepted,
}

/// The size in bytes before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Before.
    pub from: u64,
    /// After.
    pub to: u64,
}

/// Why a disk could not be resized.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// The image could not be changed.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The disk has fewer bytes than it is to lose.
    #[error("{}: the disk has {from} bytes, and cannot be {by} bytes smaller", shown(path))]
    NothingLeft {
        /// The image.
        path: PathBuf,
        /// The disk's size in bytes.
        from: u64,
        /// The requested difference in bytes.
        by: u64,
    },
    /// The disk would have no bytes.
    #[error("{}: the size of a disk cannot be {size}", shown(path))]
    Empty {
        /// The image.
        path: PathBuf,
        /// The requested size in bytes.
        size: u64,
    },
    /// The size is larger than a file can have.
    #[error("{}: the size is larger than a disk can have", shown(path))]
    TooLarge {
        /// The image.
        path: PathBuf,
    },
    /// The size is not in whole sectors.
    #[error("{}: {size} bytes are no multiple of {SECTOR}, as the size of a disk must be", shown(path))]
    NoSectors {
        /// The image.
        path: PathBuf,
        /// The requested size in bytes.
        size: u64,
    },
    /// Data would be lost, which the caller did not accept.
    #[error(
        "{}: the disk has {from} bytes: shrinking it to {to} loses the data past the new end; --shrink permits that",
        shown(path)
    )]
    WouldShrink {
        /// The image.
        path: PathBuf,
        /// The disk's size in bytes.
        from: u64,
        /// The requested size in bytes.
        to: u64,
    },
    /// A disk in use could not be resized.
    #[error("{}: {source}", shown(path))]
    InUse {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: InUseError,
    },
    /// A block device cannot be resized.
    #[error("{}: a block device cannot be resized", shown(path))]
    BlockDevice {
        /// The device.
        path: PathBuf,
    },
}

/// Why a disk in use could not be resized, beyond the reasons of [`ResizeError`] for any.
#[derive(Debug, Error)]
pub enum InUseError {
    /// A qcow2 image, or a shorter raw image, is open read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Another resize is under way.
    #[error("the disk is being resized already")]
    Busy,
    /// A file that holds the disk byte by byte would change its length within a block of its file system.
    #[error(
        "its file can change its length only by whole blocks of {block} bytes while the disk is in use: both the present \
         and the new length must be multiples"
    )]
    PartialBlock {
        /// Bytes of a block.
        block: u64,
    },
    /// A dead daemon left a journal, and nothing may be allocated before it is carried out.
    #[error("the last daemon was killed, and the frontend that has its journal is not back yet")]
    AwaitsJournal,
    /// It is no longer wanted.
    #[error("the resize was given up")]
    GivenUp,
    /// A step failed. The disk has its old size.
    #[error(transparent)]
    Step(#[from] RequestError),
}

impl From<OpenError> for ResizeError {
    fn from(error: OpenError) -> Self {
        ResizeError::Change(error.into())
    }
}

impl NewSize {
    pub(crate) fn of(self, from: u64, path: &Path) -> Result<u64, ResizeError> {
        let path = || path.to_owned();
        let size = match self {
            NewSize::Of(size) => size,
            NewSize::Larger(by) => {
                from.checked_add(by).ok_or_else(|| ResizeError::TooLarge { path: path() })?
            }
            NewSize::Smaller(by) => {
                from.checked_sub(by).ok_or_else(|| ResizeError::NothingLeft { path: path(), from, by })?
            }
        };
        if size == 0 {
            return Err(ResizeError::Empty { path: path(), size });
        }
        if size > i64::MAX as u64 {
            return Err(ResizeError::TooLarge { path: path() });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(ResizeError::NoSectors { path: path(), size });
        }
        Ok(size)
    }
}
