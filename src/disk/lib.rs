//! One open disk: opens a chain of images, and runs the engine's plans on a [`storage::Storage`].
//!
//! [`Disk`] is shared by all threads; each serves requests through a [`DiskQueue`] of its own. The fast path, for
//! requests whose clusters are all in the chain map, is straight-line code in `serve/fast.rs`. All other requests run
//! as async functions, one file per kind in `serve/`. No lock is held across I/O. Knows nothing of vhost-user or
//! virtio.
#![forbid(unsafe_code)]

mod background;
pub mod bounds;
mod disk;
mod error;
mod image;
mod inflate;
mod layer;
mod live;
mod open;
mod options;
mod range;
mod rules;
mod runtime;
mod serve;
mod shared;
mod size;

pub use background::housekeeper::Keeper;
pub use background::resizing::Resizing;
pub use block::{Request, RequestId};
pub use disk::Disk;
pub use engine::{EngineError, JournalMemory};
pub use error::{BackingNameError, BadBitmaps, OpenError, RequestError};
pub use image::{change, check, resize, snapshot};
pub use inflate::InflateError;
pub use layer::Layer;
pub use live::{NewOverlay, NotNamed, SnapshotError, SnapshotRefusal};
pub use open::chain::CHAIN_LAYERS_MAX;
pub use open::describe::{LayerDescription, describe};
pub use open::foreign::Foreign;
pub use open::overlay::{OldTop, Overlay};
pub use options::{DetectZeroes, Discards, DiskOptions, Format, OnEnospc};
pub use serve::journal::JournalKept;
pub use serve::queue::{DiskQueue, ParkedQueue};
pub use serve::request::Completed;
pub use serve::space::{SpaceStatus, SpaceWatch};
