//! Why a queue's area cannot be true, and the checks that both kinds of areas share.

use crate::error::RingError;

/// The version of a queue's area in the specification.
pub(super) const VERSION: u16 = 1;
/// No daemon counts so far. A larger counter would wrap around before its successors' last.
const COUNTER_MAX: u64 = u64::MAX / 2;

/// The reasons why a queue's area cannot be true: the queue does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AreaError {
    #[error("it has {entries} descriptors, the ring has {size}")]
    Small { entries: usize, size: u16 },
    #[error("its version is {version}, only {VERSION} is known")]
    Version { version: u16 },
    #[error("it has unknown features {features:#x}")]
    Features { features: u64 },
    #[error("it claims {claimed} descriptors instead of {entries}")]
    Count { claimed: u16, entries: usize },
    #[error("{outstanding} requests are outstanding in a ring of {size}")]
    Outstanding { outstanding: u16, size: u16 },
    #[error("its used index is {recorded}, the ring's is {used}: no batch of a ring of {size} is that long")]
    Batch { recorded: u16, used: u16, size: u16 },
    #[error("its last batch has descriptor {head}, which is out of range or there twice")]
    BatchHead { head: u16 },
    #[error("descriptor {head} is in flight, the ring has {size}")]
    Head { head: u16, size: u16 },
    #[error("descriptor {head} has the state {state}, which is neither 0 nor 1")]
    State { head: u16, state: u8 },
    #[error("descriptor {head} has the counter {counter}, which is too large or there twice")]
    Counter { head: u16, counter: u64 },
    #[error("{in_flight} requests are in flight, but only {outstanding} are outstanding in the ring")]
    TooMany { in_flight: usize, outstanding: u16 },
    #[error("its used positions ({used:#x}, wrap counters {wraps:#x}) are not in a ring of {size}")]
    Positions { used: u32, wraps: u16, size: u16 },
    #[error("its list of free entries has entry {entry}, which is out of range or there twice")]
    Free { entry: u16 },
    #[error("the chain at entry {first} has entry {entry}, which is out of range, free, or in another chain")]
    Chain { first: u16, entry: u16 },
    #[error("the chain at entry {first} has {num} descriptors and its end elsewhere")]
    Length { first: u16, num: u16 },
    #[error("the chain at entry {first} has the buffer id {id}, which is out of range or there twice")]
    Id { first: u16, id: u16 },
    #[error("{descriptors} descriptors are in flight in a ring of {size}")]
    Descriptors { descriptors: usize, size: u16 },
    #[error("{lost} of its entries are neither free nor in flight")]
    Lost { lost: usize },
    #[error("it is empty, but the frontend's base has {descriptors} descriptors in flight")]
    Unrecorded { descriptors: u32 },
    #[error("{0}")]
    Ring(#[from] RingError),
}

/// Checks the fields with which the header of either kind of area begins, for an area of `entries` states.
pub(super) fn check_header(
    version: u16,
    features: u64,
    claimed: u16,
    entries: usize,
) -> Result<(), AreaError> {
    if version != VERSION {
        return Err(AreaError::Version { version });
    }
    if features != 0 {
        return Err(AreaError::Features { features });
    }
    if usize::from(claimed) != entries {
        return Err(AreaError::Count { claimed, entries });
    }
    Ok(())
}

/// Puts chains in the order in which they were taken, by their counters. Each must have its own.
pub(super) fn put_in_order(found: &mut [(u64, u16)]) -> Result<(), AreaError> {
    found.sort_unstable();
    let twice = found.windows(2).find(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1]);
    let large = found.last().copied().filter(|(counter, _)| *counter > COUNTER_MAX);
    match twice.or(large) {
        Some((counter, head)) => Err(AreaError::Counter { head, counter }),
        None => Ok(()),
    }
}
