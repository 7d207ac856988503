//! Opens a file by an untrusted name without side effects.
//!
//! Opening can have effects: it starts a watchdog's countdown, rewinds a tape, waits for a pipe's other end. So the
//! name is first resolved to a descriptor that does not open the file (O_PATH). Location and type are checked on that
//! descriptor, then the same file is opened through /proc/self/fd. No name is resolved twice.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::confine::Roots;
use super::probe::file_kind;
use crate::OpenOptions;
use crate::error::{Step, StorageError};

/// Opens a regular file or a block device, inside the allowed folders if there are any.
pub(super) fn open(path: &Path, options: &OpenOptions, roots: Option<&Roots>) -> Result<File, StorageError> {
    let failed =
        |step| move |errno: Errno| StorageError::File { step, path: path.into(), source: errno.into() };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let named = rustix::fs::open(path, flags, Mode::empty()).map_err(failed(Step::Open))?;
    if let Some(roots) = roots {
        roots.check(named.as_fd(), path)?;
    }
    let stat = rustix::fs::fstat(&named).map_err(failed(Step::Stat))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => {}
        other => return Err(StorageError::NotAnImage { path: path.into(), kind: file_kind(other) }),
    }
    let access = if options.writable { OFlags::RDWR } else { OFlags::RDONLY };
    // O_NONBLOCK: a drive without a medium does not wait for one. O_DIRECT comes later, when it is known whether the file
    // can do it.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = match rustix::fs::open(format!("/proc/self/fd/{}", named.as_raw_fd()), flags, Mode::empty())
    {
        Err(Errno::NOENT) => open_by_name(path, flags, &stat),
        other => other,
    };
    opened.map(File::from).map_err(failed(Step::Open))
}

/// Creates an empty file, which must not exist, in a folder inside the allowed ones.
pub(super) fn create(path: &Path, mode: Mode, roots: Option<&Roots>) -> Result<File, StorageError> {
    let failed =
        |step| move |errno: Errno| StorageError::File { step, path: path.into(), source: errno.into() };
    let (folder, name) = split(path).map_err(failed(Step::Create))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty()).map_err(failed(Step::Create))?;
    if let Some(roots) = roots {
        roots.check(folder.as_fd(), path)?;
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&folder, name, flags, mode).map_err(failed(Step::Create))?;
    Ok(File::from(made))
}

/// Makes the names in a file's folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), StorageError> {
    let failed =
        |errno: Errno| StorageError::File { step: Step::SyncFolder, path: path.into(), source: errno.into() };
    let (folder, _) = split(path).map_err(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty()).map_err(failed)?;
    rustix::fs::fsync(folder).map_err(failed)
}

/// The folder of a file, and its name there.
fn split(path: &Path) -> rustix::io::Result<(&Path, &OsStr)> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    Ok((folder.unwrap_or(Path::new(".")), name))
}

/// Without /proc: opens by the name again, which must still lead to the same file.
fn open_by_name(path: &Path, flags: OFlags, judged: &Stat) -> rustix::io::Result<OwnedFd> {
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let opened = rustix::fs::fstat(&file)?;
    let same = (opened.st_dev, opened.st_ino) == (judged.st_dev, judged.st_ino);
    if same { Ok(file) } else { Err(Errno::STALE) }
}

/// True if the process may read the file. Does not open it.
pub fn is_readable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::READ_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::FileKind;
    use rustix::fs::inotify;
    use std::time::Duration;

    /// Shows whether a file was opened since the watch was created.
    struct OpenWatch(OwnedFd);

    impl OpenWatch {
        fn new(path: &Path) -> Self {
            let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
            let events = inotify::init(flags).expect("an inotify");
            inotify::add_watch(&events, path, inotify::WatchFlags::OPEN).expect("a watch");
            OpenWatch(events)
        }

        fn was_opened(&self) -> bool {
            rustix::io::read(&self.0, &mut [0u8; 512]).is_ok()
        }
    }

    #[test]
    fn a_refused_file_is_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let (inside, outside) = (folder.path().join("inside"), folder.path().join("outside"));
        for folder in [&inside, &outside] {
            std::fs::create_dir(folder).expect("made");
            std::fs::write(folder.join("image"), [0; 512]).expect("written");
            let mode = Mode::RUSR | Mode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, folder.join("pipe"), FileType::Fifo, mode, 0)
                .expect("a pipe");
        }
        let roots = Roots::open(std::slice::from_ref(&inside)).expect("a folder");
        for writable in [false, true] {
            let options = OpenOptions { writable, direct: false, lock_timeout: Duration::ZERO };
            let open = |path: &Path, roots: Option<&Roots>| {
                let watch = OpenWatch::new(path);
                (open(path, &options, roots), watch.was_opened())
            };
            let (file, opened) = open(&inside.join("image"), Some(&roots));
            assert!(file.is_ok() && opened, "the watch sees an open");
            let (refused, opened) = open(&outside.join("image"), Some(&roots));
            assert!(matches!(refused, Err(StorageError::Outside { .. })) && !opened);
            let (refused, opened) = open(&outside.join("pipe"), Some(&roots));
            assert!(matches!(refused, Err(StorageError::Outside { .. })) && !opened);
            let (refused, opened) = open(&inside.join("pipe"), None);
            assert!(matches!(refused, Err(StorageError::NotAnImage { kind: FileKind::Fifo, .. })) && !opened);
        }
        assert!(is_readable(&inside.join("image")) && !is_readable(&inside.join("none")));
    }
}
