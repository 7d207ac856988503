//! Compressed clusters: a cache of inflated ones, and the threads that inflate.
//!
//! Knows no request and does no I/O: the caller brings a cluster's data. See `Worker::inflated` in
//! `serve/compressed.rs`.

mod cache;
mod decode;
mod pool;

pub(crate) use cache::{Cache, Found, Inflated};
pub use decode::InflateError;
pub(crate) use pool::{Compressed, Pool};
