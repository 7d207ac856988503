//! Closes the disk of a rig as a daemon does before another process may have the image, and uses it on if that fails.

use disk::OpenError;
use storage_sim::Fault;

use super::{QUEUE_DEPTH, QUEUES, Rig};

/// How a release ended.
pub struct Release {
    /// The disk is closed, or why it is not. Then it is used on.
    pub result: Result<(), OpenError>,
    /// The fault was met.
    pub hit: bool,
}

impl Rig {
    /// Closes the disk while a fault waits for it, and keeps it open. Afterwards the host works again. Nothing may be in
    /// flight.
    ///
    /// # Panics
    /// If the disk cannot be used on after a failed close.
    pub fn release(&mut self, fault: Fault) -> Release {
        assert_eq!(self.in_flight(), 0, "requests are waited for");
        self.exhaust();
        self.queues.clear();
        self.keeper = None;
        let fault = self.world.inject(fault);
        let disk = self.disk.as_mut().expect("it is open");
        let result = disk.finish();
        let hit = self.world.hits(fault) > 0;
        self.world.withdraw_faults();
        if result.is_err() {
            self.queues = (0..QUEUES).map(|_| disk.queue(QUEUE_DEPTH).expect("a queue")).collect();
            self.keeper = self.shape.is_qcow2().then(|| disk.keeper().expect("a housekeeper"));
        }
        Release { result, hit }
    }

    /// True if the disk refuses writes for good.
    pub fn has_failed(&self) -> bool {
        self.disk.as_ref().expect("it is open").has_failed()
    }
}
