//! The contents of all files of a world at one instant. Can start another world, become a real file, or be hashed.
//!
//! Copies share their pages. It has no locks, no queues and no time.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::Contents;
use strata_random::mix;

/// The files of a world and their bytes.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pub(crate) files: Vec<ImageFile>,
}

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct ImageFile {
    pub(crate) path: Arc<Path>,
    pub(crate) contents: Contents,
}

impl Image {
    /// The contents of a file, if there is one of this name.
    pub fn file(&self, path: &Path) -> Option<&Contents> {
        self.files.iter().find(|file| &*file.path == path).map(|file| &file.contents)
    }

    /// The files' paths, in the order in which they were made.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| &*file.path)
    }

    /// The same image with these bytes written to one file, which grows if they go past its end.
    ///
    /// # Panics
    /// If there is no such file.
    #[must_use]
    pub fn with(&self, path: &Path, offset: u64, bytes: &[u8]) -> Image {
        let mut image = self.clone();
        let file = image.files.iter_mut().find(|file| &*file.path == path);
        let contents = &mut file.unwrap_or_else(|| panic!("there is no {}", path.display())).contents;
        contents.write(offset, bytes);
        contents.grow(offset + bytes.len() as u64);
        image
    }

    /// A hash of all paths, lengths and bytes, the same in every run. Two images with the same hash are equal, except
    /// with probability 2^-64.
    pub fn hash(&self) -> u64 {
        self.files.iter().fold(0, |hash, file| {
            let path = file.path.as_os_str().as_encoded_bytes();
            let name = path.iter().fold(path.len() as u64, |name, byte| mix(name ^ u64::from(*byte)));
            mix(hash ^ mix(name).wrapping_add(file.contents.hash()))
        })
    }

    /// Writes a file of the image to a real file for other programs, created or truncated first. Pages of zeros stay
    /// holes.
    ///
    /// # Errors
    /// When the image has no such file, or the host fails.
    pub fn export(&self, path: &Path, real: &Path) -> io::Result<()> {
        let contents = self.file(path).ok_or(io::ErrorKind::NotFound)?;
        let file = File::create(real)?;
        file.set_len(contents.length())?;
        for (offset, bytes) in contents.data_pages() {
            file.write_all_at(bytes, offset)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: &[(&str, &[u8])]) -> Image {
        let file = |(path, bytes): &(&str, &[u8])| ImageFile {
            path: Path::new(path).into(),
            contents: Contents::from_bytes(bytes),
        };
        Image { files: files.iter().map(file).collect() }
    }

    #[test]
    fn the_hash_tells_names_and_bytes_apart() {
        let images = [
            image(&[]),
            image(&[("a", b"x")]),
            image(&[("b", b"x")]),
            image(&[("a", b"y")]),
            image(&[("a", b"x"), ("b", b"y")]),
            image(&[("a", b"y"), ("b", b"x")]),
        ];
        let hashes: std::collections::BTreeSet<u64> = images.iter().map(Image::hash).collect();
        assert_eq!(hashes.len(), images.len());
        assert_eq!(image(&[("a", b"x")]).hash(), images[1].hash());
    }

    #[test]
    fn a_changed_image_leaves_the_one_that_it_was_made_of() {
        let old = image(&[("a", b"0123"), ("b", b"x")]);
        let new = old.with(Path::new("a"), 2, b"abc");
        assert_eq!(new.hash(), image(&[("a", b"01abc"), ("b", b"x")]).hash());
        assert_eq!(old.hash(), image(&[("a", b"0123"), ("b", b"x")]).hash());
    }

    #[test]
    fn an_exported_file_has_the_same_bytes() {
        let mut bytes = vec![0; 30_000];
        bytes[9000..9100].fill(4);
        bytes[29_999] = 1;
        let image = image(&[("dir/a", &bytes)]);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let real = dir.path().join("a");
        std::fs::write(&real, vec![7; 50_000]).expect("an older file in the way");
        image.export(Path::new("dir/a"), &real).expect("an export");
        assert_eq!(std::fs::read(&real).expect("the file"), bytes);
        let missing = image.export(Path::new("b"), &real).expect_err("there is no b");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
