//! A thread's I/O queue, and how its executor, buffers and timers work on it. Knows no disk and no request.
//!
//! Completions of operations that async functions pushed wake their task. Those of the fast path go to the caller of
//! [`Driver::poll`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use engine::WakeFlag;
use slab::Slab;
use smallvec::SmallVec;
use storage::{AlignedBuf, BufferPool, Completion, Errno, IoQueue, Notifier, Operation, Part, Parts, Token};

use crate::bounds::{BUFFER_BYTES, INFLATING_BYTES, POOL_BYTES, ROUNDS_OF_A_TURN};
use crate::runtime::budget::{Budget, BufferPermit};
use crate::runtime::executor::{Executor, poll_once};
use crate::runtime::timers::{Alarm, Timers};

/// Marks the tokens of operations that a future awaits.
const FUTURE: u64 = 1 << 63;

/// An operation's result, and its memory.
pub(crate) type Outcome = (Result<(), Errno>, Parts);

/// One of several futures that run concurrently.
pub(crate) type Strand<'a, E> = Pin<Box<dyn Future<Output = Result<(), E>> + 'a>>;

enum Waiting {
    For(Option<Waker>),
    Done(Outcome),
}

pub(crate) struct Driver<Q> {
    queue: RefCell<Q>,
    executor: RefCell<Executor>,
    waiting: RefCell<Slab<Waiting>>,
    scratch: RefCell<Vec<Completion>>,
    timers: Timers,
    pub pool: BufferPool,
    buffers: Budget,
    inflating: Budget,
    /// More requests are about to come.
    more: Cell<bool>,
}

impl<Q: IoQueue> Driver<Q> {
    pub fn new(queue: Q) -> Rc<Self> {
        let executor = Executor::new(queue.notifier());
        Rc::new(Driver {
            queue: RefCell::new(queue),
            executor: RefCell::new(executor),
            waiting: RefCell::new(Slab::new()),
            scratch: RefCell::new(Vec::new()),
            timers: Timers::default(),
            pool: BufferPool::new(POOL_BYTES),
            buffers: Budget::new(BUFFER_BYTES),
            inflating: Budget::new(INFLATING_BYTES),
            more: Cell::new(false),
        })
    }

    /// The I/O queue, for operations of the fast path (with tokens below 2^63) and for watching.
    pub fn queue(&self) -> std::cell::RefMut<'_, Q> {
        self.queue.borrow_mut()
    }

    pub fn notifier(&self) -> Arc<dyn Notifier> {
        self.queue.borrow().notifier()
    }

    pub fn now(&self) -> Instant {
        self.queue.borrow().now()
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.executor.borrow_mut().spawn(Box::pin(task));
    }

    /// Whether more requests are about to come.
    pub fn expect_more(&self, more: bool) {
        self.more.set(more);
    }

    /// Whether this thread has other work while a task waits.
    pub fn has_other_work(&self) -> bool {
        self.more.get() || self.executor.borrow().tasks() > 1
    }

    /// How often tasks were polled since the beginning.
    pub fn polls(&self) -> u64 {
        self.executor.borrow().polls()
    }

    /// True if a task has not ended.
    pub fn has_tasks(&self) -> bool {
        self.executor.borrow().has_tasks()
    }

    /// Starts an operation; the future returns its outcome.
    pub fn run(&self, operation: Operation) -> impl Future<Output = Outcome> {
        let index = self.waiting.borrow_mut().insert(Waiting::For(None));
        self.queue.borrow_mut().push(Token(FUTURE | index as u64), operation);
        poll_fn(move |context| {
            let mut waiting = self.waiting.borrow_mut();
            if let Waiting::For(waker) = &mut waiting[index] {
                *waker = Some(context.waker().clone());
                return Poll::Pending;
            }
            match waiting.remove(index) {
                Waiting::Done(outcome) => Poll::Ready(outcome),
                Waiting::For(_) => unreachable!("looked at above"),
            }
        })
    }

    /// Runs futures concurrently until all have ended. Returns the first error, if any.
    pub async fn run_together<E>(&self, mut futures: Vec<Strand<'_, E>>) -> Result<(), E> {
        let mut result = Ok(());
        poll_fn(|context| {
            futures.retain_mut(|future| match future.as_mut().poll(context) {
                Poll::Pending => true,
                Poll::Ready(ended) => {
                    if result.is_ok() {
                        result = ended;
                    }
                    false
                }
            });
            if futures.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        result
    }

    /// Runs an operation that moves no memory.
    pub async fn run_bare(&self, operation: Operation) -> Result<(), Errno> {
        self.run(operation).await.0
    }

    /// Runs operations concurrently; all have ended when this returns. Returns the first error, if any.
    pub async fn run_all(&self, operations: impl IntoIterator<Item = Operation>) -> Result<(), Errno> {
        let started: SmallVec<[_; 4]> = operations.into_iter().map(|operation| self.run(operation)).collect();
        let mut result = Ok(());
        for outcome in started {
            let (ended, parts) = outcome.await;
            result = result.and(ended);
            self.recycle(parts);
        }
        result
    }

    /// Returns the buffers among an operation's parts to the pool.
    pub fn recycle(&self, parts: Parts) {
        for part in parts {
            if let Part::Owned(buffer) = part {
                self.pool.give(buffer);
            }
        }
    }

    /// Runs a read or write of one buffer, and returns the buffer.
    pub async fn run_buffer(
        &self,
        mut operation: Operation,
        buffer: AlignedBuf,
    ) -> (Result<(), Errno>, AlignedBuf) {
        operation.parts.push(Part::Owned(buffer));
        let (result, mut parts) = self.run(operation).await;
        match parts.pop() {
            Some(Part::Owned(buffer)) => (result, buffer),
            _ => panic!("an operation gives back the parts it was given"),
        }
    }

    /// Waits until the thread's requests hold so little buffer memory that `bytes` more fit the budget. A larger
    /// amount counts as the whole budget.
    pub async fn reserve_buffers(&self, bytes: usize) -> BufferPermit<'_> {
        self.buffers.take(bytes).await
    }

    /// The same for the memory of inflating. It has its own budget, because it is reserved while buffers are held. A
    /// holder of it never waits for buffers.
    pub async fn reserve_inflating(&self, bytes: usize) -> BufferPermit<'_> {
        self.inflating.take(bytes).await
    }

    /// Lets the thread's other tasks run once.
    pub async fn yield_now(&self) {
        let mut yielded = false;
        poll_fn(|context| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// An alarm for a time. It wakes nothing until a task is named.
    pub fn alarm(&self, until: Instant) -> Alarm<'_, Q> {
        Alarm::new(&self.timers, &self.queue, until)
    }

    /// Submits operations, reaps completions and runs tasks, until there is nothing more to do at once. Completions
    /// of fast-path operations go to `fast`.
    pub fn poll(&self, mut fast: impl FnMut(Completion)) {
        for _ in 0..ROUNDS_OF_A_TURN {
            let mut completions = self.scratch.take();
            {
                let mut queue = self.queue.borrow_mut();
                queue.submit();
                queue.reap(&mut completions);
            }
            let mut busy = !completions.is_empty();
            for completion in completions.drain(..) {
                if completion.token.0 & FUTURE == 0 {
                    fast(completion);
                } else {
                    self.finish(completion);
                }
            }
            *self.scratch.borrow_mut() = completions;
            self.timers.fire(|| self.now());
            busy |= self.run_ready();
            if !busy {
                break;
            }
        }
    }

    fn finish(&self, completion: Completion) {
        let index = (completion.token.0 & !FUTURE) as usize;
        let done = Waiting::Done((completion.result, completion.parts));
        let before = std::mem::replace(&mut self.waiting.borrow_mut()[index], done);
        if let Waiting::For(Some(waker)) = before {
            waker.wake();
        }
    }

    /// Polls the tasks that are ready now; true if there were any.
    fn run_ready(&self) -> bool {
        if !self.executor.borrow().has_ready() {
            return false;
        }
        let tasks = self.executor.borrow_mut().take_ready();
        let mut round = Round { executor: &self.executor, tasks, polled: None };
        while let Some(number) = round.tasks.pop_front() {
            let taken = self.executor.borrow_mut().take(number);
            if let Some((task, waker)) = taken {
                round.polled = Some(number);
                let left = poll_once(task, &waker);
                round.polled = None;
                self.executor.borrow_mut().put_back(number, left);
            }
        }
        true
    }

    /// Sleeps until there may be something to do.
    pub fn wait(&self, timeout: Option<Duration>) {
        if self.executor.borrow().has_ready() {
            return;
        }
        let next = self.timers.next().map(|until| until.saturating_duration_since(self.now()));
        let timeout = match (timeout, next) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.queue.borrow_mut().wait(timeout);
    }

    /// Runs a future to its end on this thread, along with the driver's other tasks.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let flag = Arc::new(Flag { woken: WakeFlag::new(true), notifier: self.notifier() });
        let waker = Waker::from(Arc::clone(&flag));
        loop {
            if flag.woken.lower()
                && let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return value;
            }
            self.poll(|_| panic!("no fast path here"));
            if !flag.woken.is_raised() {
                self.wait(None);
            }
        }
    }
}

/// The tasks being polled. If a poll panics, its task is forgotten, so that nothing waits for its end. The other
/// tasks stay ready.
struct Round<'a> {
    executor: &'a RefCell<Executor>,
    tasks: VecDeque<usize>,
    polled: Option<usize>,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut executor = self.executor.borrow_mut();
        if let Some(number) = self.polled {
            executor.put_back(number, None);
        }
        executor.give_back(std::mem::take(&mut self.tasks));
    }
}

/// The waker of [`Driver::block_on`].
struct Flag {
    woken: WakeFlag,
    notifier: Arc<dyn Notifier>,
}

impl std::task::Wake for Flag {
    fn wake(self: Arc<Self>) {
        if self.woken.raise() {
            self.notifier.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use storage::Storage;
    use storage_sim::{SimOptions, SimWorld};

    use super::*;

    #[test]
    fn an_alarm_wakes_once_and_leaves_nothing_behind() {
        let world = SimWorld::new(1, SimOptions::calm());
        let driver = Driver::new(world.storage().queue(1).expect("a queue"));
        let flag = Arc::new(Flag { woken: WakeFlag::new(false), notifier: driver.notifier() });
        let waker = Waker::from(Arc::clone(&flag));
        let mut first = driver.alarm(driver.now() + Duration::from_secs(1));
        for seconds in 2..1000 {
            // A task that waits for something else drops its alarm.
            let mut other = driver.alarm(driver.now() + Duration::from_secs(seconds));
            other.wake(&waker);
            other.wake(&waker);
            first.wake(&waker);
            assert_eq!(driver.timers.len(), 2);
        }
        driver.poll(|_| ());
        assert!(!flag.woken.is_raised() && !first.is_over());
        driver.wait(None);
        driver.poll(|_| ());
        assert!(flag.woken.lower() && first.is_over());
        driver.poll(|_| ());
        assert!(!flag.woken.is_raised(), "once");
        drop(first);
        assert_eq!(driver.timers.len(), 0);
    }
}
