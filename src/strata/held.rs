//! A disk that this process may release to another one, and take back. After a migration the guest goes on with
//! another daemon, and only one of them may have the image open for writing.
//!
//! Owns the moments at which the disk is opened and closed between start and end. It never decides when.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};
use std::time::{Duration, Instant};

use disk::{Disk, OpenError};
use storage::Storage;
use tracing::info;

/// Opens the disk, and waits at most so long for its lock.
pub type Opening<S> = Box<dyn Fn(Duration) -> Result<Disk<S>, OpenError> + Send + Sync>;

/// How a released disk is opened, and what is known of earlier attempts.
pub struct Reopening<S: Storage> {
    open: Opening<S>,
    /// How long an attempt waits for the image's lock.
    patience: Duration,
    /// When the last attempt failed. A leaf.
    failed_at: Mutex<Option<Instant>>,
}

impl<S: Storage> Reopening<S> {
    /// Opens the disk by `open`, which waits for the image's lock for `patience`.
    pub fn new(open: Opening<S>, patience: Duration) -> Self {
        Reopening { open, patience, failed_at: Mutex::new(None) }
    }

    /// All queues of a session start one after the other: only the first one waits for a lock that is not released.
    fn open(&self) -> Result<Disk<S>, OpenError> {
        let just_failed = self.failed_at().is_some_and(|at| at.elapsed() < self.patience);
        let opened = (self.open)(if just_failed { Duration::ZERO } else { self.patience });
        *self.failed_at() = opened.is_err().then(Instant::now);
        opened
    }

    fn failed_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk that is open here, or released.
pub struct Held<S: Storage> {
    /// None while it is released. Locked for writing for as long as an opening or a closing takes. A worker takes
    /// it once, when it makes its queue, and no request does.
    disk: RwLock<Option<Disk<S>>>,
    /// None for a disk that is never released.
    reopening: Option<Reopening<S>>,
    /// The disk is being changed, and will be there again. Relaxed: the lock orders everything.
    changing: AtomicBool,
}

/// A disk that is not released meanwhile.
pub struct DiskRef<'a, S: Storage>(RwLockReadGuard<'a, Option<Disk<S>>>);

impl<'a, S: Storage> DiskRef<'a, S> {
    fn of(disk: RwLockReadGuard<'a, Option<Disk<S>>>) -> Option<Self> {
        disk.is_some().then(|| DiskRef(disk))
    }
}

impl<S: Storage> Deref for DiskRef<'_, S> {
    type Target = Disk<S>;

    fn deref(&self) -> &Disk<S> {
        self.0.as_ref().expect("looked at when it was made")
    }
}

impl<S: Storage> Held<S> {
    /// An open disk, or one that is still to be opened: then there must be a way.
    pub fn new(disk: Option<Disk<S>>, reopening: Option<Reopening<S>>) -> Self {
        Held { disk: RwLock::new(disk), reopening, changing: AtomicBool::new(false) }
    }

    /// The disk, unless it is released or just being opened, closed or changed. Never waits.
    pub fn glance(&self) -> Option<DiskRef<'_, S>> {
        match self.disk.try_read() {
            Ok(disk) => DiskRef::of(disk),
            Err(TryLockError::Poisoned(poisoned)) => DiskRef::of(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// True while [`Held::change`] has the disk, or waits for it. It may have ended by the time that the caller knows.
    pub fn is_changing(&self) -> bool {
        self.changing.load(Ordering::Relaxed)
    }

    /// The disk, unless it is released or just being opened or closed. Waits for the end of a change ([`Held::change`]), which
    /// may wait for the host.
    pub fn get(&self) -> Option<DiskRef<'_, S>> {
        match self.disk.try_read() {
            Ok(disk) => DiskRef::of(disk),
            Err(TryLockError::Poisoned(poisoned)) => DiskRef::of(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if self.is_changing() => self.wait(),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The disk, unless it is released.
    pub fn wait(&self) -> Option<DiskRef<'_, S>> {
        DiskRef::of(self.disk.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The disk, opened first if it is released. `opened` is called with a disk that was just opened.
    ///
    /// # Errors
    /// When it cannot be opened: another process may use the image. Or the error of `opened`; then it is not open.
    pub fn get_back(
        &self,
        opened: impl FnOnce(&Disk<S>) -> Result<(), OpenError>,
    ) -> Result<DiskRef<'_, S>, OpenError> {
        if let Some(disk) = self.wait() {
            return Ok(disk);
        }
        {
            let mut held = self.write();
            if held.is_none() {
                let reopening = self.reopening.as_ref().expect("a disk that may be released can be opened");
                let disk = reopening.open()?;
                opened(&disk)?;
                *held = Some(disk);
                info!("the image is open for writing here");
            }
        }
        // Only the session's thread releases it, and that thread waits for this one.
        Ok(self.wait().expect("just opened"))
    }

    /// Changes the disk, whose queues are parked. `None` if it is released.
    pub fn change<R>(&self, change: impl FnOnce(&mut Disk<S>) -> R) -> Option<R> {
        self.changing.store(true, Ordering::Relaxed);
        let changed = self.write().as_mut().map(change);
        self.changing.store(false, Ordering::Relaxed);
        changed
    }

    /// Closes the disk, which has no queues. True if another process may now have it.
    ///
    /// # Errors
    /// When something could not be made durable. Then the disk stays here, so that no other process goes on without
    /// that.
    pub fn release(&self) -> Result<bool, OpenError> {
        if self.reopening.is_none() {
            return Ok(false);
        }
        let mut held = self.write();
        let Some(disk) = held.as_mut() else { return Ok(false) };
        disk.finish()?;
        *held = None;
        Ok(true)
    }

    /// The disk at the end of the process.
    pub fn into_disk(self) -> Option<Disk<S>> {
        self.disk.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<Disk<S>>> {
        self.disk.write().unwrap_or_else(PoisonError::into_inner)
    }
}
