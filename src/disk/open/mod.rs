//! Opening and closing: from the name of an image to a chain of open files, and the last writes to them.
//!
//! Owns which files a chain consists of, what is refused, what an open writes to the top image, and a clean close.
//! Serves no request.

pub(crate) mod backing;
pub(crate) mod bitmaps;
pub(crate) mod chain;
pub(crate) mod close;
mod cut_short;
pub(crate) mod data_file;
pub(crate) mod describe;
pub(crate) mod file_end;
pub(crate) mod foreign;
pub(crate) mod header;
pub(crate) mod overlay;
mod raw;
