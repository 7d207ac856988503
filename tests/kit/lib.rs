//! The kit that tests and benchmarks share: a vhost-user-blk client, a load generator, a model of a disk, and
//! wrappers of QEMU's image tools.
//!
//! It uses none of Strata's crates: it sees a disk through a socket, as a guest does, and an image as another program
//! does. It reports failures as error values; only programmer errors panic.

pub mod client;
pub mod images;
pub mod load;
pub mod model;
pub mod play;
pub mod storage_daemon;

pub use client::{Client, ClientError, Options, Request, Status};

pub use images::Qemu;
pub use model::{ByteModel, Operation};
pub use storage_daemon::StorageDaemon;
pub use strata_random as random;
