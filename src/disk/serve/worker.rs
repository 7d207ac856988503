//! A thread's worker: the driver, the shared disk, and how the slow path asks the engine.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use engine::{Answer, Engine, EngineError, Epoch, TableLoad, Turn, WorkerEpochs};
use names::shown;
use storage::{AlignedBuf, Errno, Kind, Operation, Part, Storage};
use tracing::error;

use crate::bounds::LOADS_AT_ONCE;
use crate::error::RequestError;
use crate::range::ByteRange;
use crate::runtime::driver::Driver;
use crate::serve::failures::FailureLog;
use crate::serve::work::WorkMeter;
use crate::shared::Shared;

/// One thread's access to a disk. Its async functions are the slow path.
pub(crate) struct Worker<S: Storage> {
    pub shared: Arc<Shared<S>>,
    pub driver: Rc<Driver<S::Queue>>,
    epochs: RefCell<WorkerEpochs>,
    /// Its queue is being stopped: its requests no longer wait for space.
    pub stop_waiting: Cell<bool>,
    /// It clears what lies past a smaller end, so no limit holds for its requests.
    pub clears_past_end: Cell<bool>,
    /// Requests that wait for space on the host.
    pub waiting: Cell<usize>,
    pub failures: Arc<FailureLog>,
    pub work: Rc<WorkMeter>,
}

/// A request's turn for clusters, ended when dropped.
#[must_use]
pub(crate) struct OwnTurn<'a, S: Storage> {
    worker: &'a Worker<S>,
    turn: Turn,
}

impl<S: Storage> Deref for OwnTurn<'_, S> {
    type Target = Turn;

    fn deref(&self) -> &Turn {
        &self.turn
    }
}

impl<S: Storage> Drop for OwnTurn<'_, S> {
    fn drop(&mut self) {
        self.worker.engine().end_turn(&self.turn);
    }
}

/// Loads that the engine waits for. Without an answer, as after a panic, they count as failed: other requests then load
/// the tables themselves.
struct Loads<'a> {
    engine: &'a Engine,
    loads: VecDeque<TableLoad>,
}

impl Drop for Loads<'_> {
    fn drop(&mut self) {
        self.loads.iter().for_each(|load| self.engine.table_failed(load));
    }
}

impl<S: Storage> Drop for Worker<S> {
    /// After a panic a request may have ended in the middle of a change, and its epoch never ends. Then the disk fails, so
    /// that no other thread waits for what this one has left undone.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.engine().fail();
        }
    }
}

impl<S: Storage> Worker<S> {
    /// `None` if the disk has reached its limit of workers.
    pub fn new(shared: Arc<Shared<S>>, driver: Rc<Driver<S::Queue>>) -> Option<Rc<Self>> {
        let epochs = RefCell::new(shared.engine.epochs().register()?);
        let (stop_waiting, clears_past_end, waiting) = (Cell::default(), Cell::default(), Cell::new(0));
        let failures = Arc::clone(&shared.failures);
        let work = WorkMeter::new(&shared);
        Some(Rc::new(Worker {
            shared,
            driver,
            epochs,
            stop_waiting,
            clears_past_end,
            waiting,
            failures,
            work,
        }))
    }

    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    pub fn enter(&self) -> Epoch {
        self.epochs.borrow_mut().enter()
    }

    pub fn exit(&self, epoch: Epoch) {
        self.epochs.borrow_mut().exit(epoch);
    }

    /// Refuses a range past the end that a shrink has set since the caller checked it. The request must be in an epoch.
    pub fn check_end(&self, range: Option<ByteRange>) -> Result<(), RequestError> {
        // Acquire, after the load of the epoch: docs/concurrency.md, "A disk that shrinks".
        let limit = self.shared.limit.load(Ordering::Acquire);
        match range {
            Some(range) if range.end() > limit && !self.clears_past_end.get() => Err(RequestError::PastEnd),
            _ => Ok(()),
        }
    }

    /// A turn for clusters, for a plan that may need some.
    pub fn turn(&self) -> OwnTurn<'_, S> {
        OwnTurn { worker: self, turn: Turn::default() }
    }

    /// Asks the engine until it has an answer, doing what it says meanwhile.
    pub async fn ask<T>(
        &self,
        question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, RequestError> {
        self.ask_in_turn(&Turn::default(), question).await
    }

    /// The same for a question with a turn.
    pub async fn ask_in_turn<T>(
        &self,
        turn: &Turn,
        mut question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, RequestError> {
        loop {
            let answer = poll_fn(|context| match question(self.engine(), context.waker()) {
                Ok(Answer::Wait) => Poll::Pending,
                other => Poll::Ready(other),
            })
            .await;
            match answer {
                Ok(Answer::Ready(value)) => {
                    self.shared.note_answer();
                    return Ok(value);
                }
                Ok(Answer::Wait) => {}
                // Boxed: these are rare, and otherwise every future that asks would contain them. The last three ask
                // the engine themselves, but never for the job that they carry out.
                Ok(Answer::Load(loads)) => Box::pin(self.load_tables(loads)).await?,
                Ok(Answer::Allocate(places)) => Box::pin(self.allocate_tables(places)).await?,
                Ok(Answer::Crowded) => return Err(RequestError::Crowded),
                Ok(Answer::Reserve) => Box::pin(self.reserve(turn)).await?,
                Ok(Answer::Flush) => Box::pin(self.flush()).await?,
                Ok(Answer::Table(slot)) => Box::pin(self.make_table(slot)).await?,
                Err(error) => return Err(Box::pin(self.judge(error)).await),
            }
        }
    }

    /// Handles an error of the engine: damage to the top image stops all writing and is recorded in its header.
    async fn judge(&self, error: EngineError) -> RequestError {
        if error.is_top_corruption() && !self.shared.read_only && !self.engine().has_failed() {
            self.engine().fail();
            let path = shown(&self.shared.layers[0].path);
            error!(%path, %error, "the image is corrupt: it is marked so, and writes are refused from now on");
            if let Err(marking) = self.shared.mark_corrupt(&self.driver).await {
                error!(%path, error = %marking, "the image could not be marked corrupt");
            }
        }
        error.into()
    }

    /// Reads table slices and hands them to the engine. The engine gets an answer for each of them, whatever fails.
    pub async fn load_tables(&self, loads: Vec<TableLoad>) -> Result<(), RequestError> {
        let mut result = Ok(());
        let mut left = Loads { engine: self.engine(), loads: loads.into() };
        while !left.loads.is_empty() {
            let piece = left.loads.iter().take(LOADS_AT_ONCE);
            let started: Vec<_> = piece.map(|load| self.driver.run(self.load_operation(load))).collect();
            for outcome in started {
                let (ended, mut parts) = outcome.await;
                let load = left.loads.pop_front().expect("each outcome is that of a load");
                match (ended, parts.pop()) {
                    (Ok(()), Some(Part::Owned(buffer))) => {
                        self.engine().table_loaded(&load, buffer.as_slice().into());
                        self.driver.pool.give(buffer);
                    }
                    (ended, _) => {
                        self.engine().table_failed(&load);
                        if !load.ahead {
                            result = result.and(ended.and(Err(Errno::EIO)));
                        }
                    }
                }
            }
        }
        result.map_err(RequestError::io("reading a table"))
    }

    fn load_operation(&self, load: &TableLoad) -> Operation {
        let mut operation = Operation::bare(self.shared.file(load.file).id, Kind::Read, load.offset.0);
        operation.parts.push(Part::Owned(self.buffer(load.length)));
        operation
    }

    /// A buffer from the pool.
    pub fn buffer(&self, length: usize) -> AlignedBuf {
        self.driver.pool.take(length)
    }
}
