//! Confines files to allowed folders.
//!
//! The check uses a descriptor, not the name. The kernel reports the path of that file (/proc/self/fd) with all
//! symlinks resolved, and the descriptor cannot change to another file. It does not open the file yet (O_PATH). A
//! symlink out of a folder does not widen it, and one into it does no harm. A hard link inside a folder counts as
//! inside, and so does a bind mount, which needs the privilege to mount.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::error::{Step, StorageError};

/// The allowed folders, opened at the start: a folder that takes over a name later does not count.
#[derive(Debug)]
pub(super) struct Roots {
    folders: Vec<OwnedFd>,
}

impl Roots {
    /// Opens the folders.
    pub fn open(folders: &[PathBuf]) -> Result<Self, StorageError> {
        let open = |folder: &PathBuf| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(folder, flags, Mode::empty()).map_err(|errno| StorageError::File {
                step: Step::Open,
                path: folder.clone(),
                source: errno.into(),
            })
        };
        Ok(Roots { folders: folders.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// Refuses a file, found as `path`, that lies in none of the folders.
    pub fn check(&self, file: BorrowedFd<'_>, path: &Path) -> Result<(), StorageError> {
        let unknown = |source| StorageError::File { step: Step::FindPlace, path: path.into(), source };
        let place = place_of(file).map_err(unknown)?;
        for folder in &self.folders {
            // By whole components: /images2 is not in /images.
            if place.starts_with(place_of(folder.as_fd()).map_err(unknown)?) {
                return Ok(());
            }
        }
        Err(StorageError::Outside { path: path.into(), place })
    }
}

/// The path of an open file. The kernel marks a removed file in its path, but a file name can imitate the mark. So
/// the path must lead to the same file.
fn place_of(file: BorrowedFd<'_>) -> io::Result<PathBuf> {
    let place = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let (named, open) = (rustix::fs::stat(&place)?, rustix::fs::fstat(file)?);
    if (named.st_dev, named.st_ino) != (open.st_dev, open.st_ino) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it was moved or removed"));
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;

    struct Bench {
        folder: tempfile::TempDir,
    }

    impl Bench {
        /// A folder with the roots `one` and `two` and the folder `one-more`, each with a file `f`.
        fn new() -> Self {
            let bench = Bench { folder: tempfile::tempdir().expect("a folder") };
            for name in ["one", "two", "one-more"] {
                std::fs::create_dir(bench.path(name)).expect("made");
                std::fs::write(bench.path(name).join("f"), name).expect("written");
            }
            bench
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn roots(&self) -> Roots {
            Roots::open(&[self.path("one"), self.path("two")]).expect("two folders")
        }

        fn is_taken(&self, roots: &Roots, name: &str) -> bool {
            let path = self.path(name);
            let taken = roots.check(File::open(&path).expect(name).as_fd(), &path);
            match &taken {
                Ok(()) => {}
                Err(StorageError::Outside { path: asked, .. }) => assert_eq!(*asked, path),
                Err(error) => panic!("{error}"),
            }
            taken.is_ok()
        }
    }

    #[test]
    fn names_with_dots_and_links_are_checked_by_their_target() {
        let bench = Bench::new();
        symlink(bench.path("one-more/f"), bench.path("one/out")).expect("a link");
        symlink("../two/f", bench.path("one/across")).expect("a link");
        symlink(bench.path("one"), bench.path("alias")).expect("a link");
        std::fs::hard_link(bench.path("one-more/f"), bench.path("two/hard")).expect("a link");
        let roots = bench.roots();
        for taken in ["one/f", "two/f", "two/../one/f", "one/across", "alias/f", "two/hard"] {
            assert!(bench.is_taken(&roots, taken), "{taken}");
        }
        for refused in ["one-more/f", "one/../one-more/f", "one/out"] {
            assert!(!bench.is_taken(&roots, refused), "{refused}");
        }
        let by_alias = Roots::open(&[bench.path("alias")]).expect("a folder");
        assert!(bench.is_taken(&by_alias, "one/f") && !bench.is_taken(&by_alias, "two/f"));
    }

    #[test]
    fn the_open_file_is_checked_not_its_name() {
        let bench = Bench::new();
        let roots = bench.roots();
        // Opened through a link that is then pointed elsewhere.
        symlink(bench.path("one-more/f"), bench.path("one/link")).expect("a link");
        let file = File::open(bench.path("one/link")).expect("opened");
        std::fs::remove_file(bench.path("one/link")).expect("removed");
        symlink(bench.path("one/f"), bench.path("one/link")).expect("a link");
        let error = roots.check(file.as_fd(), &bench.path("one/link")).expect_err("it was outside");
        assert!(error.to_string().contains("one-more/f"), "{error}");
        // A root that is replaced by another folder of the same name.
        std::fs::rename(bench.path("one"), bench.path("moved")).expect("renamed");
        std::fs::rename(bench.path("one-more"), bench.path("one")).expect("renamed");
        assert!(!bench.is_taken(&roots, "one/f") && bench.is_taken(&roots, "moved/f"));
    }

    #[test]
    fn a_removed_file_is_refused() {
        let bench = Bench::new();
        let path = bench.path("one/f");
        let file = File::open(&path).expect("opened");
        std::fs::remove_file(&path).expect("removed");
        // As the kernel names the removed one.
        std::fs::write(bench.path("one/f (deleted)"), "another").expect("written");
        let error = bench.roots().check(file.as_fd(), &path).expect_err("it is nowhere");
        assert!(error.to_string().contains("moved or removed"), "{error}");
        let missing = Roots::open(&[bench.path("none")]).expect_err("no such folder");
        assert!(missing.to_string().contains("none"), "{missing}");
        Roots::open(&[bench.path("two/f")]).expect_err("no folder");
    }
}
