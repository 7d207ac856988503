//! In-flight tracking: the memory that survives this daemon, because the frontend keeps it (docs/protocol.md).
//!
//! `layout` says where everything lies, `cells` how it is accessed, and `region` makes and maps it. `split` and `packed`
//! keep the record of one queue of their kind, and `defects` says why a record cannot be true. Nothing here reads the
//! descriptors of guest memory or talks to the disk. The frontend shares the memory, so whatever is read from it is
//! checked.

mod cells;
mod defects;
mod layout;
mod packed;
#[cfg(test)]
mod packed_tests;
#[allow(unsafe_code)]
mod region;
mod split;
#[cfg(test)]
mod split_tests;

pub(crate) use cells::{Packed, Split};
pub(crate) use defects::AreaError;
pub(crate) use layout::{Layout, RingKind};
pub use packed::PackedTracker;
pub(crate) use region::{Claim, Region, RegionError};
pub(crate) use split::RingIndexes;
pub use split::SplitTracker;
