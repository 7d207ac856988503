//! Waking a queue from another thread: an eventfd, and the flags that make it cheap to notify a queue that is awake.
//!
//! It never touches a ring: the queue reads the eventfd as it reads every watched one.
//!
//! The two flags are a handshake between one sleeper and any number of notifiers:
//!
//! | sleeper ([`Wakeup::begin_sleep`]) | notifier ([`Notifier::notify`]) |
//! |---|---|
//! | store `sleeping` = true | store `notified` = true |
//! | load `notified`: if set, do not sleep | load `sleeping`: if set, signal the eventfd |
//!
//! All four are sequentially consistent, so in every order at least one side sees the other's store. Either the
//! sleeper does not sleep or the eventfd is signalled. A notifier takes `sleeping` with a swap, so that of many
//! only the first makes the system call.

use std::sync::atomic::{AtomicBool, Ordering};

use tracing::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::Notifier;
use crate::error::{Step, StorageError};

#[derive(Debug)]
pub(super) struct Wakeup {
    pub(super) event: EventFd,
    /// The queue is, or is about to be, asleep in the kernel.
    sleeping: AtomicBool,
    /// A notification that no wait has answered yet.
    notified: AtomicBool,
}

impl Wakeup {
    pub(super) fn new() -> Result<Self, StorageError> {
        // Blocking on purpose: a read in the ring then waits for a signal on every kernel.
        let event = EventFd::new(EFD_CLOEXEC)
            .map_err(|source| StorageError::Queue { step: Step::MakeEventFd, source })?;
        Ok(Wakeup { event, sleeping: AtomicBool::new(false), notified: AtomicBool::new(false) })
    }

    /// Announces sleep. False if a notification is pending: then the queue must not sleep, and the announcement is
    /// withdrawn.
    pub(super) fn begin_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        if self.notified.swap(false, Ordering::SeqCst) {
            self.sleeping.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Ends sleep and answers every notification so far; true if there was one. Stores that a notifier made before its call
    /// are visible to the caller from here on.
    pub(super) fn end_sleep(&self) -> bool {
        self.sleeping.store(false, Ordering::SeqCst);
        self.notified.swap(false, Ordering::SeqCst)
    }
}

impl Notifier for Wakeup {
    fn notify(&self) {
        self.notified.store(true, Ordering::SeqCst);
        if self.sleeping.swap(false, Ordering::SeqCst)
            && let Err(source) = self.event.write(1)
        {
            // Only a counter at its limit or a closed descriptor fails here, and neither is possible.
            error!(%source, "the eventfd of a queue cannot be signalled");
        }
    }
}
