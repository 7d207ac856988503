//! When a freed cluster may be used again, and what the search for leaks may believe.

use crate::mutation::{Mutation, unless_broken};

/// True if no I/O can reach a cluster any more. `has_ended`: all I/O that began before its unlink has ended.
pub fn is_out_of_reach(has_ended: bool) -> bool {
    unless_broken(has_ended, [(Mutation::ReuseWhileInUse, true)])
}

/// True if a cluster with this refcount is free.
pub fn is_free(refcount: u64) -> bool {
    unless_broken(refcount == 0, [(Mutation::SharedTakenForFree, true)])
}

/// What the search for leaks sees of a table slice, given its bytes in memory: these, as the file may be older.
pub fn seen_by_leak_search(in_memory: Option<&[u8]>) -> Option<&[u8]> {
    unless_broken(in_memory, [(Mutation::LeakSearchReadsTheDisk, None)])
}
