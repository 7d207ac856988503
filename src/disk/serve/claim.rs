//! Claims: the sole right of a request to change the mappings of a range, until it is dropped.
//!
//! Owns the wait for it. The engine decides the order (docs/concurrency.md).

use std::future::poll_fn;
use std::task::Poll;

use engine::ClaimId;
use qcow2::GuestOffset;
use storage::Storage;

use crate::range::ByteRange;
use crate::rules;
use crate::serve::worker::Worker;

/// A claim on guest clusters, released when dropped.
#[must_use]
pub(crate) struct Claim<'a, S: Storage> {
    worker: &'a Worker<S>,
    id: ClaimId,
}

impl<S: Storage> Drop for Claim<'_, S> {
    fn drop(&mut self) {
        if rules::releases_claim(self.worker.stop_waiting.get()) {
            self.worker.engine().release_claim(self.id);
        }
    }
}

impl<S: Storage> Worker<S> {
    /// Waits for the sole right to change the mapping of a range. The caller must hold nothing else.
    pub async fn claim(&self, range: ByteRange) -> Claim<'_, S> {
        let id = self.engine().claim(GuestOffset(range.offset), range.length);
        let claim = Claim { worker: self, id };
        poll_fn(
            |context| {
                if self.engine().claim_held(id, context.waker()) { Poll::Ready(()) } else { Poll::Pending }
            },
        )
        .await;
        claim
    }
}
