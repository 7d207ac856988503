//! Resizes the disk of a rig: in use, step by step between the requests, or while it is closed.

use std::path::Path;
use std::time::Duration;

use disk::change::{ChangeError, ChangeRefusal};
use disk::resize::{NewSize, ResizeError, Shrinking, resize};

use super::Rig;
use crate::journal::{Deed, Op};
use crate::shape::TOP;
use crate::stamp::SECTOR;

impl Rig {
    /// Begins to resize the disk in use. Until it ends no request reaches past the smaller size.
    pub(super) fn begin_resize(&mut self, sectors: u64) {
        if !self.is_possible(Deed::Resize(sectors)) {
            return;
        }
        let index = self.journal.submit(Op::Live(sectors), 0, true, self.world.moment());
        self.journal.sectors = self.journal.sectors.min(sectors);
        let disk = self.disk.as_ref().expect("it is open");
        let begun = disk.resizing(NewSize::Of(sectors * SECTOR), Shrinking::Accepted).expect("it begins");
        self.resizing = Some((index, begun));
    }

    pub(super) fn poll_resizing(&mut self) {
        let Some((index, resizing)) = &mut self.resizing else { return };
        let (index, outcome) = (*index, resizing.poll());
        resizing.wait(Some(Duration::ZERO));
        self.note_reserved();
        let Some(outcome) = outcome else { return };
        self.resizing = None;
        self.journal.end(index, outcome.is_ok(), self.world.moment());
        self.journal.sectors = self.disk.as_ref().expect("it is open").size() / SECTOR;
        self.stalled = Duration::ZERO;
        if let Err(error) = outcome {
            assert!(bares_backing(&error), "the disk in use is not resized: {error}");
        }
    }

    pub(super) fn resize(&self, sectors: u64) -> bool {
        let (size, options) = (NewSize::Of(sectors * SECTOR), self.shape.options());
        match resize(self.world.storage(), Path::new(TOP), size, Shrinking::Accepted, &options) {
            Ok(_) => true,
            Err(error) if bares_backing(&error) => false,
            Err(error) => panic!("to {sectors} sectors: {error}"),
        }
    }
}

/// True if version 2 cannot hide a longer backing file.
fn bares_backing(error: &ResizeError) -> bool {
    use ChangeRefusal::BackingShowsThrough;
    matches!(error, ResizeError::Change(ChangeError::Refused { source: BackingShowsThrough { .. }, .. }))
}
