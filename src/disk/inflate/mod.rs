//! Compressed clusters: what has been inflated lately, and the threads that inflate.
//!
//! Knows no request and does no I/O: whoever wants a cluster brings its bytes. See `Worker::inflated` in compressed.rs.

mod cache;
mod decode;
mod pool;

pub(crate) use cache::{Cache, Found, Inflated};
pub use decode::InflateError;
pub(crate) use pool::{Compressed, Pool};
