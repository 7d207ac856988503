//! In-flight tracking: the memory that survives this daemon, because the frontend keeps it (docs/protocol.md).
//!
//! `layout` says where everything lies, `cells` how it is accessed, `region` makes and maps it, and `split` keeps the
//! record of one split queue. Nothing here reads a descriptor or talks to the disk. The frontend shares the memory, so
//! whatever is read from it is checked.

mod cells;
mod layout;
#[allow(unsafe_code)]
mod region;
mod split;
#[cfg(test)]
mod split_tests;

pub(crate) use layout::Layout;
pub(crate) use region::{Claim, QueueArea, Region, RegionError};
pub use split::SplitTracker;
pub(crate) use split::{AreaError, Recovered, RingIndexes};
