//! A worker's own executor: runs the slow path's async functions on the worker's thread.
//!
//! Tasks are not `Send` and never blocked; wakers are, so that another worker may wake a task here, which also ends
//! this thread's sleep.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;
use storage::Notifier;

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Entry {
    /// Taken out while it is polled.
    task: Option<Task>,
    waker: Waker,
}

pub(crate) struct Executor {
    tasks: Slab<Entry>,
    ready: Arc<Ready>,
    /// Emptied queue, kept for its memory.
    spare: VecDeque<usize>,
}

/// The tasks to be polled. Leaf lock: nothing is locked while it is held.
struct Ready {
    queue: Mutex<VecDeque<usize>>,
    notifier: Arc<dyn Notifier>,
}

struct TaskWaker {
    ready: Arc<Ready>,
    /// The task's number. It may be another task's by the time of the wake, which that one survives.
    task: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.queue.lock().expect("no panic under this lock").push_back(self.task);
        self.ready.notifier.notify();
    }
}

impl Executor {
    pub fn new(notifier: Arc<dyn Notifier>) -> Self {
        let ready = Arc::new(Ready { queue: Mutex::new(VecDeque::new()), notifier });
        Executor { tasks: Slab::new(), ready, spare: VecDeque::new() }
    }

    /// Adds a task; it first runs in the next [`Executor::take_ready`] round.
    pub fn spawn(&mut self, task: Task) {
        let entry = self.tasks.vacant_entry();
        let number = entry.key();
        let waker = Waker::from(Arc::new(TaskWaker { ready: Arc::clone(&self.ready), task: number }));
        entry.insert(Entry { task: Some(task), waker });
        self.ready.queue.lock().expect("no panic under this lock").push_back(number);
    }

    /// True if a task has not ended.
    pub fn has_tasks(&self) -> bool {
        !self.tasks.is_empty()
    }

    /// True if a task is to be polled.
    pub fn has_ready(&self) -> bool {
        !self.ready.queue.lock().expect("no panic under this lock").is_empty()
    }

    /// The tasks to be polled in this round.
    pub fn take_ready(&mut self) -> VecDeque<usize> {
        let mut queue = self.ready.queue.lock().expect("no panic under this lock");
        std::mem::replace(&mut *queue, std::mem::take(&mut self.spare))
    }

    /// Gives the emptied queue of a round back.
    pub fn give_back(&mut self, mut queue: VecDeque<usize>) {
        queue.clear();
        self.spare = queue;
    }

    /// Takes a task out to poll it without a borrow of the executor.
    pub fn take(&mut self, number: usize) -> Option<(Task, Waker)> {
        let entry = self.tasks.get_mut(number)?;
        let task = entry.task.take()?;
        Some((task, entry.waker.clone()))
    }

    /// Puts a task back that is not done, or forgets one that is.
    pub fn put_back(&mut self, number: usize, task: Option<Task>) {
        match task {
            Some(task) => self.tasks[number].task = Some(task),
            None => drop(self.tasks.remove(number)),
        }
    }
}

/// Polls a task once; gives it back if it is not done.
pub(crate) fn poll_once(mut task: Task, waker: &Waker) -> Option<Task> {
    match task.as_mut().poll(&mut Context::from_waker(waker)) {
        Poll::Ready(()) => None,
        Poll::Pending => Some(task),
    }
}
