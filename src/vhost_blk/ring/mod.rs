//! The two kinds of virtqueue, seen from the device: they take chains from the guest and give them back.
//!
//! `split` and `packed` each own the positions in a ring of their kind. `chain` has what a chain consists of and how its
//! descriptors are copied and translated, and `position` counts in a packed ring. None of them touches the data of the
//! chains, the in-flight region or the disk.

mod chain;
mod packed;
#[cfg(test)]
mod packed_tests;
mod position;
mod split;
#[cfg(test)]
mod split_tests;

pub use chain::{Chain, Fault, RingLayout, Used};
pub use packed::{PackedDescriptor, PackedRing, RecordedChain};
pub use position::Position;
pub use split::SplitRing;
