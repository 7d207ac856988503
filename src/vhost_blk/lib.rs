//! The vhost-user-blk session: messages, guest memory, split rings and virtio-blk requests.
//!
//! Knows no image and no file: it talks to a [`BlockDevice`].

pub mod device;

pub use device::{BlockDevice, BlockQueue, DeviceProfile, Done, GuestSlice, Request, Status, Tag};
