//! Writes cpio archives in the "newc" format that Linux accepts as an initramfs.
//!
//! Owns the byte layout (Linux Documentation/driver-api/early-userspace/buffer-format.rst). It never reads archives or
//! files: the caller passes contents as bytes.

use std::collections::BTreeSet;

/// An archive being written. Parent directories are added automatically.
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

/// File type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self { bytes: Vec::new(), inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a directory with mode 0755, and its parents.
    pub fn directory(&mut self, path: &str) {
        let path = relative(path);
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        self.parents(path);
        self.directories.insert(path.to_owned());
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let path = relative(path);
        self.parents(path);
        self.entry(path, REGULAR | mode, (0, 0), contents);
    }

    /// Adds a symbolic link at `path` to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let path = relative(path);
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node, which needs no privilege inside an archive.
    pub fn character_device(&mut self, path: &str, mode: u32, device: (u32, u32)) {
        let path = relative(path);
        self.parents(path);
        self.entry(path, CHARACTER | mode, device, &[]);
    }

    /// Ends the archive. Archives may be concatenated: Linux unpacks them one after the other.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.inode += 1;
        let length = u32::try_from(contents.len()).expect("files of the tiny guest are below 4 GiB");
        let name_length = u32::try_from(name.len() + 1).expect("path names are short");
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // Inode, mode, uid, gid, links, mtime, size, device that holds the file (2), device that it is (2), name size,
        // check.
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(contents);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

/// Names in an initramfs are relative to its root.
fn relative(path: &str) -> &str {
    path.trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_110_byte_header_a_padded_name_and_padded_contents() {
        let mut archive = Archive::new();
        archive.file("/ab", 0o644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000081A4"); // regular, 0644
        assert_eq!(&bytes[54..62], b"00000005"); // size
        assert_eq!(&bytes[94..102], b"00000003"); // name with its NUL
        assert_eq!(&bytes[110..113], b"ab\0");
        assert_eq!(&bytes[116..121], b"hello"); // 113 padded to 116
        assert_eq!(&bytes[124..130], b"070701"); // 121 padded to 124
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn parents_are_added_once_and_before_their_children() {
        let mut archive = Archive::new();
        archive.file("usr/bin/a", 0o755, b"");
        archive.file("usr/bin/b", 0o755, b"");
        let text = String::from_utf8_lossy(&archive.finish()).into_owned();
        let at = |name: &str| text.find(&format!("{name}\0")).expect("the name is there");
        assert!(at("usr") < at("usr/bin") && at("usr/bin") < at("usr/bin/a"));
        assert_eq!(text.matches("usr/bin\0").count(), 1);
    }
}
