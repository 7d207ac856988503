//! Discard and write zeroes: whole clusters and subclusters by metadata, their ragged ends as data.

use std::cell::Cell;
use std::task::Waker;

use engine::mutation::{Mutation, active};
use engine::{Answer, Source, TableLoad, ZeroMode, Zeroed};
use qcow2::{GuestOffset, HostOffset};
use storage::{Errno, Kind, Operation, Storage};
use tracing::debug;

use crate::bounds::{PUNCHES_AT_ONCE, ROUNDS_AT_ONCE};
use crate::error::RequestError;
use crate::layer::DiskFile;
use crate::options::Discards;
use crate::serve::worker::Worker;
use crate::serve::write::Payload;

/// The result of an attempt to zero a range at once.
pub(crate) enum Tried {
    /// The range is zeroed.
    Done,
    /// These tables must be loaded first; the engine has recorded that they will be.
    Lacks(Vec<TableLoad>),
    /// The slow path must do it.
    Not,
}

impl<S: Storage> Worker<S> {
    /// Discards or zeroes a range of one cluster without waiting, by a change of tables in memory: all of it or
    /// nothing. A longer range might be done in part, and then repeated after another request's write.
    pub fn try_zero(&self, offset: u64, length: u64, mode: ZeroMode) -> Tried {
        let unit = self.engine().unit();
        let one = length > 0 && offset / unit == (offset + length - 1) / unit;
        // Clusters that keep their location must be emptied before the claim is released.
        let empties =
            mode != ZeroMode::Keep && (self.shared.policy.keeps_place || self.shared.has_data_file());
        let by_tables = self.shared.is_qcow2() && self.shared.raw_file().is_none() && !empties;
        if !one || !by_tables || self.whole_granules(offset, length) != (offset, offset + length) {
            return Tried::Not;
        }
        let Some(_claim) = self.try_claim(offset, length) else { return Tried::Not };
        match self.engine().zero(GuestOffset(offset), length, mode, Waker::noop()) {
            Ok(Answer::Ready(Zeroed::Done { bytes, unused })) if bytes == length => {
                debug_assert!(unused.is_empty(), "nothing stays in its place");
                self.shared.asked();
                self.shared.touched();
                Tried::Done
            }
            Ok(Answer::Load(loads)) => Tried::Lacks(loads),
            // A waiter whose waker does nothing is never woken, and blocks no other waiter.
            _ => Tried::Not,
        }
    }

    /// Discards a range: whole granules only, the rest keeps its contents. `done` holds how far the range is done,
    /// and is advanced.
    pub async fn discard(&self, offset: u64, length: u64, done: &Cell<u64>) -> Result<(), RequestError> {
        if self.shared.policy.discards == Discards::Ignore {
            return self.check_writable();
        }
        if !self.shared.is_qcow2() {
            return self.raw_discard(offset, length).await;
        }
        let (start, end) = self.whole_granules(offset, length);
        let start = start.max(done.get());
        if start >= end {
            return self.check_writable();
        }
        if let Some(file) = self.shared.raw_file() {
            return Box::pin(self.raw_view_discard(file, start, end - start)).await;
        }
        let _claim = self.claim(start, end - start).await;
        self.zero_granules(start, end, ZeroMode::Discard, done).await
    }

    /// Makes exactly this range read as zero. `done` holds how far it is done, and is advanced.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: bool,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        let mode = self.shared.policy.mode(unmap);
        if let Some(file) = self.shared.raw_file() {
            return Box::pin(self.raw_zeroes(file, offset, length, mode)).await;
        }
        let start = offset.max(done.get());
        let left = (offset + length).saturating_sub(start);
        let _claim = self.claim(start, left).await;
        self.zero_range(start, left, mode, done).await
    }

    /// As [`Worker::write_zeroes`]; the caller holds a claim on the range, unless the top image is raw.
    pub async fn zero_range(
        &self,
        offset: u64,
        length: u64,
        mode: ZeroMode,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        if let Some(file) = self.shared.raw_file() {
            return Box::pin(self.raw_zeroes(file, offset, length, mode)).await;
        }
        let (start, end) = self.whole_granules(offset, length);
        if start >= end {
            return Box::pin(self.zero_piece(offset, length)).await;
        }
        if offset < start {
            Box::pin(self.zero_piece(offset, start - offset)).await?;
        }
        self.zero_granules(start, end, mode, done).await?;
        let left = (offset + length).saturating_sub(end);
        if left > 0 { Box::pin(self.zero_piece(end, left)).await } else { Ok(()) }
    }

    /// The whole granules (clusters or subclusters) in a range. The disk's last granule counts as whole where the
    /// disk ends.
    fn whole_granules(&self, offset: u64, length: u64) -> (u64, u64) {
        let granule = self.engine().granule();
        let end = offset + length;
        let whole_end = if end == self.engine().size() { end } else { end / granule * granule };
        (offset.next_multiple_of(granule), whole_end)
    }

    async fn zero_granules(
        &self,
        start: u64,
        end: u64,
        mode: ZeroMode,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        let mut at = start;
        let mut rounds = 0_u32;
        while at < end {
            rounds += 1;
            if rounds.is_multiple_of(ROUNDS_AT_ONCE) {
                self.driver.yield_now().await;
            }
            let zeroed = self.ask(|engine, waker| engine.zero(GuestOffset(at), end - at, mode, waker)).await;
            // Also after a failure: part of the range may have been changed before.
            self.shared.touched();
            at += match zeroed? {
                Zeroed::Done { bytes, unused } => {
                    if !self.shared.has_data_file() {
                        self.empty(&unused).await;
                    }
                    bytes
                }
                Zeroed::NeedsData(bytes) => {
                    Box::pin(self.write(at, Payload::Zeros(bytes))).await?;
                    bytes
                }
            };
            if !self.shared.has_data_file() {
                done.set(at);
            }
        }
        if mode != ZeroMode::Keep && self.shared.has_data_file() {
            // In an external data file every cluster keeps its location.
            self.empty(&[(HostOffset(start), end - start)]).await;
        }
        Ok(())
    }

    /// Gives the space of clusters that keep their location back to the host.
    async fn empty(&self, runs: &[(HostOffset, u64)]) {
        let file = self.shared.data_file();
        for some in runs.chunks(PUNCHES_AT_ONCE) {
            let started: Vec<_> = some
                .iter()
                .filter_map(|(offset, length)| self.start_punch(file, offset.0, *length).1)
                .collect();
            if active(Mutation::EmptiedLate) {
                continue;
            }
            for punch in started {
                if let (Err(error), _) = punch.await {
                    // The only consequence is that the space stays in use.
                    debug!(%error, "the space of discarded clusters could not be given back to the host");
                }
            }
        }
    }

    /// Zeroes part of a granule by writing zeros, unless it reads as zero.
    async fn zero_piece(&self, offset: u64, length: u64) -> Result<(), RequestError> {
        self.check_writable()?;
        let extents = self.extents(offset, length).await?;
        if extents.iter().all(|extent| extent.source == Source::Zero) {
            return Ok(());
        }
        self.write(offset, Payload::Zeros(length)).await
    }

    /// Punches the whole file system blocks of the range; the rest keeps its contents.
    async fn raw_discard(&self, offset: u64, length: u64) -> Result<(), RequestError> {
        self.check_writable()?;
        let (start, end) = self.shared.data_file().whole_blocks(offset, length);
        self.raw_punch(start, end).await.map(|_| ())
    }

    /// Discards whole granules in an external data file that can be read as a raw image. They then read as zero there
    /// too, so tables that lead to them may stay as they are.
    async fn raw_view_discard(&self, file: &DiskFile, offset: u64, length: u64) -> Result<(), RequestError> {
        self.check_writable()?;
        let (start, end) = file.whole_blocks(offset, length);
        let ends = if start >= end {
            [(offset, length), (end, 0)]
        } else if self.raw_punch(start, end).await? {
            [(offset, start - offset), (end, offset + length - end)]
        } else {
            return Ok(());
        };
        for (offset, length) in ends {
            match self.write_raw_zeros(offset, length).await {
                // A discard must not fail for lack of space.
                Err(error) if error.is_no_space() => return Ok(()),
                ended => ended?,
            }
        }
        Ok(())
    }

    /// Punches a hole for a discard; false where the host cannot. A discard is a hint, so nothing is lost then.
    async fn raw_punch(&self, start: u64, end: u64) -> Result<bool, RequestError> {
        if start >= end {
            return Ok(true);
        }
        let file = self.shared.data_file().id;
        let punch = Operation::bare(file, Kind::Punch { length: end - start }, start);
        match self.driver.run_bare(punch).await {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP) => Ok(false),
            Err(source) => Err(RequestError::Io { what: "punching", source }),
        }
    }

    /// Zeroes whole file system blocks by the host's operation, and the ragged ends by writing zeros.
    async fn raw_zeroes(
        &self,
        file: &DiskFile,
        offset: u64,
        length: u64,
        mode: ZeroMode,
    ) -> Result<(), RequestError> {
        self.check_writable()?;
        let (start, end) = file.whole_blocks(offset, length);
        if start >= end {
            return self.write_raw_zeros(offset, length).await;
        }
        self.write_raw_zeros(offset, start - offset).await?;
        self.write_raw_zeros(end, offset + length - end).await?;
        let length = end - start;
        if mode == ZeroMode::Unmap
            && self.driver.run_bare(Operation::bare(file.id, Kind::Punch { length }, start)).await.is_ok()
        {
            return Ok(());
        }
        let zero = Operation::bare(file.id, Kind::Zero { length }, start);
        self.driver.run_bare(zero).await.map_err(RequestError::io("writing zeroes"))
    }
}
