//! The host's files: opening them safely, and the table that every thread's queue looks them up in.
//!
//! A file is judged before it is opened (`open`). Its flags are settled on the one open description, which also carries
//! the image lock and does all the I/O. Nothing is read here. What alignment a file has is found in `probe`, who else
//! uses it in `lock`, and I/O happens in `uring`.

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

use tracing::warn;

use self::confine::Roots;
use self::pool::Pool;
use crate::error::{Step, StorageError};
use crate::{FileId, FileInfo, OpenOptions, Storage};

pub use open::is_readable;
pub use queue::HostQueue;
pub use threads::ThreadQueue;
pub use uring::UringQueue;

/// How calls on files that are not in memory reach the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring, and where the host refuses that, by threads.
    #[default]
    Auto,
    /// By io_uring or not at all.
    IoUring,
    /// By threads that make plain system calls.
    Threads,
}

/// Image files of the host.
#[derive(Debug, Default)]
pub struct HostStorage {
    files: Arc<FileTable>,
    aio: Aio,
    pool: Arc<Pool>,
    /// Told once that io_uring is refused.
    told: OnceLock<()>,
    /// None: files may be anywhere.
    roots: Option<Roots>,
    /// Files are used without a lock where the lock service does not answer.
    unlocked_allowed: bool,
}

/// The open files by id. It only grows; queues keep their own copy of what they have seen, so that the lock (a leaf:
/// nothing else is taken under it) is never on the data path.
#[derive(Debug, Default)]
struct FileTable {
    files: RwLock<Vec<Arc<OpenFile>>>,
}

/// One open file. It stays open until the storage and every queue that used it are gone.
#[derive(Debug)]
struct OpenFile {
    file: File,
    info: FileInfo,
    /// Lives in memory (tmpfs): calls on it are done at once, as io_uring would hand them to a kernel thread, unless that is
    /// what is wanted ([`Operation::offload`](crate::Operation::offload)).
    memory_backed: bool,
    /// Goes through the page cache, and is not in memory as a whole.
    buffered: bool,
    /// Set by whichever thread learns that FALLOC_FL_ZERO_RANGE is not supported; it only saves asking again, so
    /// relaxed loads and stores do.
    no_zero_range: AtomicBool,
}

impl HostStorage {
    /// No file open yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Files are taken only out of these folders and what is below them; see `confine` for what that means. No folders:
    /// from anywhere.
    ///
    /// # Errors
    /// When a folder cannot be opened.
    pub fn confined(mut self, folders: &[PathBuf]) -> Result<Self, StorageError> {
        self.roots = if folders.is_empty() { None } else { Some(Roots::open(folders)?) };
        Ok(self)
    }

    /// Whether a file is used without an image lock where the file system has locks and whoever keeps them (the server of
    /// an NFS) does not answer.
    pub fn unlocked_allowed(mut self, allowed: bool) -> Self {
        self.unlocked_allowed = allowed;
        self
    }

    /// Calls reach the host by this way.
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
        let mut probed = probe::probe(&file, path)?;
        self.files.refuse_second_writer(path, probed.identity, options.writable)?;
        probe::settle_flags(&file, path, options.direct, &mut probed)?;
        if locked {
            lock::lock_image(&file, path, options, self.unlocked_allowed)?;
        }
        // Only now: before the lock was held, its last holder might still have been changing it.
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

    fn queue(&self, depth: u32) -> Result<HostQueue, StorageError> {
        if self.aio != Aio::Threads {
            match UringQueue::new(Arc::clone(&self.files), depth) {
                Err(refused) if self.aio == Aio::Auto && refused.names_io_uring() => {
                    self.told.get_or_init(|| warn!("{refused}. Threads do the I/O now, which is slower"));
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
        let stat = rustix::fs::fstat(&open.file).map_err(|errno| open.stat_error(errno.into()))?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
    }
}

/// A queue's own copy of what it has seen of the table.
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

    /// The same for one that was looked up before.
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
    /// Nothing of ours is in flight any more, as every queue that used the file is gone. Closing alone would not end
    /// the lock at once: a child that another thread is just starting shares the description until its exec.
    fn drop(&mut self) {
        lock::unlock_image(&self.file);
    }
}

impl FileTable {
    fn add(&self, file: OpenFile) -> Result<FileId, StorageError> {
        let mut files = self.files.write().expect("no thread panics while it holds the file table");
        // Asked again under the lock: two threads may be opening the same file.
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
    /// Panics when no such file was opened here: ids come from `open` only, so that is an error of the program.
    fn get(&self, id: FileId) -> Arc<OpenFile> {
        let files = self.files.read().expect("no thread panics while it holds the file table");
        Arc::clone(files.get(usize::from(id.0)).expect("a file id comes from this storage's open"))
    }

    fn refuse_second_writer(
        &self,
        path: &Path,
        identity: (u64, u64),
        writable: bool,
    ) -> Result<(), StorageError> {
        let files = self.files.read().expect("no thread panics while it holds the file table");
        refuse_second_writer(&files, path, identity, writable)
    }
}

/// Two descriptions of one file in one chain would wait for each other's image lock; say at once what is wrong. Two
/// readers are fine.
fn refuse_second_writer(
    files: &[Arc<OpenFile>],
    path: &Path,
    identity: (u64, u64),
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
