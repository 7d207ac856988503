//! A thread's I/O queue, executor, buffers and timers. Knows no disk and no request.
//!
//! Completions of operations that async functions pushed wake their task. Those of the fast path go to the caller of
//! [`Driver::turn`].

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
use crate::runtime::executor::{Executor, poll_once};

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
    /// The time and the waker of each timer; no waker once it was woken.
    timers: RefCell<Slab<(Instant, Option<Waker>)>>,
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
            timers: RefCell::new(Slab::new()),
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

    /// An alarm for a time. Until it is asked to wake somebody it is silent.
    pub fn alarm(&self, until: Instant) -> Alarm<'_, Q> {
        Alarm { driver: self, until, timer: None }
    }

    /// Submits operations, reaps completions and runs tasks, until there is nothing more to do at once. Completions
    /// of fast-path operations go to `fast`.
    pub fn turn(&self, mut fast: impl FnMut(Completion)) {
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
            self.fire_timers();
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

    fn fire_timers(&self) {
        let mut timers = self.timers.borrow_mut();
        if timers.is_empty() {
            return;
        }
        let now = self.now();
        for (_, (until, waker)) in timers.iter_mut() {
            if *until <= now
                && let Some(waker) = waker.take()
            {
                waker.wake();
            }
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
        let next = {
            let timers = self.timers.borrow();
            timers.iter().filter_map(|(_, (until, waker))| waker.as_ref().map(|_| *until)).min()
        };
        let next = next.map(|until| until.saturating_duration_since(self.now()));
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
            self.turn(|_| panic!("no fast path here"));
            if !flag.woken.is_raised() {
                self.wait(None);
            }
        }
    }
}

/// Wakes a task at a time, or soon after, unless it is dropped before.
pub(crate) struct Alarm<'a, Q> {
    driver: &'a Driver<Q>,
    until: Instant,
    /// Its key in the driver's timers, once a task was named.
    timer: Option<usize>,
}

impl<Q: IoQueue> Alarm<'_, Q> {
    /// Whether its time has come.
    pub fn is_over(&self) -> bool {
        self.driver.now() >= self.until
    }

    /// Names the task to wake, instead of any named before.
    pub fn wake(&mut self, waker: &Waker) {
        let mut timers = self.driver.timers.borrow_mut();
        let entry = (self.until, Some(waker.clone()));
        match self.timer {
            Some(timer) => timers[timer] = entry,
            None => self.timer = Some(timers.insert(entry)),
        }
    }
}

impl<Q> Drop for Alarm<'_, Q> {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.driver.timers.borrow_mut().remove(timer);
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

/// Bounds the memory that one thread's requests use for one purpose, first come first served.
struct Budget {
    bytes: usize,
    free: Cell<usize>,
    waiters: RefCell<VecDeque<(u64, Waker)>>,
}

impl Budget {
    fn new(bytes: usize) -> Self {
        Budget { bytes, free: Cell::new(bytes), waiters: RefCell::new(VecDeque::new()) }
    }

    /// A larger amount counts as the whole budget.
    async fn take(&self, bytes: usize) -> BufferPermit<'_> {
        let bytes = bytes.min(self.bytes);
        let mut number = None;
        poll_fn(|context| self.poll_take(bytes, &mut number, context.waker())).await;
        BufferPermit { budget: self, bytes }
    }

    fn poll_take(&self, bytes: usize, number: &mut Option<u64>, waker: &Waker) -> Poll<()> {
        let mut waiters = self.waiters.borrow_mut();
        let first = waiters.front().is_none_or(|(front, _)| Some(*front) == *number);
        if first && self.free.get() >= bytes {
            self.free.set(self.free.get() - bytes);
            if number.is_some() {
                waiters.pop_front();
            }
            if let Some((_, next)) = waiters.front() {
                next.wake_by_ref();
            }
            return Poll::Ready(());
        }
        match number {
            Some(number) => {
                let own = waiters.iter_mut().find(|(queued, _)| queued == number).expect("queued before");
                own.1 = waker.clone();
            }
            None => {
                let next = waiters.back().map_or(0, |(last, _)| last + 1);
                *number = Some(next);
                waiters.push_back((next, waker.clone()));
            }
        }
        Poll::Pending
    }
}

/// Permission to hold some buffer memory, until dropped.
#[must_use]
pub(crate) struct BufferPermit<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Drop for BufferPermit<'_> {
    fn drop(&mut self) {
        self.budget.free.set(self.budget.free.get() + self.bytes);
        if let Some((_, next)) = self.budget.waiters.borrow().front() {
            next.wake_by_ref();
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
            assert_eq!(driver.timers.borrow().len(), 2);
        }
        driver.turn(|_| ());
        assert!(!flag.woken.is_raised() && !first.is_over());
        driver.wait(None);
        driver.turn(|_| ());
        assert!(flag.woken.lower() && first.is_over());
        driver.turn(|_| ());
        assert!(!flag.woken.is_raised(), "once");
        drop(first);
        assert!(driver.timers.borrow().is_empty());
    }
}
