//! The log of failed requests: the guest gets no reason, the log does.
//!
//! Once some requests fail, the guest decides how many do, and must not fill the host's disk with log lines. So the
//! number of lines in a period is bounded; other failures are only counted. The bound holds for all queues of a disk
//! together: a guest may have its queues start anew as often as it likes. Has no clock of its own.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

use crate::error::RequestError;
use block::RequestId;

/// The most lines in a period.
const LINES_MAX: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// The failures of a disk's requests.
#[derive(Default)]
pub(crate) struct FailureLog {
    /// A leaf.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When the period began.
    began: Option<Instant>,
    /// Lines in it.
    lines: u32,
    /// Failures since the last line.
    unlogged: u64,
}

impl FailureLog {
    /// Records the result of a request.
    pub fn note(&self, id: RequestId, result: &Result<(), RequestError>, now: impl FnOnce() -> Instant) {
        let Err(error) = result else { return };
        match self.line(now()) {
            Some(0) => warn!(request = id.0, %error, "a request failed"),
            Some(unlogged) => {
                warn!(request = id.0, %error, unlogged, "a request failed; failures before it were not logged");
            }
            None => {}
        }
    }

    /// Whether another line is due; if so, the number of failures before it that were not logged.
    fn line(&self, now: Instant) -> Option<u64> {
        let mut state = self.state();
        if state.began.is_none_or(|began| now.saturating_duration_since(began) >= PERIOD) {
            (state.began, state.lines) = (Some(now), 0);
        }
        if state.lines == LINES_MAX {
            state.unlogged += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.unlogged))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FailureLog {
    fn drop(&mut self) {
        let unlogged = self.state().unlogged;
        if unlogged > 0 {
            warn!(unlogged, "requests failed and were not logged");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use storage::Storage as _;
    use storage_sim::{SimOptions, SimWorld};

    use super::*;
    use crate::disk::Disk;
    use crate::options::{DiskOptions, Format};
    use crate::runtime::driver::Driver;
    use crate::serve::worker::Worker;

    #[test]
    fn failures_beyond_the_bound_are_counted_and_not_logged() {
        let log = FailureLog::default();
        let start = Instant::now();
        for _ in 0..LINES_MAX {
            assert_eq!(log.line(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(log.line(start + PERIOD / 2), None);
        }
        assert_eq!(log.line(start + PERIOD), Some(1000));
        assert_eq!(log.line(start + PERIOD), Some(0));
    }
    /// A guest that turns its write cache on and off starts all its queues anew each time.
    #[test]
    fn a_queue_that_starts_anew_has_no_lines_of_its_own() {
        let world = SimWorld::new(1, SimOptions::calm());
        world.add_file("a", &[0; 4096]);
        let options = DiskOptions { format: Format::Raw, ..DiskOptions::default() };
        let disk = Disk::open_unkept(world.storage(), Path::new("a"), &options).expect("it opens");
        let now = Instant::now();
        let lines = |_| {
            let driver = Driver::new(disk.shared.storage.queue(1).expect("a queue"));
            let worker = Worker::new(Arc::clone(&disk.shared), driver).expect("a worker");
            (0..LINES_MAX).filter_map(|_| worker.failures.line(now)).count()
        };
        let lines: Vec<_> = (0..3).map(lines).collect();
        assert_eq!(lines, [LINES_MAX as usize, 0, 0]);
    }
}
