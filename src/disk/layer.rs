//! The description of each layer of an open chain, for messages and `strata info`.

use std::path::PathBuf;

use qcow2::{Header, Version};
use storage::{FileId, FileInfo};

use crate::range::ByteRange;

/// A layer of an open chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The file, as it was opened.
    pub path: PathBuf,
    /// The qcow2 header; none for a raw layer.
    pub header: Option<Header>,
    /// Virtual size in bytes.
    pub size: u64,
    /// The file's length in bytes at open.
    pub file_length: u64,
}

impl Layer {
    pub(crate) fn qcow2(path: PathBuf, header: Header, file_length: u64) -> Self {
        Layer { path, size: header.size, header: Some(header), file_length }
    }

    /// True if a cluster can keep its location in the file and read as zero.
    pub(crate) fn knows_zero_clusters(&self) -> bool {
        self.header.as_ref().is_some_and(|header| header.version == Version::V3)
    }
}

/// An open file of the chain; its position in the list is the engine's `FileIndex`.
pub(crate) struct DiskFile {
    pub id: FileId,
    pub info: FileInfo,
}

impl DiskFile {
    /// The whole file system blocks in a range.
    pub fn whole_blocks(&self, range: ByteRange) -> ByteRange {
        whole_blocks(&self.info, range)
    }

    /// True if memory at these addresses and lengths may be used for direct I/O on this file.
    pub fn takes(&self, slices: &[storage::GuestSlice]) -> bool {
        let mask = self.info.memory_alignment.max(1) as usize - 1;
        mask == 0
            || slices.iter().all(|slice| (slice.ptr_guard().as_ptr() as usize | slice.len()) & mask == 0)
    }
}

/// The whole file system blocks in a range of a file.
pub(crate) fn whole_blocks(info: &FileInfo, range: ByteRange) -> ByteRange {
    range.whole_blocks(info.block_size.max(1).into())
}
