//! The socket file: its creation and removal.
//!
//! Several daemons may be started on one path at the same time. Each holds a lock (flock) on the folder while it
//! checks the file, removes a stale one or creates one. So none removes a file that another has just created. A
//! file is stale only if no socket at all belongs to it. A socket that is bound but does not listen yet is in use.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::{debug, info};

use crate::error::SessionError;

/// The longest wait for the lock of the folder. Holders keep it only for a moment.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// A listening socket, and its file if this process created it.
#[derive(Debug)]
pub struct Listening {
    /// Dropped first: while the listener is open, no other daemon treats the file as stale.
    file: Option<SocketFile>,
    pub(crate) listener: UnixListener,
}

/// A socket file that this process created, and removes if it is still the same file.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: Identity,
}

/// Tells files apart, whatever their names.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Self {
        Identity { device: metadata.dev(), inode: metadata.ino() }
    }
}

impl Listening {
    /// Listens on a new socket file. A stale one is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, SessionError> {
        let failed = |step, source| SessionError::Socket { path: path.to_owned(), step, source };
        let _lock = lock_folder(path, LOCK_TIMEOUT).map_err(|error| failed("lock its folder", error))?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SessionError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => {
                if is_in_use(path).map_err(|error| failed("look who listens", error))? {
                    return Err(SessionError::SocketInUse { path: path.to_owned() });
                }
                info!("replacing the stale socket {}", names::shown(path));
                fs::remove_file(path).map_err(|error| failed("remove the stale file", error))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("stat it", error)),
        }
        let listener = UnixListener::bind(path).map_err(|error| failed("bind it", error))?;
        let file = SocketFile::at(path).map_err(|error| failed("stat it", error))?;
        let listening = Listening { file: Some(file), listener };
        listening.listener.set_nonblocking(true).map_err(|error| failed("set it up", error))?;
        Ok(listening)
    }

    /// The socket, in non-blocking mode.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// A socket that another process created.
    pub(crate) fn inherited(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Listening { file: None, listener })
    }

    /// A socket that the process before this one has handed over. Its file is this process's from now on.
    pub fn taken_over(listener: UnixListener, path: &Path) -> io::Result<Self> {
        let file = SocketFile::at(path)?;
        listener.set_nonblocking(true)?;
        Ok(Listening { file: Some(file), listener })
    }

    /// Closes the listener and leaves its file: it belongs to another process now.
    pub fn leave(mut self) {
        self.file.take().into_iter().for_each(std::mem::forget);
    }
}

impl SocketFile {
    /// The file that is there now.
    fn at(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), identity: Identity::of(&metadata) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Also without the lock: a holder keeps it only for a moment, and does not remove a socket that is in use.
        let _lock = lock_folder(&self.path, Duration::ZERO);
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|metadata| Identity::of(&metadata) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Locks the folder of a socket; `None` where that is impossible (an unreadable folder, a file system without locks).
fn lock_folder(path: &Path, timeout: Duration) -> io::Result<Option<OwnedFd>> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(folder, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(error) => {
            debug!(%error, "the socket's folder cannot be locked");
            return Ok(None);
        }
    };
    let deadline = Instant::now() + timeout;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(folder)),
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::AGAIN) => return Err(Errno::AGAIN.into()),
            Err(Errno::INTR) => {}
            Err(error) => {
                debug!(%error, "the socket's folder cannot be locked");
                return Ok(None);
            }
        }
    }
}

/// True if a socket is bound to the file. The check connects with a socket of another type, which is refused either
/// way. So a daemon that listens there sees no frontend come and go.
fn is_in_use(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_does_not_listen_yet_is_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket");
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("an address")).expect("bound");
        assert!(matches!(Listening::bind(&path), Err(SessionError::SocketInUse { .. })));
        drop(socket);
        drop(Listening::bind(&path).expect("it is stale now"));
        assert!(!path.exists());
    }

    #[test]
    fn one_of_several_daemons_on_one_path_listens() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        for _ in 0..50 {
            // Each iteration finds a stale file.
            drop(UnixListener::bind(&path).expect("bound"));
            let bound = std::thread::scope(|scope| {
                let start = || Listening::bind(&path);
                let starting: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
                let ended = starting.into_iter().map(|thread| thread.join().expect("no panic"));
                ended.filter_map(Result::ok).collect::<Vec<_>>()
            });
            assert_eq!(bound.len(), 1);
            std::os::unix::net::UnixStream::connect(&path).expect("somebody listens there");
            drop(bound);
            assert!(!path.exists());
        }
    }
}
