//! Jobs that a plan may need first: reserving clusters and creating L2 tables.

use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Duration;

use engine::{HeldBack, ReservePlan, TablePlace, TableSlot, Turn};
use qcow2::HostRange;
use storage::{Errno, Kind, Operation, Storage};

use crate::error::RequestError;
use crate::serve::worker::Worker;

/// The first pause between checks whether freed clusters are out of reach of all I/O; each pause is twice the one
/// before.
const GIVE_BACK_PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest pause.
const GIVE_BACK_PAUSE_MAX: Duration = Duration::from_millis(50);

impl<S: Storage> Worker<S> {
    /// Makes freed clusters ready for use when the host has no space; false if there are none. The caller is in no
    /// epoch, as that would delay the reclaim. `all`: count also clusters that were taken for failed writes.
    pub async fn make_space(&self, all: bool) -> bool {
        let before = self.engine().held_back(Waker::noop());
        if before.clusters == 0 || (before.freed == 0 && !all) {
            return false;
        }
        let goal = before.given_back + before.clusters;
        // An error is not reported here: a retry of the request meets it again.
        let done =
            |held: &HeldBack| held.given_back >= goal || held.clusters == 0 || self.must_stop_waiting();
        self.give_back_until(done).await.is_ok()
    }

    /// Gives freed space back until the held-back space is within its bound. The caller holds nothing: no claim, no
    /// epoch.
    pub async fn relieve(&self) -> Result<(), RequestError> {
        self.give_back_until(|held| !held.crowded || self.engine().has_failed()).await
    }

    /// Flushes and reclaims until `done` accepts the held-back space.
    async fn give_back_until(&self, done: impl Fn(&HeldBack) -> bool) -> Result<(), RequestError> {
        let held_back = || self.engine().held_back(Waker::noop());
        let mut pause = GIVE_BACK_PAUSE_MIN;
        while !done(&held_back()) {
            if held_back().uncut {
                self.flush().await?;
            }
            while self.reclaim_some().await? {}
            // Either older I/O is still under way there, or another thread reclaims.
            self.await_reclaim(pause, &done).await;
            pause = (pause * 2).min(GIVE_BACK_PAUSE_MAX);
        }
        Ok(())
    }

    /// Waits for a moment, or until `done` accepts the held-back space after a reclaim.
    async fn await_reclaim(&self, pause: Duration, done: impl Fn(&HeldBack) -> bool) {
        let mut alarm = self.driver.alarm(self.driver.now() + pause);
        poll_fn(|context| {
            if done(&self.engine().held_back(context.waker())) || alarm.is_over() {
                self.engine().stop_waiting(context.waker());
                return Poll::Ready(());
            }
            alarm.wake(context.waker());
            Poll::Pending
        })
        .await;
    }

    /// Reserves a window of clusters when it is this request's turn, or waits until it is served from another's. The
    /// window is small where the host has no room for a larger.
    pub async fn reserve(&self, turn: &Turn) -> Result<(), RequestError> {
        loop {
            match self.reserve_window(turn).await {
                Err(error) if error.is_no_space() && self.engine().shrink_window() => {}
                ended => return ended,
            }
        }
    }

    async fn reserve_window(&self, turn: &Turn) -> Result<(), RequestError> {
        let plan = self.ask(|engine, waker| engine.plan_reserve(turn, waker)).await?;
        match plan {
            Some(plan) => self.carry_out_reserve(plan).await,
            None => Ok(()),
        }
    }

    /// Makes the file long enough for a reservation, has the host allocate its metadata, and commits or aborts it.
    pub async fn carry_out_reserve(&self, mut plan: ReservePlan) -> Result<(), RequestError> {
        let mut result = Ok(());
        // The file always ends with a block of its file system: see `fill_last_block`.
        let block = u64::from(self.shared.top_image().info.block_size.max(1));
        plan.file_length = plan.file_length.map(|length| length.next_multiple_of(block));
        let mut lengthened = None;
        if let Some(length) = plan.file_length {
            result = self.grow_file(length).await;
            lengthened = result.is_ok().then_some(length);
        }
        for range in &plan.metadata {
            if result.is_ok() {
                result = self.allocate(*range).await;
            }
        }
        match result {
            Ok(()) => self.engine().commit_reserve(plan),
            Err(_) => self.engine().abort_reserve(plan, lengthened),
        }
        result.map_err(RequestError::io("growing the image file"))
    }

    /// Extends the image file, if it is shorter. No other thread sets its length: the caller holds the reservation,
    /// or leads a cut that takes the reservation's place.
    pub async fn grow_file(&self, length: u64) -> Result<(), Errno> {
        let top = self.shared.top_file();
        // Never shorten: the file may be longer than what is in use (an earlier crash).
        if self.shared.storage.length(top).map_err(|_| Errno::EIO)? >= length {
            return Ok(());
        }
        self.driver.run_bare(Operation::bare(top, Kind::SetLength, length)).await
    }

    /// Has the host allocate metadata, where its file system can. Elsewhere the write of the table finds that there
    /// is no space.
    pub async fn allocate(&self, range: HostRange) -> Result<(), Errno> {
        let kind = Kind::Allocate { length: range.length };
        match self.driver.run_bare(Operation::bare(self.shared.top_file(), kind, range.offset.0)).await {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Has the host allocate pieces of tables that are about to be changed.
    pub async fn allocate_tables(&self, places: Vec<TablePlace>) -> Result<(), RequestError> {
        for place in places {
            let range = HostRange::new(place.offset, place.length);
            self.allocate(range).await.map_err(RequestError::io("allocating a piece of a table"))?;
            self.engine().table_allocated(&place);
        }
        Ok(())
    }

    /// Gives the top image an L2 table of its own.
    pub async fn make_table(&self, slot: TableSlot) -> Result<(), RequestError> {
        let turn = self.turn();
        let plan = self.ask_in_turn(&turn, |engine, waker| engine.plan_table(slot, &turn, waker)).await?;
        let Some(plan) = plan else {
            return Ok(());
        };
        let mut result = Ok(());
        for range in [plan.link, plan.place] {
            if result.is_ok() {
                result = self.allocate(range).await;
            }
        }
        match result {
            Ok(()) => {
                self.engine().commit_table(plan);
                self.shared.note_change();
                Ok(())
            }
            Err(error) => {
                self.engine().abort_table(plan);
                self.shared.note_change();
                Err(RequestError::Io { action: "allocating an L2 table", source: error })
            }
        }
    }
}
