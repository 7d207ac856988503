//! Events of which no thread reports: found by looking at the disk while a client listens to events.

use std::sync::Arc;

use crate::api::{DiskState, EventData, EventName};
use crate::bounds::WATCH_EVERY;
use crate::events::Hub;
use crate::subject::Subject;

/// What the clients that listen have been told.
#[derive(Debug, Default)]
struct Told {
    failed: bool,
    corrupt: bool,
    waiting: u64,
}

/// Looks for changes for ever, and sleeps while nobody listens. The first client to listen after that is told of all
/// that has happened before.
pub async fn watch(subject: Arc<dyn Subject>, hub: Arc<Hub>) {
    let (mut told, mut clients) = (Told::default(), 0);
    loop {
        let now = hub.is_heard().await;
        if std::mem::replace(&mut clients, now) != now {
            told = Told::default();
        }
        for (event, data) in told.look(&subject.disk(), subject.stats().space_waiting) {
            hub.tell(event, data);
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

impl Told {
    /// The events by which the present state differs from what was told.
    fn look(&mut self, disk: &DiskState, waiting: u64) -> Vec<(EventName, EventData)> {
        let mut events = Vec::new();
        if disk.failed && !self.failed {
            events.push((EventName::DiskFailed, EventData::default()));
        }
        if disk.corrupt && !self.corrupt {
            events.push((EventName::ImageCorrupt, EventData::default()));
        }
        if (waiting == 0) != (self.waiting == 0) {
            events.push((EventName::SpaceWait, EventData { waiting: Some(waiting) }));
        }
        // A disk that is being opened or closed, or is with another process, says nothing of its state.
        if disk.open {
            (self.failed, self.corrupt) = (disk.failed, disk.corrupt);
        }
        self.waiting = waiting;
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Frontend;

    fn disk(open: bool, failed: bool) -> DiskState {
        DiskState {
            filename: "a".to_owned(),
            virtual_size: 512,
            ro: false,
            open,
            failed,
            corrupt: false,
            paused: false,
            frontend: Frontend::Waiting,
            num_queues: 1,
        }
    }

    #[test]
    fn a_failure_is_told_once() {
        let mut told = Told::default();
        let mut failures = |open, failed| {
            let events = told.look(&disk(open, failed), 0);
            events.iter().filter(|(event, _)| *event == EventName::DiskFailed).count()
        };
        assert_eq!(failures(true, false), 0);
        assert_eq!(failures(true, true), 1);
        assert_eq!(failures(true, true), 0);
        assert_eq!(failures(false, false), 0, "a release was tried meanwhile");
        assert_eq!(failures(true, true), 0);
        assert_eq!(failures(true, false), 0, "another disk");
        assert_eq!(failures(true, true), 1);
    }

    #[test]
    fn waits_for_space_are_told_when_they_begin_and_end() {
        let mut told = Told::default();
        let mut waiting =
            |waiting| told.look(&disk(true, false), waiting).pop().map(|(_, data)| data.waiting);
        assert_eq!([0, 3, 5, 0, 0].map(&mut waiting), [None, Some(Some(3)), None, Some(Some(0)), None]);
    }

    /// A subject whose disk has failed.
    struct Failed;

    impl Subject for Failed {
        fn disk(&self) -> DiskState {
            disk(true, true)
        }
        fn chain(&self) -> Result<crate::api::Chain, crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn stats(&self) -> crate::api::Stats {
            crate::api::Stats::default()
        }
        fn set_log_level(&self, _: &str) -> Result<(), crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn flush(&self) -> Result<(), crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn resize(&self, _: crate::api::Resize) -> Result<crate::api::Resized, crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn pause(&self) -> Result<(), crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn resume(&self) {}
        fn snapshot(&self, _: crate::api::Snapshot) -> Result<crate::api::SnapshotTaken, crate::Failure> {
            unreachable!("it is not asked for")
        }
        fn give_up(&self) {}
        fn shut_down(&self) {}
    }

    #[test]
    fn a_client_is_told_what_another_was_told_before_it_left() {
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().build().expect("a runtime");
        runtime.block_on(async {
            let hub = Arc::new(Hub::default());
            let watcher = tokio::spawn(watch(Arc::new(Failed), Arc::clone(&hub)));
            for _ in 0..2 {
                let mut events = hub.listen();
                let patience = std::time::Duration::from_secs(20);
                let event = tokio::time::timeout(patience, events.recv()).await;
                let event = event.expect("it is told").expect("an event");
                assert_eq!(event.event, EventName::DiskFailed);
            }
            watcher.abort();
        });
    }
}
