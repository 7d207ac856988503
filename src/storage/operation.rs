//! Operations on a file, the memory they move, and their completions.

use smallvec::SmallVec;

use crate::{AlignedBuf, FileId, GuestSlice};

/// The caller's name for an operation, handed back in its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// A host error number, as in errno(3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// A contiguous piece of the memory that an operation moves.
#[derive(Debug)]
pub enum Part {
    /// Guest memory, used in place.
    Guest(GuestSlice),
    /// A buffer of the daemon, owned by the operation until it completes.
    Owned(AlignedBuf),
}

/// The memory of an operation, in file order.
pub type Parts = SmallVec<[Part; 1]>;

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Fill the parts from the file; past its end with zeros.
    Read,
    /// Write the parts to the file.
    Write,
    /// fdatasync: operations that completed before this was pushed are durable afterwards, with the file's length.
    Sync,
    /// Free the host space of `length` bytes; they read as zero afterwards. Fails with EOPNOTSUPP where the file system
    /// cannot do it.
    Punch {
        /// Bytes, from the operation's offset.
        length: u64,
    },
    /// Make `length` bytes read as zero, keeping the space allocated where the file system can; extends the file.
    Zero {
        /// Bytes, from the operation's offset.
        length: u64,
    },
    /// Allocate host space for `length` bytes without changing what they read as; extends the file.
    Allocate {
        /// Bytes, from the operation's offset.
        length: u64,
    },
    /// Set the file's length to the operation's offset. Growing reads as zero.
    SetLength,
}

/// One operation on one file.
#[derive(Debug)]
pub struct Operation {
    /// The file.
    pub file: FileId,
    /// The kind of operation.
    pub kind: Kind,
    /// Byte offset in the file.
    pub offset: u64,
    /// The memory that a read fills or a write takes; empty for the other kinds.
    pub parts: Parts,
    /// A hint to use the kernel's worker threads for a file in memory. The calling thread has other work, and the
    /// operation is long enough to be worth another processor. Otherwise it runs on the calling thread.
    pub offload: bool,
}

/// A finished operation with its memory.
#[derive(Debug)]
pub struct Completion {
    /// The token it was pushed with.
    pub token: Token,
    /// Success means that the whole operation was done.
    pub result: Result<(), Errno>,
    /// The memory it was pushed with.
    pub parts: Parts,
}

impl Part {
    /// Bytes of memory.
    pub fn len(&self) -> usize {
        match self {
            Part::Guest(slice) => slice.len(),
            Part::Owned(buffer) => buffer.len(),
        }
    }

    /// True if there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Operation {
    /// An operation that moves no memory.
    pub fn bare(file: FileId, kind: Kind, offset: u64) -> Self {
        Self::new(file, kind, offset, Parts::new())
    }

    /// An operation on that memory.
    pub fn new(file: FileId, kind: Kind, offset: u64, parts: Parts) -> Self {
        Operation { file, kind, offset, parts, offload: false }
    }

    /// The total length of the parts in bytes.
    pub fn parts_len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }
}

impl Errno {
    /// EIO.
    pub const EIO: Errno = Errno(libc::EIO);
    /// ENOSPC.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// EOPNOTSUPP.
    pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// EINVAL.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// EDQUOT.
    pub const EDQUOT: Errno = Errno(libc::EDQUOT);
    /// EFBIG: past the file size limit of the file system or the process.
    pub const EFBIG: Errno = Errno(libc::EFBIG);
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
