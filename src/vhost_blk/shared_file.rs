//! Maps pieces of files that a frontend shares with the daemon: the dirty log and the in-flight region.
//!
//! Owns the checks of the file. No number from a message is trusted. A file that is truncated later is handled by
//! `loss`.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

use crate::descriptor::{self, Kind};
use crate::loss::{MemoryLoss, Watch};
use crate::memory::page_bytes;

/// The reasons why a piece of a file is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error("it is at offset {offset:#x} of its file, which is no multiple of {page:#x}")]
    Unaligned { offset: u64, page: usize },
    #[error("it has {bytes:#x} bytes at offset {offset:#x} in a file of {length:#x} bytes")]
    BeyondFile { bytes: u64, offset: u64, length: u64 },
    #[error("it is not backed by a memfd or a regular file")]
    NotAFile,
    #[error("too many regions are mapped already")]
    TooMany,
    #[error("cannot {step}: {source}")]
    Host { step: &'static str, source: io::Error },
}

/// A piece of a file, as a message claims it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub offset: u64,
    pub bytes: u64,
}

/// A piece that lies in its file.
pub(crate) struct SharedPiece {
    file: File,
    offset: u64,
    /// The file's page size in bytes.
    page: usize,
}

/// Mapped memory. Its watch is declared first, so that it drops before the mapping.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub watch: Watch,
    pub memory: MmapRegion<()>,
}

impl SharedPiece {
    /// Checks a claimed piece of a file.
    ///
    /// # Errors
    /// When the file is shorter than claimed or no file at all, or the piece begins inside a page.
    pub(crate) fn check(claimed: Piece, file: File) -> Result<Self, ShareError> {
        let Piece { offset, bytes } = claimed;
        let kind = descriptor::kind_of(&file);
        if !matches!(kind, Kind::Memory | Kind::Local) {
            return Err(ShareError::NotAFile);
        }
        let page = if kind == Kind::Memory { page_bytes(&file) } else { rustix::param::page_size() };
        if !offset.is_multiple_of(page as u64) {
            return Err(ShareError::Unaligned { offset, page });
        }
        let failed =
            |error: rustix::io::Errno| ShareError::Host { step: "stat its file", source: error.into() };
        let length = descriptor::attributes(&file).map_err(failed)?.stx_size;
        if offset.checked_add(bytes).is_none_or(|end| end > length || end > i64::MAX as u64) {
            return Err(ShareError::BeyondFile { bytes, offset, length });
        }
        Ok(SharedPiece { file, offset, page })
    }

    /// Maps the first `bytes` bytes of the piece, in whole pages. Huge pages are mapped and unmapped whole; the length
    /// of their file is a multiple of them.
    ///
    /// # Errors
    /// When the host refuses.
    pub(crate) fn map(self, bytes: usize, loss: &Arc<MemoryLoss>) -> Result<Mapping, ShareError> {
        let mapped = bytes.next_multiple_of(self.page);
        let memory = MmapRegion::<()>::from_file(FileOffset::new(self.file, self.offset), mapped)
            .map_err(|error| ShareError::Host { step: "map it", source: io::Error::other(error) })?;
        let watch = Watch::new(memory.as_ptr(), mapped, self.page, loss).ok_or(ShareError::TooMany)?;
        Ok(Mapping { watch, memory })
    }
}
