//! The slow path: serves what the fast path does not, as an async function on the thread's executor.
//!
//! Owns the order of a request's steps, and its retries. It is retried after space was made, after a wait for
//! space, and after too much freed space was held back. How each kind of request is carried out is in a file of its
//! own.

use std::cell::Cell;

use engine::Epoch;
use storage::guest::guest_len;
use storage::{GuestSlice, Storage};

use crate::error::RequestError;
use crate::range::ByteRange;
use crate::rules;
use crate::serve::request::range_of;
use crate::serve::space::Waiting;
use crate::serve::work::Work;
use crate::serve::worker::Worker;
use block::Request;

/// How often a request that finds no space is tried again at once, as long as others free some.
const SPACE_TRIES: u32 = 4;

impl<S: Storage> Worker<S> {
    /// Serves a request off the fast path. If it finds no space, it is retried after freed space was made ready. Then
    /// it is retried after each wait, if requests wait for space. With `write_through` it ends with a flush.
    pub async fn serve(
        &self,
        epoch: Epoch,
        request: Request,
        slices: &[GuestSlice],
        work: Work,
    ) -> Result<(), RequestError> {
        if request == Request::Flush {
            // It uses nothing that it could have looked up.
            self.exit(epoch);
            return Box::pin(self.flush_patiently()).await;
        }
        let mut result = self.carry_out(epoch, request, slices, work).await;
        if self.lacks_space(&request, &result) {
            result = Box::pin(self.find_space(request, slices, result)).await;
        }
        result?;
        if request.is_write_through() { Box::pin(self.flush_patiently()).await } else { Ok(()) }
    }

    /// Retries a request that found no space: at once whenever freed space was given back meanwhile, and after each
    /// wait, if requests wait for space.
    async fn find_space(
        &self,
        request: Request,
        slices: &[GuestSlice],
        mut result: Result<(), RequestError>,
    ) -> Result<(), RequestError> {
        let mut waiting = None;
        // At first all clusters that are held back count. Later those of failed writes do not: they would be this
        // request's own.
        let mut all = true;
        loop {
            let mut tries = 0;
            while self.lacks_space(&request, &result) && tries < SPACE_TRIES && self.make_space(all).await {
                (tries, all) = (tries + 1, false);
                result = self.try_again(request, slices).await;
            }
            if !self.waits_after(&request, &result) {
                return result;
            }
            let waiting = waiting.get_or_insert_with(|| self.shared.space.begin(&self.driver));
            if !self.wait_for_space(waiting).await {
                return result.map_err(RequestError::give_up);
            }
            result = self.try_again(request, slices).await;
        }
    }

    async fn try_again(&self, request: Request, slices: &[GuestSlice]) -> Result<(), RequestError> {
        let work = self.count_work(&request, slices);
        self.carry_out(self.enter(), request, slices, work).await
    }

    /// Counts the work of a request, until the result is dropped.
    pub fn count_work(&self, request: &Request, slices: &[GuestSlice]) -> Work {
        self.work.count(self.engine(), request, range_of(request, slices))
    }

    /// Carries out the request, not yet durably. Where too much freed space is held back, the request gives up its
    /// claim and epoch until there is room, and then continues. Its work ends here: what waits for space has none.
    async fn carry_out(
        &self,
        mut epoch: Epoch,
        request: Request,
        slices: &[GuestSlice],
        _work: Work,
    ) -> Result<(), RequestError> {
        let done = Cell::new(0);
        loop {
            match self.carry_on(epoch, request, slices, &done).await {
                Err(RequestError::Crowded) => Box::pin(self.relieve()).await?,
                ended => return ended,
            }
            epoch = self.enter();
        }
    }

    /// Carries out as much of the request as there is room for. The epoch ends once the request no longer uses what
    /// it looked up.
    async fn carry_on(
        &self,
        epoch: Epoch,
        request: Request,
        slices: &[GuestSlice],
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        if let Err(error) = self.check_end(range_of(&request, slices)) {
            self.exit(epoch);
            return Err(error);
        }
        let result = match request {
            // Boxed: a future has the size of its largest branch, and is moved as often as it is nested.
            Request::Read { offset } => Box::pin(self.read(offset, slices)).await,
            Request::Write { offset, .. } => {
                let claim = self.claim(ByteRange::new(offset, guest_len(slices) as u64)).await;
                let result = Box::pin(self.write_or_zero(offset, slices)).await;
                drop(claim);
                result
            }
            Request::Discard { offset, length, .. } => {
                self.discard(ByteRange::new(offset, length), done).await
            }
            Request::WriteZeroes { offset, length, unmap, .. } => {
                self.write_zeroes(ByteRange::new(offset, length), unmap, done).await
            }
            Request::Flush => unreachable!("a flush is served by itself"),
        };
        self.exit(epoch);
        result
    }

    /// Flushes. If there is no space, it retries after a reclaim, and after each wait if requests wait for space.
    async fn flush_patiently(&self) -> Result<(), RequestError> {
        let mut result = self.flush().await;
        if self.lacks_space(&Request::Flush, &result) {
            // Reclaim all that needs no cut.
            while self.reclaim_some().await? {}
            result = self.flush().await;
        }
        if self.waits_after(&Request::Flush, &result) {
            let mut waiting = self.shared.space.begin(&self.driver);
            while self.waits_after(&Request::Flush, &result) {
                if !self.wait_for_space(&mut waiting).await {
                    return result.map_err(RequestError::give_up);
                }
                result = self.flush().await;
            }
        }
        result
    }

    /// Waits until a retry is worthwhile; false if the request must not wait any more.
    async fn wait_for_space(&self, waiting: &mut Waiting<'_, S::Queue>) -> bool {
        self.waiting.set(self.waiting.get() + 1);
        let go_on = waiting.pause(|| self.must_stop_waiting()).await;
        self.waiting.set(self.waiting.get() - 1);
        go_on
    }

    /// True if requests no longer wait for space, because their queue is being stopped.
    pub fn must_stop_waiting(&self) -> bool {
        rules::stops_waiting(self.stop_waiting.get())
    }

    /// Whether a request with this result may succeed once there is space.
    fn lacks_space(&self, request: &Request, result: &Result<(), RequestError>) -> bool {
        let no_space = result.as_ref().is_err_and(RequestError::is_no_space);
        let reads = matches!(request, Request::Read { .. });
        no_space && !reads && !self.engine().has_failed()
    }

    /// Whether a request with this result is to wait for space.
    fn waits_after(&self, request: &Request, result: &Result<(), RequestError>) -> bool {
        self.shared.space.waits() && self.lacks_space(request, result)
    }
}
