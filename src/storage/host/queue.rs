//! The host's queue of either kind, io_uring or threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{ThreadQueue, UringQueue};
use crate::{Completion, IoQueue, Notifier, Operation, Token};

/// One thread's queue of operations on [`HostStorage`](super::HostStorage) files.
pub enum HostQueue {
    /// io_uring.
    Uring(Box<UringQueue>),
    /// Threads.
    Threads(Box<ThreadQueue>),
}

/// Makes the same call on either kind.
macro_rules! either {
    ($queue:expr, $inner:ident => $call:expr) => {
        match $queue {
            HostQueue::Uring($inner) => $call,
            HostQueue::Threads($inner) => $call,
        }
    };
}

impl IoQueue for HostQueue {
    #[inline]
    fn push(&mut self, token: Token, operation: Operation) {
        either!(self, queue => queue.push(token, operation));
    }

    #[inline]
    fn submit(&mut self) {
        either!(self, queue => queue.submit());
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<Completion>) {
        either!(self, queue => queue.reap(done));
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        either!(self, queue => queue.wait(timeout));
    }

    fn watch(&mut self, event: EventFd) {
        either!(self, queue => queue.watch(event));
    }

    fn signals(&self) -> u64 {
        either!(self, queue => queue.signals())
    }

    fn heed_signals(&mut self, heed: bool) {
        either!(self, queue => queue.heed_signals(heed));
    }

    fn notifier(&self) -> Arc<dyn Notifier> {
        either!(self, queue => queue.notifier())
    }

    fn in_flight(&self) -> usize {
        either!(self, queue => queue.in_flight())
    }

    fn now(&self) -> Instant {
        either!(self, queue => queue.now())
    }
}
