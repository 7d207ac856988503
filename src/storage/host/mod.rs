//! The host's files: opening them safely, and the table in which every thread's queue finds them.
//!
//! `open` checks a file before it opens it. The flags are set on the one open description, which also carries the image
//! lock and does all the I/O. `probe` finds the alignment, `lock` other users, and `uring` or `threads` does the I/O.
//! Nothing is read here.

mod cached;
mod confine;
mod holder;
mod inline;
mod lock;
mod notify;
mod open;
mod pool;
mod probe;
mod queue;
mod ring;
mod slots;
mod threads;
mod uring;
mod watch;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use rustix::fs::Mode;
use tracing::warn;

use self::confine::Roots;
use self::lock::LockHow;
use self::pool::Pool;
use crate::error::{Step, StorageError};
use crate::{FileId, FileIdentity, FileInfo, OpenOptions, Storage};

pub use lock::Owner;
pub use open::is_readable;
pub use queue::HostQueue;
pub use threads::ThreadQueue;
pub use uring::UringQueue;

/// How operations on files that are not in memory reach the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring; threads where the host refuses it.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Threads that make plain system calls.
    Threads,
}

/// Image files of the host.
#[derive(Debug, Default)]
pub struct HostStorage {
    files: Arc<FileTable>,
    aio: Aio,
    pool: Arc<Pool>,
    /// The warning that io_uring is refused, logged once.
    warned: OnceLock<()>,
    /// `None`: files may lie anywhere.
    roots: Option<Roots>,
    locks: LockHow,
}

/// The open files by id. It only grows. Each queue copies the entries that it uses, so the lock (a leaf: no other is
/// taken under it) is never on the data path.
#[derive(Debug, Default)]
struct FileTable {
    files: RwLock<Vec<Arc<OpenFile>>>,
}

/// One open file. It stays open until the storage and every queue that used it are gone.
#[derive(Debug)]
struct OpenFile {
    file: File,
    info: FileInfo,
    /// Lies in memory (tmpfs). Calls run at once, because io_uring would hand them to a kernel worker thread, unless
    /// [`Operation::offload`](crate::Operation::offload) wants that.
    memory_backed: bool,
    /// Goes through the page cache, and does not lie in memory.
    buffered: bool,
    /// Set by any thread that finds FALLOC_FL_ZERO_RANGE unsupported. It only saves another attempt, so relaxed loads
    /// and stores are enough.
    no_zero_range: AtomicBool,
}

impl HostStorage {
    /// No file open yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Files are opened only inside these folders, as `confine` defines it. Without folders, anywhere.
    ///
    /// # Errors
    /// When a folder cannot be opened.
    pub fn confined(mut self, folders: &[PathBuf]) -> Result<Self, StorageError> {
        self.roots = if folders.is_empty() { None } else { Some(Roots::open(folders)?) };
        Ok(self)
    }

    /// Whether a file is used without an image lock when the file system has locks but their service (an NFS server)
    /// does not answer.
    pub fn unlocked_allowed(mut self, allowed: bool) -> Self {
        self.locks.unlocked_allowed = allowed;
        self
    }

    /// Every file is opened only when the I/O of this owner's earlier storages on it is over, also if it is shared with
    /// others. Only one storage of an owner is used at a time. Waits as for an image lock.
    pub fn owned_by(mut self, owner: Owner) -> Self {
        self.locks.owner = Some(owner);
        self
    }

    /// A wait for an image lock ends as if its time was over once `gives_up` says so, which is asked every few
    /// milliseconds.
    pub fn giving_up(mut self, gives_up: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.locks.gives_up = Some(Arc::new(gives_up));
        self
    }

    /// Chooses how operations reach the host.
    pub fn by(mut self, aio: Aio) -> Self {
        self.aio = aio;
        self
    }

    fn file(&self, id: FileId) -> Arc<OpenFile> {
        self.files.get(id)
    }

    fn open_file(
        &self,
        path: &Path,
        options: &OpenOptions,
        locked: bool,
    ) -> Result<(FileId, FileInfo), StorageError> {
        let file = open::open(path, options, self.roots.as_ref())?;
        self.admit(file, path, options, locked)
    }

    /// Locks a file that was opened, and adds it to the table.
    fn admit(
        &self,
        file: File,
        path: &Path,
        options: &OpenOptions,
        locked: bool,
    ) -> Result<(FileId, FileInfo), StorageError> {
        let mut probed = probe::probe(&file, path)?;
        self.files.refuse_second_writer(path, probed.identity, options.writable)?;
        probe::settle_flags(&file, path, options.direct, &mut probed)?;
        if locked {
            lock::lock_image(&file, path, options, &self.locks)?;
        }
        // Only now: before the lock was ours, its last holder could still change the length.
        let length = probe::length(&file, probed.block_device).map_err(|source| StorageError::File {
            step: Step::Stat,
            path: path.into(),
            source,
        })?;
        let info = FileInfo {
            path: path.into(),
            length,
            offset_alignment: probed.offset_alignment,
            memory_alignment: probed.memory_alignment,
            block_size: probed.block_size,
            block_device: probed.block_device,
            identity: probed.identity,
            writable: options.writable,
        };
        let open = OpenFile {
            file,
            info: info.clone(),
            memory_backed: probed.memory_backed,
            buffered: probed.buffered,
            no_zero_range: AtomicBool::new(false),
        };
        let id = self.files.add(open)?;
        Ok((id, info))
    }
}

impl Storage for HostStorage {
    type Queue = HostQueue;

    fn open(&self, path: &Path, options: &OpenOptions) -> Result<(FileId, FileInfo), StorageError> {
        self.open_file(path, options, true)
    }

    fn open_shared(&self, path: &Path, direct: bool) -> Result<(FileId, FileInfo), StorageError> {
        let options = OpenOptions { writable: false, direct, lock_timeout: Duration::ZERO };
        self.open_file(path, &options, false)
    }

    fn create(
        &self,
        path: &Path,
        like: FileId,
        options: &OpenOptions,
    ) -> Result<(FileId, FileInfo), StorageError> {
        let open = self.file(like);
        let stat = rustix::fs::fstat(&open.file).map_err(|errno| open.stat_error(errno.into()))?;
        // A block device may be open to its group for reasons of its own: only this user gets the new file then.
        let mode = if open.info.block_device { 0o600 } else { stat.st_mode & 0o666 };
        let file = open::create(path, Mode::from_raw_mode(mode), self.roots.as_ref())?;
        self.admit(file, path, options, true).inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })
    }

    fn sync_name(&self, path: &Path) -> Result<(), StorageError> {
        open::sync_folder(path)
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        std::fs::remove_file(path).map_err(|source| StorageError::File {
            step: Step::Remove,
            path: path.into(),
            source,
        })
    }

    fn share(&self, file: FileId) -> Result<(), StorageError> {
        let open = self.file(file);
        lock::share_image(&open.file).map_err(|source| StorageError::File {
            step: Step::Lock,
            path: open.info.path.clone(),
            source,
        })
    }

    fn queue(&self, depth: u32) -> Result<HostQueue, StorageError> {
        if self.aio != Aio::Threads {
            match UringQueue::new(Arc::clone(&self.files), depth) {
                Err(refused) if self.aio == Aio::Auto && refused.names_io_uring() => {
                    self.warned.get_or_init(|| warn!("{refused}. Threads do the I/O now, which is slower"));
                }
                other => return other.map(|queue| HostQueue::Uring(Box::new(queue))),
            }
        }
        let queue = ThreadQueue::new(Arc::clone(&self.files), Arc::clone(&self.pool), depth)?;
        Ok(HostQueue::Threads(Box::new(queue)))
    }

    fn length(&self, file: FileId) -> Result<u64, StorageError> {
        let open = self.file(file);
        probe::length(&open.file, open.info.block_device).map_err(|source| open.stat_error(source))
    }

    fn allocated(&self, file: FileId) -> Result<u64, StorageError> {
        let open = self.file(file);
        if open.info.block_device {
            return Ok(open.info.length);
        }
        probe::allocated(&open.file).map_err(|source| open.stat_error(source))
    }
}

/// A queue's own copy of the table entries that it has used.
struct SeenFiles {
    table: Arc<FileTable>,
    files: Vec<Option<Arc<OpenFile>>>,
}

impl SeenFiles {
    fn new(table: Arc<FileTable>) -> Self {
        SeenFiles { table, files: Vec::new() }
    }

    /// The file with this id, which the storage has opened.
    #[inline]
    fn get(&mut self, id: FileId) -> &Arc<OpenFile> {
        let index = usize::from(id.0);
        if self.files.get(index).is_none_or(Option::is_none) {
            self.look_up(id);
        }
        self.seen(id)
    }

    /// As `get`, for a file that was looked up before.
    fn seen(&self, id: FileId) -> &Arc<OpenFile> {
        self.files[usize::from(id.0)].as_ref().expect("a file is looked up when its operation is pushed")
    }

    #[cold]
    fn look_up(&mut self, id: FileId) {
        let index = usize::from(id.0);
        if self.files.len() <= index {
            self.files.resize(index + 1, None);
        }
        self.files[index] = Some(self.table.get(id));
    }
}

impl OpenFile {
    fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn stat_error(&self, source: std::io::Error) -> StorageError {
        StorageError::File { step: Step::Stat, path: self.info.path.clone(), source }
    }
}

impl Drop for OpenFile {
    /// No operation is in flight: every queue that used the file is gone. Closing alone would not release the lock at
    /// once: a child process that another thread is starting shares the description until its exec.
    fn drop(&mut self) {
        lock::unlock_image(&self.file);
    }
}

impl FileTable {
    fn add(&self, file: OpenFile) -> Result<FileId, StorageError> {
        let mut files = self.files.write().expect("no thread panics while it holds the file table");
        // Checked again under the lock: two threads may be opening the same file.
        refuse_second_writer(&files, &file.info.path, file.info.identity, file.info.writable)?;
        match u16::try_from(files.len()) {
            Ok(id) if id < u16::MAX => {
                files.push(Arc::new(file));
                Ok(FileId(id))
            }
            _ => Err(StorageError::TooManyFiles { path: file.info.path.clone() }),
        }
    }

    /// The file with this id.
    ///
    /// Panics when no such file was opened here: ids come only from `open`, so that is a programmer error.
    fn get(&self, id: FileId) -> Arc<OpenFile> {
        let files = self.files.read().expect("no thread panics while it holds the file table");
        Arc::clone(files.get(usize::from(id.0)).expect("a file id comes from this storage's open"))
    }

    fn refuse_second_writer(
        &self,
        path: &Path,
        identity: FileIdentity,
        writable: bool,
    ) -> Result<(), StorageError> {
        let files = self.files.read().expect("no thread panics while it holds the file table");
        refuse_second_writer(&files, path, identity, writable)
    }
}

/// Refuses a second description of a file if one of the two is for writing: they would wait for each other's image
/// lock. Two readers are fine.
fn refuse_second_writer(
    files: &[Arc<OpenFile>],
    path: &Path,
    identity: FileIdentity,
    writable: bool,
) -> Result<(), StorageError> {
    let same = |open: &&Arc<OpenFile>| open.info.identity == identity && (writable || open.info.writable);
    let Some(at) = files.iter().position(|open| same(&open)) else { return Ok(()) };
    Err(StorageError::AlreadyOpen {
        path: path.into(),
        other: files[at].info.path.clone(),
        file: FileId(u16::try_from(at).unwrap_or(u16::MAX)),
    })
}
