//! How a name is shown to people and passed to a shell. Names of files, snapshots, bitmaps and formats come from
//! images or from strangers. Unescaped, they could forge log lines, control a terminal, or run commands when pasted.
//!
//! Owns the two escapes, and nothing else: no I/O, no dependencies. Every message, log field and suggested command of
//! every crate takes its names from here; `tests/architecture` checks that.
#![forbid(unsafe_code)]

mod shell;

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display, Formatter, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub use shell::ShellCommand;

/// A name: text, bytes, or a path.
pub trait Name {
    /// The name's bytes, in any encoding.
    fn name_bytes(&self) -> &[u8];
}

impl Name for [u8] {
    fn name_bytes(&self) -> &[u8] {
        self
    }
}

impl Name for Vec<u8> {
    fn name_bytes(&self) -> &[u8] {
        self
    }
}

impl Name for str {
    fn name_bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl Name for String {
    fn name_bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl Name for OsStr {
    fn name_bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl Name for OsString {
    fn name_bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl Name for Path {
    fn name_bytes(&self) -> &[u8] {
        self.as_os_str().as_bytes()
    }
}

impl Name for PathBuf {
    fn name_bytes(&self) -> &[u8] {
        self.as_os_str().as_bytes()
    }
}

impl<N: Name + ?Sized> Name for &N {
    fn name_bytes(&self) -> &[u8] {
        (**self).name_bytes()
    }
}

impl<N: Name + ?Sized> Name for Box<N> {
    fn name_bytes(&self) -> &[u8] {
        (**self).name_bytes()
    }
}

impl<N: Name + ?Sized> Name for std::sync::Arc<N> {
    fn name_bytes(&self) -> &[u8] {
        (**self).name_bytes()
    }
}

/// A name as people see it, on one line. Escaped (`
/// `, `\u{1b}`) are characters that control a terminal, end a line or change the order of text. Bytes that are not
/// UTF-8 become `\xff`, and a backslash is doubled, so escapes never make two names look the same.
pub fn shown<N: Name + ?Sized>(name: &N) -> Shown<'_> {
    Shown { bytes: name.name_bytes(), double_backslash: true }
}

/// A text whose names are escaped already: escapes the characters left in it that must not reach a terminal or end a
/// line. For messages of other programs and libraries, which may contain names.
pub fn one_line(text: &str) -> Shown<'_> {
    Shown { bytes: text.as_bytes(), double_backslash: false }
}

/// See [`shown`] and [`one_line`].
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    bytes: &'a [u8],
    double_backslash: bool,
}

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for chunk in self.bytes.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '\\' if self.double_backslash => f.write_str("\\\\")?,
                    _ if must_be_escaped(character) => write!(f, "{}", character.escape_default())?,
                    _ => f.write_char(character)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// True for a character that must not reach a terminal or a log. These are controls, line ends, invisible
/// characters, and those that change the order of the text around them.
pub fn must_be_escaped(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests;
