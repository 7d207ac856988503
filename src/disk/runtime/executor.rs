//! A worker's own executor: runs the slow path's async functions on the worker's thread.
//!
//! Tasks are not `Send` and never block. Wakers are `Send`, so that another worker may wake a task here, which also
//! ends this thread's sleep.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use engine::WakeFlag;
use storage::Notifier;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// A slot for a task. The slot retains its waker for the next task.
struct Entry {
    /// None while the task is polled, and once it has ended.
    task: Option<Task>,
    wake: Arc<TaskWaker>,
    /// The same, in the form that the task gets.
    waker: Waker,
}

pub(crate) struct Executor {
    /// By number.
    tasks: Vec<Entry>,
    /// Numbers of slots without a task.
    vacant: Vec<usize>,
    ready: Arc<Ready>,
    /// An empty queue, retained for its memory.
    spare: VecDeque<usize>,
    /// How often tasks were polled.
    polls: u64,
}

/// The tasks to be polled. Leaf lock: no other lock is taken while it is held.
struct Ready {
    queue: Mutex<VecDeque<usize>>,
    notifier: Arc<dyn Notifier>,
}

struct TaskWaker {
    ready: Arc<Ready>,
    /// The task's number. By the time of the wake it may belong to another task, for which that is only one poll too
    /// many.
    task: usize,
    /// Raised while the number is in the queue, or in the round that is being polled.
    queued: WakeFlag,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.raise() {
            self.ready.queue.lock().expect("no panic under this lock").push_back(self.task);
            self.ready.notifier.notify();
        }
    }
}

impl Executor {
    pub fn new(notifier: Arc<dyn Notifier>) -> Self {
        let ready = Arc::new(Ready { queue: Mutex::new(VecDeque::new()), notifier });
        Executor { tasks: Vec::new(), vacant: Vec::new(), ready, spare: VecDeque::new(), polls: 0 }
    }

    /// Adds a task, ready to run.
    pub fn spawn(&mut self, task: Task) {
        let number = self.vacant.pop().unwrap_or_else(|| self.add_place());
        let entry = &mut self.tasks[number];
        entry.task = Some(task);
        // Otherwise a late wake of the previous task has queued the number already.
        if entry.wake.queued.raise() {
            self.ready.queue.lock().expect("no panic under this lock").push_back(number);
        }
    }

    fn add_place(&mut self) -> usize {
        let number = self.tasks.len();
        let ready = Arc::clone(&self.ready);
        let wake = Arc::new(TaskWaker { ready, task: number, queued: WakeFlag::new(false) });
        let waker = Waker::from(Arc::clone(&wake));
        self.tasks.push(Entry { task: None, wake, waker });
        number
    }

    /// Tasks that have not ended.
    pub fn tasks(&self) -> usize {
        self.tasks.len() - self.vacant.len()
    }

    /// How often tasks were polled since the beginning.
    pub fn polls(&self) -> u64 {
        self.polls
    }

    /// True if a task has not ended.
    pub fn has_tasks(&self) -> bool {
        self.tasks() > 0
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

    /// Returns the queue of a round. Tasks left in it come first in the next round.
    pub fn give_back(&mut self, mut round: VecDeque<usize>) {
        if !round.is_empty() {
            let mut queue = self.ready.queue.lock().expect("no panic under this lock");
            round.append(&mut queue);
            std::mem::swap(&mut *queue, &mut round);
        }
        self.spare = round;
    }

    /// Takes a task out, to poll it without a borrow of the executor.
    pub fn take(&mut self, number: usize) -> Option<(Task, Waker)> {
        let entry = self.tasks.get_mut(number)?;
        // Also if the task has ended: the number has left the queue, and the slot's next task must be able to enter
        // it again.
        entry.wake.queued.lower();
        let task = entry.task.take()?;
        self.polls += 1;
        Some((task, entry.waker.clone()))
    }

    /// Puts back a task that has not ended, or forgets one that has.
    pub fn put_back(&mut self, number: usize, task: Option<Task>) {
        match task {
            Some(task) => self.tasks[number].task = Some(task),
            None => self.vacant.push(number),
        }
    }
}

/// Polls a task once; returns it if it has not ended.
pub(crate) fn poll_once(mut task: Task, waker: &Waker) -> Option<Task> {
    match task.as_mut().poll(&mut Context::from_waker(waker)) {
        Poll::Ready(()) => None,
        Poll::Pending => Some(task),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Bells(AtomicUsize);

    impl Notifier for Bells {
        fn notify(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls the ready tasks in one round; returns their numbers.
    fn round(executor: &mut Executor) -> Vec<usize> {
        let mut tasks = executor.take_ready();
        let numbers: Vec<usize> = tasks.drain(..).collect();
        for number in &numbers {
            let (task, waker) = executor.take(*number).expect("only live tasks are woken here");
            let left = poll_once(task, &waker);
            executor.put_back(*number, left);
        }
        executor.give_back(tasks);
        numbers
    }

    #[test]
    fn a_task_woken_many_times_is_polled_once() {
        let bells = Arc::new(Bells::default());
        let mut executor = Executor::new(Arc::clone(&bells) as Arc<dyn Notifier>);
        let left: Rc<RefCell<Option<Waker>>> = Rc::default();
        let leave = Rc::clone(&left);
        executor.spawn(Box::pin(poll_fn(move |context| {
            // A wake during the poll itself causes another poll.
            if leave.replace(Some(context.waker().clone())).is_none() {
                context.waker().wake_by_ref();
                context.waker().wake_by_ref();
            }
            Poll::Pending
        })));
        assert_eq!(round(&mut executor), [0]);
        assert_eq!(round(&mut executor), [0]);
        assert!(!executor.has_ready());
        let waker = left.borrow().clone().expect("the task has left its waker");
        for _ in 0..3 {
            waker.wake_by_ref();
        }
        assert_eq!(round(&mut executor), [0]);
        assert_eq!(bells.0.load(Ordering::Relaxed), 2, "the thread is woken once for each round");
    }

    #[test]
    fn a_late_wake_of_an_ended_task_does_not_lose_the_next_task() {
        // The late wake comes before the next task. It then stays in the queue, or a round finds that its task has
        // ended.
        for found in [false, true] {
            let mut executor = Executor::new(Arc::new(Bells::default()));
            let left: Rc<RefCell<Option<Waker>>> = Rc::default();
            let leave = Rc::clone(&left);
            executor.spawn(Box::pin(poll_fn(move |context| {
                leave.replace(Some(context.waker().clone()));
                Poll::Ready(())
            })));
            assert_eq!(round(&mut executor), [0]);
            assert!(!executor.has_tasks());
            left.borrow().as_ref().expect("the task has left its waker").wake_by_ref();
            if found {
                let mut tasks = executor.take_ready();
                let number = tasks.pop_front().expect("the wake queued it");
                assert!(executor.take(number).is_none(), "the slot has no task");
                executor.give_back(tasks);
            }
            executor.spawn(Box::pin(std::future::pending()));
            assert_eq!((round(&mut executor), executor.tasks()), (vec![0], 1));
            assert!(!executor.has_ready(), "it was queued once");
            left.borrow().as_ref().expect("the task has left its waker").wake_by_ref();
            assert_eq!(round(&mut executor), [0], "the waker of the ended task wakes it");
        }
    }

    #[test]
    fn tasks_that_a_round_leaves_come_first_in_the_next() {
        let mut executor = Executor::new(Arc::new(Bells::default()));
        for _ in 0..3 {
            executor.spawn(Box::pin(std::future::pending()));
        }
        let mut tasks = executor.take_ready();
        assert_eq!(tasks.pop_front(), Some(0));
        executor.spawn(Box::pin(std::future::pending()));
        executor.give_back(tasks);
        assert_eq!(round(&mut executor), [1, 2, 3]);
    }
}
