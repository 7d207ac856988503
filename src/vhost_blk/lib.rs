//! The vhost-user-blk session: messages, guest memory, split and packed rings, and virtio-blk requests.
//!
//! Knows no image and no file, only a [`BlockDevice`]. A [`Server`] accepts frontends, one at a time. A session
//! (`session`) applies their messages to the queues (`vring`) and the memory (`memory`). Each started queue has a
//! thread (`worker`) that takes chains from its ring (`ring`, `virtqueue`), checks them (`request`) and submits them to the disk.
//!
//! Where the frontend keeps an in-flight region (`in_flight_region`), a worker records in it what it has taken.
//!
//! Only four files hold unsafe code. `memory` and `in_flight_region/region` have the mappings, `loss` the handler
//! for lost pages. `fd` has descriptors given by number, and the interruption of writes to them.

#![deny(unsafe_code)]

mod back_channel;
pub mod bounds;
mod config;
mod control;
#[cfg(test)]
mod death;
mod descriptor;
pub mod device;
mod dirty_log;
mod door;
mod error;
#[allow(unsafe_code)]
mod fd;
mod in_flight;
mod in_flight_region;
mod line_limit;
#[allow(unsafe_code)]
mod loss;
#[allow(unsafe_code)]
mod memory;
mod message;
mod metrics;
mod options;
mod pace;
#[cfg(test)]
mod packed_driver;
mod part;
mod peer;
mod pieces;
mod poll;
mod portion;
mod pulse;
mod relay;
mod request;
mod ring;
mod server;
mod serving;
mod session;
mod shared_file;
mod socket_file;
mod stop;
mod virtqueue;
mod vring;
mod worker;
mod write_cache;

/// For this project's own benchmarks and fuzz targets, which use the ring without a session. None of it is stable.
#[doc(hidden)]
pub mod internals {
    pub use crate::device::GuestSlice;
    pub use crate::in_flight_region::{PackedTracker, SplitTracker};
    pub use crate::memory::{GuestMemory, MemoryTable, RegionInfo};
    pub use crate::request::{Checker, Parsed};
    pub use crate::ring::{
        Chain, Fault, PackedDescriptor, PackedRing, Position, RecordedChain, RingLayout, SplitRing, Used,
    };
}

pub use back_channel::BackChannel;
pub use block::{Completed, Request, RequestId};
pub use device::{BlockDevice, BlockQueue, Capacity, DeviceProfile, GuestSlice, JournalMemory};
pub use error::SessionError;
pub use metrics::{Metrics, QueueSnapshot};
pub use options::ServeOptions;
pub use pulse::{Pulse, Stage};
pub use server::{Server, Sockets, serve};
pub use socket_file::Listening;
pub use stop::StopHandle;
