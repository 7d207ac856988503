//! One image that is not in use: checks and repairs, internal snapshots, resizes.
//!
//! Owns the I/O of these on an image file by itself, which an open uses too. The engine decides what is wrong, what to
//! write, and in which order.

pub mod change;
pub mod check;
pub(crate) mod file_steps;
pub(crate) mod image_file;
pub mod resize;
pub mod snapshot;
