//! The errors of a session: one small enum for each boundary. No error here is built from a string.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use names::shown;

/// The reasons why a server could not start or had to stop. A frontend's errors never appear here: they end only its
/// session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Another process accepts connections on the socket.
    #[error("socket {}: another program is listening on it", shown(path))]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The path holds a file that is not a socket.
    #[error("{} exists and is not a socket; it was left alone", shown(path))]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be created.
    #[error("socket {}: cannot {step}: {source}", shown(path))]
    Socket {
        /// The path.
        path: PathBuf,
        /// The failed step.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// An inherited socket that is to listen is connected.
    #[error("the inherited socket does not listen: it is connected")]
    NotListening,
    /// An inherited descriptor is not a unix stream socket.
    #[error("the inherited file descriptor is not a unix stream socket: {source}")]
    InheritedFd {
        /// The host's error.
        source: io::Error,
    },
    /// An option is out of its range.
    #[error("{name} is {value}: it must be {range}")]
    Option {
        /// The option.
        name: &'static str,
        /// The given value.
        value: u32,
        /// The allowed range.
        range: &'static str,
    },
    /// Waiting for a frontend failed.
    #[error("cannot {step}: {source}")]
    Wait {
        /// The failed step.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// The reasons why a session ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionEnd {
    #[error("the frontend left")]
    Left,
    #[error("the server stops")]
    Stopped,
    #[error("it goes on with another server, as it has sent nothing yet")]
    Unheard,
    #[error("the frontend left in the middle of a message")]
    CutOff,
    #[error("a message was not complete {limit:?} after it began")]
    Unfinished { limit: Duration },
    #[error("more than {limit} descriptors with a message, or too many that cannot be closed")]
    TooManyDescriptors { limit: usize },
    #[error("a page of the guest's memory is gone")]
    MemoryLost,
    #[error("the socket failed: {0}")]
    Socket(io::Error),
    #[error("{0}")]
    Message(vhost::vhost_user::Error),
}

/// The reasons why a memory table is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region has no bytes.
    #[error("memory region at {guest:#x} is empty")]
    Empty {
        /// Guest physical address.
        guest: u64,
    },
    /// An address or an offset plus the size does not fit 64 bits.
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
        /// The limit.
        limit: usize,
    },
    /// The number of file descriptors is not the number of regions.
    #[error("{regions} memory regions came with {files} file descriptors")]
    Descriptors {
        /// Regions in the message.
        regions: usize,
        /// Descriptors sent with it.
        files: usize,
    },
    /// The file is shorter than the region claims: touching its end would be fatal.
    #[error("memory region at {guest:#x} ends at {end:#x} of a file of {length:#x} bytes")]
    BeyondFile {
        /// Guest physical address.
        guest: u64,
        /// The offset in the file at which the region would end.
        end: u64,
        /// The length of the file.
        length: u64,
    },
    /// The descriptor is neither memory nor a regular file.
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
    /// The host refused to stat the file or to map it.
    #[error("memory region at {guest:#x}: cannot {step}: {source}")]
    Host {
        /// Guest physical address.
        guest: u64,
        /// The failed step.
        step: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// A range of guest addresses that is not completely in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at guest address {address:#x} are not in guest memory")]
pub struct BadAddress {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// The reasons why a ring did not start, or stopped: rule 3 of the rule of four.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A part of the ring is not in guest memory.
    #[error("a part of the ring is outside guest memory: {0}")]
    Address(#[from] BadAddress),
    /// A part of the ring is not aligned as virtio 1.2, 2.7 and 2.8 require, or its size is 0, or not a power of two in a
    /// split ring.
    #[error("the ring's addresses or its size ({size}) are impossible")]
    Layout {
        /// Descriptors.
        size: u16,
    },
    /// The base names no place where a ring of this size may go on.
    #[error("a ring of {size} cannot go on at base {base:#x}")]
    Base {
        /// The base, as in the messages.
        base: u32,
        /// Descriptors.
        size: u16,
    },
    /// More requests than the ring has descriptors.
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailableJump {
        /// Our index.
        from: u16,
        /// The guest's index.
        to: u16,
        /// Descriptors.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("the available ring names descriptor {head} of {size}")]
    HeadOutOfRange {
        /// The guest's value.
        head: u16,
        /// Descriptors.
        size: u16,
    },
    /// A page of guest memory is lost, so completed chains cannot be reported.
    #[error("a part of the guest's memory is gone")]
    MemoryLost,
    /// The guest made a chain available that is still in flight.
    #[error("descriptor {head} was made available while it is in flight")]
    HeadInFlight {
        /// The chain's head.
        head: u16,
    },
    /// A chain in a packed ring has more descriptors than the ring has room for, or no end.
    #[error("the chain at descriptor {index} does not end within the {room} descriptors that are free")]
    ChainTooLong {
        /// Its first descriptor.
        index: u16,
        /// Descriptors that no chain in flight uses.
        room: u16,
    },
    /// The first descriptor of a chain in a packed ring was made available, and a later one was not.
    #[error("descriptor {index} is not available, but the chain to which it belongs is")]
    ChainCut {
        /// The descriptor.
        index: u16,
    },
    /// A chain in a packed ring was changed after it was made available.
    #[error("the chain at descriptor {index} was changed after it was made available")]
    ChainChanged {
        /// Its first descriptor.
        index: u16,
    },
    /// A chain in a packed ring has a buffer id that is no less than the size of the ring.
    #[error("a chain has buffer id {id} in a ring of {size}")]
    IdOutOfRange {
        /// The guest's value.
        id: u16,
        /// Descriptors.
        size: u16,
    },
    /// The guest made a chain available in a packed ring with the buffer id of a chain in flight.
    #[error("buffer id {id} was made available while it is in flight")]
    IdInFlight {
        /// The buffer id.
        id: u16,
    },
}
