//! Serving requests: the queue of a thread, the fast path, and the async functions of the slow path.
//!
//! Owns a request from its submission to its completion. There is a file for each kind of request, and one for each
//! thing that a request may wait for. Opens no file.

mod claim;
mod compressed;
mod detect;
pub(crate) mod failures;
mod fast;
mod flush;
pub(crate) mod journal;
pub(crate) mod policy;
mod prerequisites;
pub(crate) mod queue;
mod read;
pub(crate) mod request;
mod slow;
pub(crate) mod space;
pub(crate) mod work;
pub(crate) mod worker;
mod write;
mod zero;
pub(crate) mod zero_route;
