//! The qcow2 format: bytes to types and back.
//!
//! This crate owns every number of the on-disk format: where a field is, which values it may have and what they mean.
//! It does no I/O, has no state and knows nothing of caches, plans or requests. Its input is untrusted: a broken value
//! is a [`FormatError`] or an [`EntryError`], never a panic, and no field decides how much memory is allocated. A valid
//! feature that Strata does not support is parsed, and [`Header::unsupported`] names it.
#![forbid(unsafe_code)]

pub mod address;
pub mod bitmap;
pub mod create;
mod encode;
pub mod entry;
pub mod error;
pub mod extension;
pub mod external;
pub mod feature;
pub mod geometry;
pub mod header;
mod parse;
pub mod position;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;
pub mod table;
mod validate;

pub use address::{GuestCluster, GuestOffset, HostCluster, HostOffset, HostRange, HostRun};
pub use bitmap::{Bitmap, BitmapDirectory, Bitmaps, bitmap_table_entry};
pub use create::NewImage;
pub use entry::{EntryError, L1Entry, L2Entry, RawL2Entry, refblock_offset};
pub use error::{FormatError, FormatErrorKind, Structure};
pub use extension::Extension;
pub use feature::{Compression, Incompatible, JournalNumber, Unsupported};
pub use geometry::{Geometry, SECTOR, SUBCLUSTERS, Version};
pub use header::Header;
pub use parse::Salvaged;
pub use refcount::{refcount, refcount_max, set_refcount};
pub use snapshot::{Snapshot, SnapshotTable};
pub use subcluster::{HostPlace, Subcluster, SubclusterSet, Subclusters};
pub use table::{entry, set_entry};
