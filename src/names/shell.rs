//! Commands to paste into a POSIX shell: the shell passes the program exactly the given name, whatever bytes it
//! holds.

use std::fmt::{self, Display, Formatter};

use crate::{Name, must_be_escaped};

/// A command that is suggested to people. Its displayed form is printable text on one line.
#[derive(Clone, Debug, Default)]
pub struct ShellCommand {
    /// In shell syntax, possibly with characters that cannot be shown.
    line: Vec<u8>,
}

impl ShellCommand {
    /// A command that begins with these fixed words, such as `qemu-img rebase -u`. They are not quoted: they may hold
    /// options, and placeholders such as `FILE`.
    pub fn new(words: &'static str) -> Self {
        ShellCommand { line: words.as_bytes().to_vec() }
    }

    /// Appends fixed words, unquoted.
    #[must_use]
    pub fn words(mut self, words: &'static str) -> Self {
        self.line.push(b' ');
        self.line.extend_from_slice(words.as_bytes());
        self
    }

    /// Appends a name that is not a path, as one word.
    #[must_use]
    pub fn name<N: Name + ?Sized>(self, name: &N) -> Self {
        self.word(&[name.name_bytes()])
    }

    /// Appends the path of a file, as one word. A relative path that could be mistaken for an option gets `./` in
    /// front.
    #[must_use]
    pub fn path<N: Name + ?Sized>(self, path: &N) -> Self {
        self.path_and(path, "")
    }

    /// As [`ShellCommand::path`], with a fixed ending.
    #[must_use]
    pub fn path_and<N: Name + ?Sized>(self, path: &N, ending: &'static str) -> Self {
        let bytes = path.name_bytes();
        let lead: &[u8] = if bytes.starts_with(b"-") { b"./" } else { b"" };
        self.word(&[lead, bytes, ending.as_bytes()])
    }

    /// Appends one word: a name between fixed text, such as an option and a placeholder.
    #[must_use]
    pub fn joined<N: Name + ?Sized>(self, before: &'static str, name: &N, after: &'static str) -> Self {
        self.word(&[before.as_bytes(), name.name_bytes(), after.as_bytes()])
    }

    fn word(mut self, parts: &[&[u8]]) -> Self {
        self.line.push(b' ');
        let word = parts.concat();
        if !word.is_empty() && word.iter().all(is_plain) {
            self.line.extend_from_slice(&word);
            return self;
        }
        self.line.push(b'\'');
        for byte in word {
            match byte {
                b'\'' => self.line.extend_from_slice(b"'\\''"),
                _ => self.line.push(byte),
            }
        }
        self.line.push(b'\'');
        self
    }
}

/// A byte that no shell treats specially, anywhere in a word.
fn is_plain(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/._-+,:@%=".contains(byte)
}

impl Display for ShellCommand {
    /// The command itself if all of it can be shown. Otherwise `eval "$(printf '…')"` with octal escapes for the
    /// rest: no other POSIX quoting can express such bytes.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Ok(line) = str::from_utf8(&self.line)
            && !line.chars().any(must_be_escaped)
        {
            return f.write_str(line);
        }
        f.write_str("eval \"$(printf '")?;
        for chunk in self.line.utf8_chunks() {
            for character in chunk.valid().chars() {
                match character {
                    '%' => f.write_str("%%")?,
                    '\\' => f.write_str("\\\\")?,
                    '\'' => octal(f, b'\'')?,
                    _ if must_be_escaped(character) => {
                        character.encode_utf8(&mut [0; 4]).bytes().try_for_each(|byte| octal(f, byte))?;
                    }
                    _ => write!(f, "{character}")?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| octal(f, *byte))?;
        }
        f.write_str("')\"")
    }
}

fn octal(f: &mut Formatter<'_>, byte: u8) -> fmt::Result {
    write!(f, "\\{byte:03o}")
}
