//! The errors of a session. One small enum a boundary; nothing here is ever built from a string.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use names::shown;

/// Why a server could not be set up or had to stop. What one frontend does wrong never shows here: that ends its
/// session only.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Somebody accepts connections on the socket.
    #[error("socket {}: another program is listening on it", shown(path))]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("{} exists and is not a socket; it was left alone", shown(path))]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("socket {}: cannot {step}: {source}", shown(path))]
    Socket {
        /// The path.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// An inherited descriptor is no unix stream socket.
    #[error("the inherited file descriptor is not a unix stream socket: {source}")]
    InheritedFd {
        /// What the host said.
        source: io::Error,
    },
    /// An option is out of its range.
    #[error("{name} is {value}: it must be {range}")]
    Option {
        /// The option.
        name: &'static str,
        /// What was asked for.
        value: u32,
        /// What is possible.
        range: &'static str,
    },
    /// Waiting for a frontend failed.
    #[error("cannot {step}: {source}")]
    Wait {
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Why a session ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionEnd {
    #[error("the frontend left")]
    Left,
    #[error("the server stops")]
    Stopped,
    #[error("the frontend left in the middle of a message")]
    CutOff,
    #[error("a message was not complete {limit:?} after it began")]
    Unfinished { limit: Duration },
    #[error("more than {limit} descriptors beside a message, or too many that cannot be closed")]
    TooManyDescriptors { limit: usize },
    #[error("a page of the guest's memory is gone")]
    MemoryLost,
    #[error("the socket failed: {0}")]
    Socket(io::Error),
    #[error("{0}")]
    Message(vhost::vhost_user::Error),
}

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region has no bytes.
    #[error("memory region at {guest:#x} is empty")]
    Empty {
        /// Guest physical address.
        guest: u64,
    },
    /// An address or an offset plus the size is no 64-bit number.
    #[error("memory region at {guest:#x}: size {size:#x} overflows an address")]
    Overflow {
        /// Guest physical address.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions share guest addresses.
    #[error("memory region at {guest:#x} overlaps another")]
    Overlap {
        /// Guest physical address.
        guest: u64,
    },
    /// More regions than slots.
    #[error("more than {limit} memory regions")]
    TooMany {
        /// The most there can be.
        limit: usize,
    },
    /// The number of file descriptors is not the number of regions.
    #[error("{regions} memory regions came with {files} file descriptors")]
    Descriptors {
        /// Regions in the message.
        regions: usize,
        /// Descriptors beside it.
        files: usize,
    },
    /// The file is shorter than the region says: touching its end would be fatal.
    #[error("memory region at {guest:#x} ends at {end:#x} of a file of {length:#x} bytes")]
    BeyondFile {
        /// Guest physical address.
        guest: u64,
        /// Where in the file the region would end.
        end: u64,
        /// How long the file is.
        length: u64,
    },
    /// The descriptor is neither memory nor a file.
    #[error("memory region at {guest:#x} is not backed by a regular file or memfd")]
    NotAFile {
        /// Guest physical address.
        guest: u64,
    },
    /// No such region.
    #[error("there is no memory region at {guest:#x} of {size:#x} bytes")]
    Unknown {
        /// Guest physical address.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// The host refused to look at the file or to map it.
    #[error("memory region at {guest:#x}: cannot {step}: {source}")]
    Host {
        /// Guest physical address.
        guest: u64,
        /// What was tried.
        step: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// A range of guest addresses that is not in guest memory as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at guest address {address:#x} are not in guest memory")]
pub struct BadAddress {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// Why a ring did not start, or stopped: rule 3 of the rule of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A part of the ring is not in guest memory.
    #[error("a part of the ring is outside guest memory: {0}")]
    Address(#[from] BadAddress),
    /// A part of the ring is not aligned as virtio 1.2, 2.7 demands, or its size is not a power of two.
    #[error("the ring's addresses or its size ({size}) are impossible")]
    Layout {
        /// Descriptors.
        size: u16,
    },
    /// More requests than the ring has descriptors.
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailableJump {
        /// Where we are.
        from: u16,
        /// What the guest wrote.
        to: u16,
        /// Descriptors.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("the available ring names descriptor {head} of {size}")]
    HeadOutOfRange {
        /// What the guest wrote.
        head: u16,
        /// Descriptors.
        size: u16,
    },
    /// A page of guest memory is gone, so what is done cannot be reported.
    #[error("a part of the guest's memory is gone")]
    MemoryLost,
    /// The same chain twice at the same time.
    #[error("descriptor {head} was made available while it is in flight")]
    HeadInFlight {
        /// The chain's head.
        head: u16,
    },
}
