//! Events of which no thread reports: found by looking at the disk while a client listens to events.

use std::sync::Arc;

use crate::api::{EventData, EventName};
use crate::bounds::WATCH_EVERY;
use crate::events::Hub;
use crate::subject::Subject;

/// What the last look has found.
#[derive(Default)]
struct Seen {
    failed: bool,
    corrupt: bool,
    waiting: u64,
}

/// Looks for changes for ever, and sleeps while nobody listens. What happened meanwhile is reported at the next look.
pub async fn watch(subject: Arc<dyn Subject>, hub: Arc<Hub>) {
    let mut seen = Seen::default();
    loop {
        hub.is_heard().await;
        seen.look(&*subject, &hub);
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

impl Seen {
    fn look(&mut self, subject: &dyn Subject, hub: &Hub) {
        let (disk, waiting) = (subject.disk(), subject.stats().space_waiting);
        if disk.failed && !self.failed {
            hub.tell(EventName::DiskFailed, EventData::default());
        }
        if disk.corrupt && !self.corrupt {
            hub.tell(EventName::ImageCorrupt, EventData::default());
        }
        if (waiting == 0) != (self.waiting == 0) {
            hub.tell(EventName::SpaceWait, EventData { waiting: Some(waiting) });
        }
        *self = Seen { failed: disk.failed, corrupt: disk.corrupt, waiting };
    }
}
