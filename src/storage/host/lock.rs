//! Image locks: open-file-description byte-range locks at the offsets that QEMU uses. They keep QEMU, its tools and
//! Strata from using an image at the same time by mistake.
//!
//! A permission that a holder uses is a shared lock on byte 100 + its bit. One that it denies to others is a shared
//! lock on byte 200 + its bit. Shared locks never collide: a process first sets its own, then checks the opposite
//! bytes for locks of others. Of two that start at once, both may fail and retry, but never both succeed. The bytes
//! hold no data: locks may lie anywhere, even past the end.
//!
//! The locks belong to the description that does the I/O, so after a crash they last exactly as long as I/O can.
//!
//! Readers share a file, so these locks do not tell whether a dead reader's I/O is over. For that a storage may
//! have an [`Owner`]. All its files get a shared lock on a byte of the owner's own, far behind all data. Another
//! storage of the same owner waits until no other description has a lock there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use names::shown;
use tracing::warn;

use super::holder::{self, LockKey};
use crate::OpenOptions;
use crate::error::{LockConflict, Permission, Step, StorageError};

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Where the bytes of owners begin: no file is so long. There are 2^61.
const OWNER_BASE: i64 = 1 << 62;

/// Who uses files, one process after another. A storage of an owner opens no file before all I/O of the owner's
/// earlier storages on that file is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

impl Owner {
    /// The owner with this name. Of two names the byte is hardly ever the same (FNV-1a, 61 bits). If it is, one waits
    /// for the other until its timeout, and does not open its files.
    pub fn of(name: &[u8]) -> Self {
        let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        Owner(name.iter().fold(0xcbf2_9ce4_8422_2325, step))
    }

    /// The owner's byte.
    fn byte(self) -> i64 {
        OWNER_BASE + (self.0 >> 3) as i64
    }
}

/// Says that nobody waits for a lock any more.
type GivesUp = dyn Fn() -> bool + Send + Sync;

/// How the locks of a storage are set.
#[derive(Clone, Default)]
pub(super) struct LockHow {
    /// See [`super::HostStorage::owned_by`].
    pub owner: Option<Owner>,
    /// Files are used without a lock where the lock service does not answer.
    pub unlocked_allowed: bool,
    /// See [`super::HostStorage::giving_up`].
    pub gives_up: Option<Arc<GivesUp>>,
}

impl std::fmt::Debug for LockHow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LockHow")
            .field("owner", &self.owner)
            .field("unlocked_allowed", &self.unlocked_allowed)
            .finish_non_exhaustive()
    }
}

/// The pause between two attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

const ALL: [Permission; 4] =
    [Permission::ConsistentRead, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

/// The permissions that a holder uses, and those that it denies to others.
struct Claim {
    used: &'static [Permission],
    unshared: &'static [Permission],
}

/// For writing: no other process may write or resize, and one that denies writing conflicts.
const WRITER: Claim = Claim { used: &ALL, unshared: &[Permission::Write, Permission::Resize] };

/// For reading: any number of readers and no writer.
const READER: Claim =
    Claim { used: &[Permission::ConsistentRead], unshared: &[Permission::Write, Permission::Resize] };

/// Locks the image, trying again until `options.lock_timeout` has passed, or `how` gives up. On a file system without such
/// locks it warns and succeeds. When the lock service does not answer it does the same, if `how` allows that.
pub(super) fn lock_image(
    file: &File,
    path: &Path,
    options: &OpenOptions,
    how: &LockHow,
) -> Result<(), StorageError> {
    let claim = if options.writable { WRITER } else { READER };
    let deadline = Instant::now().checked_add(options.lock_timeout);
    let mut waited = false;
    loop {
        let found = match claim.attempt(file, how.owner) {
            Ok(None) => return Ok(()),
            Ok(Some(found)) => found,
            Err(source) if may_go_on(&source, how.unlocked_allowed) => {
                warn!(path = %shown(path), %source, "used without an image lock");
                return Ok(());
            }
            Err(source) => {
                return Err(StorageError::File { step: Step::Lock, path: path.into(), source });
            }
        };
        let holder = || found.key.as_ref().and_then(|key| holder::find(file, key, found.byte.unsigned_abs()));
        let given_up = how.gives_up.as_ref().is_some_and(|gives_up| gives_up());
        if given_up || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(StorageError::Locked {
                path: path.into(),
                conflict: found.conflict,
                holder: holder(),
            });
        }
        if !waited {
            let user = holder().map_or("another process".to_owned(), |holder| holder.to_string());
            let seconds = options.lock_timeout.as_secs_f64();
            warn!(path = %shown(path), conflict = %found.conflict, "in use by {user}; waiting up to {seconds} s for it");
            waited = true;
        }
        std::thread::sleep(RETRY_PAUSE.min(options.lock_timeout));
    }
}

/// Turns a writer's lock into a reader's.
pub(super) fn share_image(file: &File) -> io::Result<()> {
    let readers = |permission: &&Permission| !READER.used.contains(permission);
    for permission in WRITER.used.iter().filter(readers) {
        match set_lock(file, USED_BASE + bit(*permission), 1, libc::F_UNLCK) {
            Err(error) if !is_unsupported(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Releases the image lock, if there is one. No I/O may be in flight on the file.
pub(super) fn unlock_image(file: &File) {
    // Where this fails there was no lock; closing the file would end it anyway.
    let _ = clear(file);
}

fn clear(file: &File) -> io::Result<()> {
    set_lock(file, USED_BASE, ALL.len() as i64, libc::F_UNLCK)?;
    set_lock(file, UNSHARED_BASE, ALL.len() as i64, libc::F_UNLCK)?;
    // A length of 0 reaches to the end.
    set_lock(file, OWNER_BASE, 0, libc::F_UNLCK)?;
    Ok(())
}

/// A conflict, the byte on which the other holder has a lock, and the kernel's key of the file in its lists of locks.
struct Found {
    conflict: LockConflict,
    byte: i64,
    key: Option<LockKey>,
}

impl Claim {
    /// One attempt: all locks set, or none and the reason.
    fn attempt(&self, file: &File, owner: Option<Owner>) -> io::Result<Option<Found>> {
        let outcome = match self.set(file) {
            Ok(None) => self.conflict(file),
            other => other,
        };
        let found = |conflict| Found { conflict, byte: byte_of(conflict), key: holder::key_of(file) };
        let outcome = match (outcome, owner) {
            (Ok(None), Some(owner)) => precede(file, owner),
            (outcome, _) => outcome.map(|conflict| conflict.map(found)),
        };
        if !matches!(outcome, Ok(None)) {
            // Locks left behind would keep other processes out while we wait.
            clear(file)?;
        }
        outcome
    }

    /// Sets our locks. Only an exclusive lock on one of the bytes can prevent that, and QEMU never sets one.
    fn set(&self, file: &File) -> io::Result<Option<LockConflict>> {
        for permission in self.used {
            if !set_lock(file, USED_BASE + bit(*permission), 1, libc::F_RDLCK)? {
                return Ok(Some(LockConflict::DoesNotShare(*permission)));
            }
        }
        for permission in self.unshared {
            if !set_lock(file, UNSHARED_BASE + bit(*permission), 1, libc::F_RDLCK)? {
                return Ok(Some(LockConflict::Uses(*permission)));
            }
        }
        Ok(None)
    }

    /// The first permission on which another holder disagrees.
    fn conflict(&self, file: &File) -> io::Result<Option<LockConflict>> {
        for permission in self.used {
            if is_locked_by_another(file, UNSHARED_BASE + bit(*permission))? {
                return Ok(Some(LockConflict::DoesNotShare(*permission)));
            }
        }
        for permission in self.unshared {
            if is_locked_by_another(file, USED_BASE + bit(*permission))? {
                return Ok(Some(LockConflict::Uses(*permission)));
            }
        }
        Ok(None)
    }
}

/// The byte on which another holder has a lock that conflicts like this.
fn byte_of(conflict: LockConflict) -> i64 {
    match conflict {
        LockConflict::Uses(permission) => USED_BASE + bit(permission),
        LockConflict::DoesNotShare(permission) => UNSHARED_BASE + bit(permission),
        LockConflict::Predecessor => OWNER_BASE,
    }
}

/// Sets the lock on the owner's byte; the conflict if another description has one there.
fn precede(file: &File, owner: Owner) -> io::Result<Option<Found>> {
    let byte = owner.byte();
    // Nobody sets an exclusive lock there. The check needs no right to write, unlike an exclusive lock.
    let free = set_lock(file, byte, 1, libc::F_RDLCK)? && !is_locked_by_another(file, byte)?;
    let conflict = || Found { conflict: LockConflict::Predecessor, byte, key: holder::key_of(file) };
    Ok((!free).then(conflict))
}

/// A permission's place in QEMU's numbering.
fn bit(permission: Permission) -> i64 {
    match permission {
        Permission::ConsistentRead => 0,
        Permission::Write => 1,
        Permission::WriteUnchanged => 2,
        Permission::Resize => 3,
    }
}

/// Sets or releases a lock. False if another holder's lock conflicts.
fn set_lock(file: &File, start: i64, len: i64, kind: libc::c_int) -> io::Result<bool> {
    match fcntl_lock(file, libc::F_OFD_SETLK, &mut flock(start, len, kind)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_locked_by_another(file: &File, byte: i64) -> io::Result<bool> {
    // An exclusive lock would collide with any other; ours are on the same description, which never collides.
    let mut lock = flock(byte, 1, libc::F_WRLCK);
    fcntl_lock(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn flock(start: i64, len: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn fcntl_lock(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open, and `lock` is a valid flock that outlives the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether an image is used without a lock after this failure. ENOLCK means that locks exist but their service (an NFS
/// server) does not answer: another host may hold the image, so the operator decides.
fn may_go_on(error: &io::Error, unlocked_allowed: bool) -> bool {
    is_unsupported(error) || (unlocked_allowed && error.raw_os_error() == Some(libc::ENOLCK))
}

/// The errors of file systems and old kernels without such locks.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests;
