//! Reclaim: gives the host the space of freed clusters that nothing uses any more, and has the engine free them.
//!
//! The engine decides which clusters these are (docs/durability.md).

use storage::{Errno, Storage};
use tracing::warn;

use crate::bounds::PUNCHES_AT_ONCE;
use crate::error::RequestError;
use crate::rules::{self, Awaited};
use crate::serve::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Gives freed space back until none can be given back now, or the disk is to be closed.
    pub async fn reclaim_until_stopped(&self) -> Result<(), RequestError> {
        while !self.shared.bell.stopped() && self.reclaim_some().await? {}
        Ok(())
    }

    /// Gives some of the freed space back; false if none can be given back now.
    pub async fn reclaim_some(&self) -> Result<bool, RequestError> {
        let Some(plan) = self.ask(|engine, waker| engine.plan_reclaim(waker)).await? else {
            return Ok(false);
        };
        for run in &plan.punches {
            // No request can put an entry back any more: those that knew the clusters as compressed have ended.
            self.shared.inflated.forget(self.shared.images[0], *run);
        }
        let top = self.shared.top_image();
        let mut punched = Vec::with_capacity(plan.punches.len());
        for some in plan.punches.chunks(PUNCHES_AT_ONCE) {
            let started: Vec<_> = some.iter().map(|run| self.start_punch(top, (*run).into())).collect();
            for (whole, operation) in started {
                let result = match operation {
                    Some(operation) if rules::waits_for(Awaited::PunchOfFreed) => operation.await.0,
                    _ => Ok(()),
                };
                if let Err(error) = result
                    && error != Errno::EOPNOTSUPP
                {
                    warn!(%error, "freed space could not be given back to the host; it is reused all the same");
                }
                punched.push(whole && result.is_ok());
            }
        }
        let frees = plan.frees();
        self.engine().commit_reclaim(plan, &punched);
        if frees {
            self.shared.space.reclaimed();
        }
        Ok(true)
    }
}
