//! For tests: a worker that dies before any store that a test chooses, to the in-flight region or to a part of a ring.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

struct Died;

/// Called before every store: the moment of death if the count has run out.
pub(crate) fn step() {
    match LEFT.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Died)),
        Some(left) => LEFT.set(Some(left - 1)),
    }
}

/// Works until `stores` stores are done and dies before the next; `None` if it died.
pub(crate) fn after<T>(stores: u32, work: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(Some(stores));
    let result = catch_unwind(AssertUnwindSafe(work));
    LEFT.set(None);
    match result {
        Ok(value) => Some(value),
        Err(panic) if panic.is::<Died>() => None,
        Err(panic) => resume_unwind(panic),
    }
}
