//! Printing to the standard output.

use std::io::{self, Write as _};

pub use control::text::{json, json_name};

/// Prints to the standard output. A reader that has closed the pipe, as `head` does, is no error.
///
/// # Errors
/// When the text cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}
