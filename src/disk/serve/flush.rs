//! Flush: leads a cut of the metadata to disk, stage by stage, or waits for the worker that leads one.
//!
//! The engine decides the order (docs/durability.md). This file does the writes and the fdatasyncs, and judges their
//! failures.

use std::future::poll_fn;
use std::task::Poll;

use engine::{Allocation, FlushCut, FlushStep, HeaderSwitch, Stage, TableWrite};
use names::shown;
use storage::{Errno, FileId, Kind, Operation, Part, Storage};
use tracing::{debug, error};

use crate::bounds::CUT_WRITES_AT_ONCE as WRITES_AT_ONCE;
use crate::error::{RequestError, is_no_space};
use crate::rules::{self, Awaited, Synced, needs_sync};
use crate::runtime::driver::Outcome;
use crate::serve::worker::Worker;

/// The failure of a cut.
enum Failure {
    /// No space: nothing is broken, and the next flush tries the cut again.
    NoSpace(Stage, Errno),
    /// The disk must not be written any more.
    Fatal(&'static str, Errno),
}

impl Failure {
    fn of_write(stage: Stage, source: Errno) -> Self {
        if rules::may_write_on(is_no_space(source)) {
            Failure::NoSpace(stage, source)
        } else {
            Failure::Fatal("writing metadata", source)
        }
    }
}

impl<S: Storage> Worker<S> {
    /// Makes everything acknowledged so far durable.
    pub async fn flush(&self) -> Result<(), RequestError> {
        if self.shared.read_only {
            return Ok(());
        }
        if !self.shared.is_qcow2() {
            return self.flush_raw().await;
        }
        let ticket = self.engine().begin_flush()?;
        loop {
            let step = poll_fn(|context| match self.engine().plan_flush(ticket, context.waker()) {
                Ok(FlushStep::Wait) => Poll::Pending,
                other => Poll::Ready(other),
            })
            .await;
            match step? {
                FlushStep::Done => return Ok(()),
                FlushStep::Wait => {}
                FlushStep::Lead(cut) => self.lead(cut).await?,
            }
        }
    }

    async fn flush_raw(&self) -> Result<(), RequestError> {
        if self.engine().has_failed() {
            return Err(engine::EngineError::Failed.into());
        }
        let result = self.driver.run_bare(Operation::bare(self.shared.top_file(), Kind::Sync, 0)).await;
        if let Err(source) = result {
            self.fail("fdatasync", source);
            return Err(RequestError::Io { action: "fdatasync", source });
        }
        Ok(())
    }

    fn fail(&self, action: &'static str, source: Errno) {
        self.engine().fail();
        let path = shown(&self.shared.layers[0].path);
        error!(%path, what = action, error = %source, "the disk has failed: writes and flushes are refused from now on");
    }

    async fn lead(&self, cut: FlushCut) -> Result<(), RequestError> {
        match self.write_cut(&cut).await {
            Ok(()) => {
                self.engine().commit_cut(&cut);
                self.shared.note_cut();
                Ok(())
            }
            Err(Failure::NoSpace(stage, source)) => {
                self.engine().fail_cut(&cut, stage);
                Err(RequestError::Io { action: "writing metadata", source })
            }
            Err(Failure::Fatal(action, source)) => {
                self.fail(action, source);
                // Wakes the flushes that wait for this cut; they find that the disk has failed.
                self.engine().fail_cut(&cut, Stage::Two);
                Err(RequestError::Io { action, source })
            }
        }
    }

    async fn write_cut(&self, cut: &FlushCut) -> Result<(), Failure> {
        let lengthened = match cut.lengthen {
            Some(length) => self.mark_end(length).await,
            None => false,
        };
        if lengthened || cut.length_first {
            self.sync_after(Synced::Length).await?;
        }
        if cut.links_alone && !self.shared.has_data_file() {
            self.write_stage(Stage::Two, &cut.stage2).await?;
            return self.sync_after(Synced::Links).await;
        }
        if !cut.stage0.is_empty() {
            self.switch_header_in(Stage::Zero, cut).await?;
            self.write_stage(Stage::Zero, &cut.stage0).await?;
            self.sync_after(Synced::Refblocks).await?;
        }
        self.write_stage(Stage::One, &cut.stage1).await?;
        self.switch_header_in(Stage::One, cut).await?;
        // Always sync: this also makes the guest's data durable, before any link to it.
        let (data, tables) = (self.shared.data_file().id, self.shared.top_file());
        let alone = cut.stage1.is_empty() && cut.stage2.is_empty();
        let syncs = [(data, Synced::DataFile { alone }), (tables, Synced::Counts { alone })];
        // Where the data is in the image's own file, the second sync is enough.
        let syncs = &syncs[usize::from(!self.shared.has_data_file())..];
        self.sync(syncs.iter().filter(|(_, writes)| needs_sync(*writes)).map(|(file, _)| *file)).await?;
        if !cut.stage2.is_empty() {
            self.write_stage(Stage::Two, &cut.stage2).await?;
            self.sync_after(Synced::Links).await?;
        }
        Ok(())
    }

    /// Makes the file end with free clusters while it is in use; true if it does now. Where that fails, for lack of
    /// space or past the largest file size, leaks of a crash are not searched for. The next cut tries again.
    async fn mark_end(&self, length: u64) -> bool {
        let block = u64::from(self.shared.top_image().info.block_size.max(1));
        let length = length.next_multiple_of(block);
        let grown = self.grow_file(length).await;
        if let Err(error) = &grown {
            debug!(%error, length, "the image file cannot end with free clusters");
        }
        self.engine().file_was_lengthened(grown.is_ok().then_some(length));
        grown.is_ok()
    }

    async fn write_stage(&self, stage: Stage, writes: &[TableWrite]) -> Result<(), Failure> {
        for some in writes.chunks(WRITES_AT_ONCE) {
            // Damage that was found meanwhile stops all writing.
            if self.engine().has_failed() {
                return Err(Failure::Fatal("writing metadata", Errno::EIO));
            }
            let result = self.driver.run_all(some.iter().map(|write| self.table_write(write))).await;
            result.map_err(|source| Failure::of_write(stage, source))?;
        }
        Ok(())
    }

    /// Starts the early commit of a new cluster, if writing its link together with its data is better than at the
    /// next flush.
    pub fn start_early_link<'a>(
        &'a self,
        new: &mut Allocation,
    ) -> Option<impl Future<Output = Outcome> + use<'a, S>> {
        let write = self.engine().link_early(new)?;
        Some(self.driver.run(self.table_write(&write)))
    }

    /// Judges the outcome of an early commit: a failure counts as in a flush. If only space is lacking, the next
    /// flush tries again.
    pub fn judge_early_link(
        &self,
        new: &mut Allocation,
        (ended, parts): Outcome,
    ) -> Result<(), RequestError> {
        self.driver.recycle(parts);
        let Err(source) = ended else { return Ok(()) };
        let result = match Failure::of_write(Stage::Two, source) {
            Failure::NoSpace(..) => Ok(()),
            Failure::Fatal(action, source) => {
                self.fail(action, source);
                Err(RequestError::Io { action, source })
            }
        };
        if rules::waits_for(Awaited::FailedLink) {
            self.engine().link_failed(new);
        }
        result
    }

    /// Points the header at the refcount table's new location, if the cut moves it and this is the stage for that.
    async fn switch_header_in(&self, stage: Stage, cut: &FlushCut) -> Result<(), Failure> {
        match cut.header {
            Some(switch) if rules::header_stage() == stage => self.switch_header(switch).await,
            _ => Ok(()),
        }
    }

    /// Points the header at the refcount table's new location, which is durable already.
    async fn switch_header(&self, switch: HeaderSwitch) -> Result<(), Failure> {
        let header = self.shared.header.as_ref().expect("a writable qcow2 image has its header sector");
        let change = header.change().await;
        let (offset, clusters) = (switch.refcount_table_offset, switch.refcount_table_clusters);
        let write =
            change.write(self.shared.top_image(), qcow2::position::patch_refcount_table(offset, clusters));
        self.driver.run_all([write]).await.map_err(|source| Failure::of_write(Stage::One, source))
    }

    fn table_write(&self, write: &TableWrite) -> Operation {
        let mut buffer = self.buffer(write.bytes.len());
        buffer.as_mut_slice().copy_from_slice(&write.bytes);
        let mut operation = Operation::bare(self.shared.top_file(), Kind::Write, write.offset.0);
        operation.parts.push(Part::Owned(buffer));
        operation
    }

    async fn sync_after(&self, writes: Synced) -> Result<(), Failure> {
        if needs_sync(writes) { self.sync([self.shared.top_file()]).await } else { Ok(()) }
    }

    /// After a failed fdatasync the contents of the disk are unknown: the kernel may have dropped pages that it could
    /// not write.
    async fn sync(&self, files: impl IntoIterator<Item = FileId>) -> Result<(), Failure> {
        let syncs = files.into_iter().map(|file| Operation::bare(file, Kind::Sync, 0));
        let result = rules::judged_sync(self.driver.run_all(syncs).await);
        result.map_err(|source| Failure::Fatal("fdatasync", source))
    }
}
