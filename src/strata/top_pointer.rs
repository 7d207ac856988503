//! The pointer to the present top: a small file beside the image that the command line names. A snapshot of a disk in use
//! makes an overlay the top; the next daemon, which is started with the same command line, must not write to the old one.
//!
//! Owns the file's name, its form, and the order in which it becomes durable (docs/durability.md, "A snapshot of a disk in
//! use"). It opens no image for writing.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use disk::check::Sharing;
use disk::{DiskOptions, Format, NotNamed};
use names::shown;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use storage::StorageError;
use storage::error::Step;
use storage::host::HostStorage;
use tracing::info;

/// What the name of the image has in addition.
const SUFFIX: &str = ".strata-top";
/// What the name of the pointer has in addition while it is written.
const NEW: &str = ".new";
/// The longest pointer in bytes.
const LENGTH_MAX: u64 = 8 << 10;

/// What the pointer says.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Pointer {
    /// The top image: an absolute path.
    top: PathBuf,
}

/// What an image with a pointer means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TopPointer {
    /// The disk whose top the pointer names
    #[default]
    Follow,
    /// The image itself: what was written since the snapshot is not seen
    Ignore,
    /// It is not served
    Refuse,
}

fn beside(image: &Path, suffixes: &[&str]) -> PathBuf {
    let mut name = OsString::from(image);
    suffixes.iter().for_each(|suffix| name.push(suffix));
    name.into()
}

/// The path of an image's pointer.
pub fn pointer_of(image: &Path) -> PathBuf {
    beside(image, &[SUFFIX])
}

/// True if a file of this name could be an image's pointer.
pub fn is_taken(image: &Path, file: &Path) -> bool {
    [pointer_of(image), beside(image, &[SUFFIX, NEW])].iter().any(|own| own.file_name() == file.file_name())
}

fn failed(path: PathBuf, source: io::Error) -> StorageError {
    StorageError::File { step: Step::Open, path, source }
}

/// The top image that the pointer beside this image names; `None` without a pointer.
///
/// # Errors
/// If there is a pointer that cannot be read, or makes no sense.
pub fn read(image: &Path) -> Result<Option<PathBuf>, StorageError> {
    let path = pointer_of(image);
    let wrong = |text: String| failed(path.clone(), io::Error::new(io::ErrorKind::InvalidData, text));
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| failed(path.clone(), error))?,
    };
    let metadata = file.metadata().map_err(|error| failed(path.clone(), error))?;
    if !metadata.is_file() || metadata.len() > LENGTH_MAX {
        return Err(wrong("it is no pointer to a top image".to_owned()));
    }
    let mut text = Vec::new();
    file.take(LENGTH_MAX).read_to_end(&mut text).map_err(|error| failed(path.clone(), error))?;
    let pointer: Pointer = serde_json::from_slice(&text).map_err(|error| {
        wrong(format!("it is no pointer to a top image: {}", names::one_line(&error.to_string())))
    })?;
    if !pointer.top.is_absolute() {
        return Err(wrong("the top image that it names has no absolute path".to_owned()));
    }
    Ok(Some(pointer.top))
}

/// The image to open, and how, for a disk that the command line names by `image`.
///
/// # Errors
/// If the pointer is to be refused or makes no sense, or the chain of the top that it names does not contain the image.
pub fn follow(
    image: &Path,
    choice: TopPointer,
    how: &DiskOptions,
    looking: &HostStorage,
) -> Result<(PathBuf, DiskOptions), StorageError> {
    let own = || (image.to_owned(), how.clone());
    // A snapshot of the image itself is wanted.
    if choice == TopPointer::Ignore || how.snapshot.is_some() {
        return Ok(own());
    }
    let Some(top) = read(image)? else { return Ok(own()) };
    let wrong = |text: String| failed(pointer_of(image), io::Error::new(io::ErrorKind::InvalidData, text));
    if choice == TopPointer::Refuse {
        return Err(wrong(format!("it names {} as the top image", shown(&top))));
    }
    let how = DiskOptions { format: Format::Qcow2, ..how.clone() };
    let layers = disk::describe(looking, &top, &how, Sharing::All, true)
        .map_err(|error| wrong(format!("the chain of the top image that it names: {error}")))?;
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    let own = identity(image);
    if own.is_none() || !layers.iter().any(|layer| identity(&layer.layer.path) == own) {
        return Err(wrong(format!("the chain of {} does not contain this image", shown(&top))));
    }
    info!("{}: the top of its chain is {} since a snapshot", shown(image), shown(&top));
    Ok((top, how))
}

/// Makes the next open of `image` find `top`: durable when this returns.
///
/// # Errors
/// If the host refuses.
pub fn store(image: &Path, top: &Path) -> Result<(), NotNamed> {
    let (new, path) = (beside(image, &[SUFFIX, NEW]), pointer_of(image));
    let written = write(&new, top).and_then(|()| std::fs::rename(&new, &path));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&new);
        NotNamed { source, undone: true }
    })?;
    // From here on it is unknown which pointer a crash leaves.
    sync_folder(&path).map_err(|source| NotNamed { source, undone: false })
}

fn write(path: &Path, top: &Path) -> io::Result<()> {
    // One that a killed daemon left.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let text = serde_json::to_vec(&Pointer { top: top.to_owned() }).map_err(io::Error::other)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    file.write_all(&text)?;
    file.sync_all()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_read_as_it_was_stored() {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("a");
        assert_eq!(read(&image).expect("none"), None);
        for top in ["/x/b", "/x/\u{fc} \"c\""] {
            store(&image, Path::new(top)).expect("stored");
            assert_eq!(read(&image).expect("one"), Some(top.into()));
        }
        let names: Vec<_> = std::fs::read_dir(folder.path()).expect("listed").collect();
        assert_eq!(names.len(), 1, "nothing else is left: {names:?}");
    }

    #[test]
    fn what_is_no_pointer_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("a");
        let long = format!("{{\"top\":\"/{}\"}}", "x".repeat(LENGTH_MAX as usize));
        for wrong in ["", "{}", "{\"top\":\"b\"}", "{\"top\":\"/b\",\"x\":1}", "{\"top\":7}", "\0", &long] {
            std::fs::write(pointer_of(&image), wrong).expect("written");
            let error = read(&image).expect_err(wrong).to_string();
            assert!(error.contains("a.strata-top"), "{error}");
        }
        std::fs::remove_file(pointer_of(&image)).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", pointer_of(&image)).expect("a link");
        read(&image).expect_err("a link");
        std::fs::remove_file(pointer_of(&image)).expect("removed");
        std::fs::create_dir(pointer_of(&image)).expect("made");
        read(&image).expect_err("a folder");
    }
}
