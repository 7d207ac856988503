//! Finds the kind, identity, length and alignment of an open file, and whether it lies in memory.
//!
//! It reads attributes, never contents. Alignment applies to O_DIRECT; a buffered file has none.

use std::fs::File;
use std::io;
use std::path::Path;

use names::shown;
use rustix::fs::{AtFlags, FileType, OFlags, SeekFrom, StatxFlags};
use tracing::warn;

use crate::FileIdentity;
use crate::buffer::BUFFER_ALIGNMENT;
use crate::error::{FileKind, Step, StorageError};

/// The assumed alignment of direct I/O in bytes, where the file system does not report it.
const ALIGNMENT_UNKNOWN: u32 = 512;

/// The most offset alignment in bytes that a file is opened directly with. Above it a guest's 512-byte requests would
/// need read-modify-write, which the page cache does.
const OFFSET_ALIGNMENT_MAX: u32 = 512;

/// `f_type` of tmpfs, as in statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The result of [`probe`].
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) block_size: u32,
    pub(super) block_device: bool,
    pub(super) memory_backed: bool,
    /// Goes through the page cache, and does not lie in memory. Set by [`settle_flags`].
    pub(super) buffered: bool,
    pub(super) identity: FileIdentity,
    /// The needs of direct I/O; [`settle_flags`] replaces both by 1 when the file ends up buffered.
    pub(super) offset_alignment: u32,
    pub(super) memory_alignment: u32,
    /// False if the file system reports no direct I/O for this file.
    direct_possible: bool,
}

/// Finds out what `file` is; refuses what cannot be an image.
pub(super) fn probe(file: &File, path: &Path) -> Result<Probed, StorageError> {
    let failed = |step| {
        move |errno: rustix::io::Errno| StorageError::File { step, path: path.into(), source: errno.into() }
    };
    let stat = rustix::fs::fstat(file).map_err(failed(Step::Stat))?;
    let block_device = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => false,
        FileType::BlockDevice => true,
        other => return Err(StorageError::NotAnImage { path: path.into(), kind: file_kind(other) }),
    };
    let identity = match block_device {
        true => FileIdentity { device: 0, number: stat.st_rdev },
        false => FileIdentity { device: stat.st_dev, number: stat.st_ino },
    };
    // A device's node may lie on a tmpfs (/dev), which says nothing about the device.
    let memory_backed = !block_device && is_tmpfs(file).map_err(failed(Step::StatFileSystem))?;
    let sector = match block_device {
        true => rustix::fs::ioctl_blksszget(file).map_err(failed(Step::ProbeBlockDevice))?,
        false => ALIGNMENT_UNKNOWN,
    };
    let (offset_alignment, memory_alignment, direct_possible) = match direct_alignment(file) {
        _ if memory_backed => (1, 1, true),
        Some((0, _)) => (1, 1, false),
        Some((offset, memory)) => (offset.max(if block_device { sector } else { 1 }), memory.max(1), true),
        None => (sector, sector, true),
    };
    let block_size = match () {
        // The page cache is the file, so no direct write can collide with it.
        () if memory_backed => 512,
        () if block_device => sector,
        () => u32::try_from(stat.st_blksize).unwrap_or(4096).next_power_of_two().clamp(512, 65_536),
    };
    Ok(Probed {
        block_size,
        block_device,
        memory_backed,
        buffered: false,
        identity,
        offset_alignment,
        memory_alignment,
        direct_possible,
    })
}

/// Sets O_DIRECT where it is wanted and possible, clears the O_NONBLOCK of the open, and sets the resulting alignment.
pub(super) fn settle_flags(
    file: &File,
    path: &Path,
    want_direct: bool,
    probed: &mut Probed,
) -> Result<(), StorageError> {
    let failed = |errno: rustix::io::Errno| StorageError::File {
        step: Step::SetFlags,
        path: path.into(),
        source: errno.into(),
    };
    let blocking = rustix::fs::fcntl_getfl(file).map_err(failed)? - OFlags::NONBLOCK;
    if want_direct && direct_suits(path, probed) {
        match rustix::fs::fcntl_setfl(file, blocking | OFlags::DIRECT) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INVAL) if probed.memory_backed => {}
            Err(rustix::io::Errno::INVAL) => {
                warn!(path = %shown(path), "opened buffered: the file system has no direct I/O");
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
    rustix::fs::fcntl_setfl(file, blocking).map_err(failed)?;
    probed.buffered = !probed.memory_backed;
    probed.offset_alignment = 1;
    probed.memory_alignment = 1;
    Ok(())
}

/// True if direct I/O suits this file; warns if not.
fn direct_suits(path: &Path, probed: &Probed) -> bool {
    let (offset, memory) = (probed.offset_alignment, probed.memory_alignment);
    if !probed.direct_possible {
        warn!(path = %shown(path), "opened buffered: the file system has no direct I/O on this file");
    } else if !offset.is_power_of_two() || !memory.is_power_of_two() {
        warn!(path = %shown(path), offset, memory, "opened buffered: odd alignment for direct I/O");
    } else if offset > OFFSET_ALIGNMENT_MAX || memory as usize > BUFFER_ALIGNMENT {
        warn!(
            path = %shown(path), offset, memory,
            "opened buffered: direct I/O here needs a coarser alignment than a guest's 512-byte sectors"
        );
    } else {
        return true;
    }
    false
}

/// The present length in bytes.
pub(super) fn length(file: &File, block_device: bool) -> io::Result<u64> {
    if block_device {
        // All threads share the file position, but none uses it: every operation has its own offset.
        return Ok(rustix::fs::seek(file, SeekFrom::End(0))?);
    }
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// (offset, memory) alignment for direct I/O as STATX_DIOALIGN reports it; (0, 0) means none on this file. `None`
/// means that the kernel (before Linux 6.1) or the file system does not report it.
fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let reported = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    reported.then_some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
}

/// Bytes that the host has allocated for a file, as the kernel knows them. `fstat` would ask the server of a network or
/// FUSE file system, which may never answer, and threads that must not wait ask for this.
pub(super) fn allocated(file: &File) -> io::Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(rustix::fs::statx(file, c"", flags, StatxFlags::BLOCKS)?.stx_blocks.saturating_mul(512))
}

fn is_tmpfs(file: &File) -> rustix::io::Result<bool> {
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok(u64::try_from(kind) == Ok(TMPFS_MAGIC))
}

pub(super) fn file_kind(kind: FileType) -> FileKind {
    match kind {
        FileType::Directory => FileKind::Directory,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharacterDevice,
        _ => FileKind::Unknown,
    }
}
