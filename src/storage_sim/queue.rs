//! The simulated storage and its queues: the traits, the locks and the alignment checks.
//!
//! The memory of operations stays here, on the thread that pushed them. The world gets copies of written bytes and
//! returns copies of read bytes, which are stored in that memory only when the completion is reaped.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::fault::Verb;
use crate::world::{Asked, Holder, Rest, World};
use crate::{SimOptions, SimWorld};
use storage::error::{LockConflict, Permission, Step};
use storage::{
    Completion, Errno, FileId, FileIdentity, FileInfo, IoQueue, Kind, Notifier, OpenOptions, Operation, Part,
    Parts, Storage, StorageError, Token,
};

/// The byte that fills the memory of a failed read.
const GARBAGE: u8 = 0xe1;

/// The open files of one simulated process. Its image locks last until it and all of its queues are gone.
#[derive(Clone)]
pub struct SimStorage {
    open: Arc<OpenFiles>,
}

struct OpenFiles {
    world: SimWorld,
    /// Distinguishes this storage's locks from others'.
    number: u64,
    /// By file id. Taken after the world's lock or alone.
    files: RwLock<Vec<OpenFile>>,
}

#[derive(Clone)]
struct OpenFile {
    /// Index into the world's files.
    file: usize,
    info: FileInfo,
}

impl SimStorage {
    pub(crate) fn new(world: SimWorld) -> Self {
        let number = {
            let mut state = world.lock();
            state.storages += 1;
            state.storages
        };
        SimStorage { open: Arc::new(OpenFiles { world, number, files: RwLock::default() }) }
    }

    /// The world that it is part of.
    pub fn world(&self) -> &SimWorld {
        &self.open.world
    }

    fn open_file(
        &self,
        path: &Path,
        writable: bool,
        locked: bool,
    ) -> Result<(FileId, FileInfo), StorageError> {
        let mut world = self.open.world.lock();
        let mut files = self.open.files.write().expect("no panic under this lock");
        let Some(file) = world.files.iter().position(|file| &*file.path == path) else {
            let source = std::io::Error::from_raw_os_error(libc::ENOENT);
            return Err(StorageError::File { step: Step::Open, path: path.into(), source });
        };
        let own = files.iter().position(|open| open.file == file && (writable || open.info.writable));
        if let Some(own) = own {
            let other = files[own].info.path.clone();
            return Err(StorageError::AlreadyOpen { path: path.into(), other, file: FileId(own as u16) });
        }
        if locked {
            check_lock(&world, file, path, writable)?;
        }
        let id = match u16::try_from(files.len()) {
            Ok(id) if id < u16::MAX => FileId(id),
            _ => return Err(StorageError::TooManyFiles { path: path.into() }),
        };
        let info = FileInfo {
            path: path.into(),
            length: world.files[file].contents.length(),
            offset_alignment: world.options.offset_alignment,
            memory_alignment: world.options.memory_alignment,
            block_size: 512,
            block_device: false,
            identity: FileIdentity { device: 1, number: file as u64 + 1 },
            writable,
        };
        if locked {
            world.files[file].holders.push(Holder { storage: self.open.number, writable });
        }
        files.push(OpenFile { file, info: info.clone() });
        Ok((id, info))
    }
}

impl OpenFiles {
    fn get(&self, file: FileId) -> OpenFile {
        let files = self.files.read().expect("no panic under this lock");
        files.get(usize::from(file.0)).expect("a file id comes from this storage's open").clone()
    }
}

impl Drop for OpenFiles {
    fn drop(&mut self) {
        let mut world = self.world.lock();
        for file in &mut world.files {
            file.holders.retain(|holder| holder.storage != self.number);
        }
    }
}

impl Storage for SimStorage {
    type Queue = SimQueue;

    fn open(&self, path: &Path, options: &OpenOptions) -> Result<(FileId, FileInfo), StorageError> {
        self.open_file(path, options.writable, true)
    }

    fn open_shared(&self, path: &Path, _direct: bool) -> Result<(FileId, FileInfo), StorageError> {
        self.open_file(path, false, false)
    }

    fn create(
        &self,
        path: &Path,
        _like: FileId,
        options: &OpenOptions,
    ) -> Result<(FileId, FileInfo), StorageError> {
        {
            let mut world = self.open.world.lock();
            if world.files.iter().any(|file| &*file.path == path) {
                let source = std::io::Error::from_raw_os_error(libc::EEXIST);
                return Err(StorageError::File { step: Step::Create, path: path.into(), source });
            }
            // Its name counts as durable: what it holds does not.
            world.add_file(path, &[]);
        }
        self.open(path, options)
    }

    fn sync_name(&self, _path: &Path) -> Result<(), StorageError> {
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), StorageError> {
        self.open.world.lock().remove_file(path);
        Ok(())
    }

    fn share(&self, file: FileId) -> Result<(), StorageError> {
        let open = self.open.get(file);
        let mut world = self.open.world.lock();
        let own = |holder: &&mut Holder| holder.storage == self.open.number;
        world.files[open.file].holders.iter_mut().filter(own).for_each(|holder| holder.writable = false);
        Ok(())
    }

    fn queue(&self, depth: u32) -> Result<SimQueue, StorageError> {
        let (index, rung) = self.open.world.lock().add_queue(depth);
        let open = Arc::clone(&self.open);
        Ok(SimQueue { open, index, rung, memory: BTreeMap::new(), watched: Vec::new(), poll: None })
    }

    fn length(&self, file: FileId) -> Result<u64, StorageError> {
        let file = self.open.get(file).file;
        Ok(self.open.world.lock().files[file].contents.length())
    }

    fn allocated(&self, file: FileId) -> Result<u64, StorageError> {
        let file = self.open.get(file).file;
        Ok(self.open.world.lock().files[file].contents.allocated())
    }
}

/// Refuses a conflict as QEMU's permissions do: a writer together with any other holder.
fn check_lock(world: &World, file: usize, path: &Path, writable: bool) -> Result<(), StorageError> {
    let holders = &world.files[file].holders;
    let conflict = if holders.iter().any(|holder| holder.writable) {
        LockConflict::Uses(Permission::Write)
    } else if writable && !holders.is_empty() {
        LockConflict::DoesNotShare(Permission::Write)
    } else {
        return Ok(());
    };
    Err(StorageError::Locked { path: path.into(), conflict, holder: None })
}

/// A queue of a [`SimStorage`]. One thread may run several.
///
/// [`IoQueue::wait`] advances the world by one completion of any queue, or moves the clock to the next timeout of a
/// waiting queue. When all queues wait and nothing will ever happen it panics with a list of the hanging operations. If
/// a fault made them hang, the panic prints nothing and carries a [`Hung`].
pub struct SimQueue {
    open: Arc<OpenFiles>,
    /// Index into the world's queues.
    index: usize,
    rung: Arc<AtomicBool>,
    /// The memory of the operations in flight, by the world's number.
    memory: BTreeMap<u64, (Token, Parts)>,
    watched: Vec<EventFd>,
    /// Polls the watched eventfds, once there is one.
    poll: Option<Epoll>,
}

/// The panic of a wait that never ends because a fault made an operation hang: a list of the hanging operations.
#[derive(Debug)]
pub struct Hung(pub String);

/// Sets a flag that the world reads.
struct SimNotifier(Arc<AtomicBool>);

impl Notifier for SimNotifier {
    fn notify(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl SimQueue {
    /// True if a watched eventfd was signalled; resets those that were.
    fn take_signals(&self) -> bool {
        let Some(poll) = &self.poll else { return false };
        let mut ready = vec![EpollEvent::default(); self.watched.len()];
        let count = poll.wait(0, &mut ready).unwrap_or(0);
        for event in &ready[..count] {
            // Signalled, so that reading does not block.
            let _ = self.watched[event.data() as usize].read();
        }
        count > 0
    }
}

impl IoQueue for SimQueue {
    fn push(&mut self, token: Token, operation: Operation) {
        let open = self.open.get(operation.file);
        let verb = Verb::of(operation.kind);
        let length = match operation.kind {
            Kind::Read | Kind::Write => operation.parts_len(),
            Kind::Punch { length } | Kind::Zero { length } | Kind::Allocate { length } => length,
            Kind::Sync | Kind::SetLength => 0,
        };
        let mut world = self.open.world.lock();
        let answer = answer_at_once(&operation, length, &open.info, &world.options);
        let bytes = (verb == Verb::Write && answer.is_none()).then(|| gather(&operation.parts, length));
        let asked = Asked { token, file: open.file, verb, offset: operation.offset, length, bytes };
        let number = world.push(self.index, asked, answer);
        self.memory.insert(number, (token, operation.parts));
    }

    fn submit(&mut self) {
        self.open.world.lock().submit(self.index);
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.memory.is_empty() {
            return;
        }
        let mut world = self.open.world.lock();
        if world.queues[self.index].ready.is_empty() {
            return;
        }
        world.stir();
        let ready = std::mem::take(&mut world.queues[self.index].ready);
        drop(world);
        for ended in ready {
            let (token, mut parts) = self.memory.remove(&ended.number).expect("kept since the push");
            let mut found = ended.found;
            if ended.result.is_err() {
                // Callers must not rely on the memory of a failed read.
                found.fill(GARBAGE);
            }
            scatter(&found, &mut parts);
            done.push(Completion { token, result: ended.result, parts });
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        self.submit();
        let rung = self.rung.swap(false, Ordering::AcqRel);
        if self.take_signals() || rung {
            self.open.world.lock().stir();
            return;
        }
        let rest = {
            let mut world = self.open.world.lock();
            if !world.queues[self.index].ready.is_empty() {
                return;
            }
            world.rest(self.index, timeout)
        };
        // Not under the lock, which the cleanup after the panic needs.
        match rest {
            Rest::Over => {}
            // Without a message: the test that injected the hang catches it.
            Rest::Deadlock { report, meant: true } => std::panic::resume_unwind(Box::new(Hung(report))),
            Rest::Deadlock { report, meant: false } => panic!("{report}"),
        }
    }

    fn watch(&mut self, event: EventFd) {
        let poll = self.poll.get_or_insert_with(|| Epoll::new().expect("a test may open files"));
        let number = self.watched.len() as u64;
        poll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, number))
            .expect("an eventfd can be polled");
        self.watched.push(event);
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        Arc::new(SimNotifier(Arc::clone(&self.rung)))
    }

    fn in_flight(&self) -> usize {
        self.memory.len()
    }

    fn now(&self) -> Instant {
        self.open.world.now()
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        self.open.world.lock().retire(self.index);
    }
}

/// The result of an operation that never reaches the file, the same as a real host's.
fn answer_at_once(
    operation: &Operation,
    length: u64,
    info: &FileInfo,
    options: &SimOptions,
) -> Option<Result<(), Errno>> {
    let verb = Verb::of(operation.kind);
    if verb == Verb::Sync {
        return None;
    }
    if operation.offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err()) {
        return Some(Err(Errno::EINVAL));
    }
    if verb == Verb::SetLength {
        return (!info.writable).then_some(Err(Errno::EINVAL));
    }
    if !is_aligned(operation, length, info) {
        return Some(Err(Errno::EINVAL));
    }
    if length == 0 {
        return Some(Ok(()));
    }
    if verb != Verb::Read && !info.writable {
        return Some(Err(Errno(libc::EBADF)));
    }
    let supported = match verb {
        Verb::Punch => options.punch,
        Verb::Zero => options.zero,
        Verb::Allocate => options.allocate,
        _ => true,
    };
    (!supported).then_some(Err(Errno::EOPNOTSUPP))
}

fn is_aligned(operation: &Operation, length: u64, info: &FileInfo) -> bool {
    let memory = u64::from(info.memory_alignment);
    (operation.offset | length).is_multiple_of(u64::from(info.offset_alignment))
        && operation.parts.iter().all(|part| {
            let address = match part {
                Part::Guest(slice) => slice.ptr_guard().as_ptr(),
                Part::Owned(buffer) => buffer.as_slice().as_ptr(),
            };
            (address as u64 | part.len() as u64).is_multiple_of(memory)
        })
}

/// The bytes of the parts, in file order.
fn gather(parts: &Parts, length: u64) -> Arc<[u8]> {
    let mut bytes = vec![0; length as usize];
    let mut rest = &mut bytes[..];
    for part in parts {
        let (target, after) = rest.split_at_mut(part.len());
        match part {
            Part::Guest(slice) => drop(slice.copy_to(target)),
            Part::Owned(buffer) => target.copy_from_slice(buffer.as_slice()),
        }
        rest = after;
    }
    bytes.into()
}

/// Copies the bytes read into the parts; no effect if nothing was read.
fn scatter(found: &[u8], parts: &mut Parts) {
    let mut rest = found;
    for part in parts {
        let Some((source, after)) = rest.split_at_checked(part.len()) else { return };
        match part {
            Part::Guest(slice) => slice.copy_from(source),
            Part::Owned(buffer) => buffer.as_mut_slice().copy_from_slice(source),
        }
        rest = after;
    }
}

/// Takes the world's lock even if it is poisoned: the state is consistent between calls, and cleanup after a panic
/// needs it.
pub(crate) fn lock_world(world: &Mutex<World>) -> std::sync::MutexGuard<'_, World> {
    world.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
