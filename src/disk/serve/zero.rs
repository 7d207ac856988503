//! Discard and write zeroes: whole clusters and subclusters by metadata, their ragged ends as data.

use std::cell::Cell;

use engine::{Answer, Source, TableLoad, ZeroMode, Zeroed};
use qcow2::{GuestOffset, HostOffset, HostRange};
use storage::{Errno, Kind, Operation, Storage};
use tracing::debug;

use crate::bounds::{PUNCHES_AT_ONCE, ROUNDS_AT_ONCE};
use crate::error::RequestError;
use crate::options::Discards;
use crate::range::ByteRange;
use crate::rules::{self, Awaited};
use crate::serve::worker::Worker;
use crate::serve::write::Payload;
use crate::serve::zero_route::ZeroRoute;

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
    pub fn try_zero(&self, range: ByteRange, mode: ZeroMode) -> Tried {
        let unit = self.engine().unit();
        let is_in_one = !range.is_empty() && range.offset / unit == (range.end() - 1) / unit;
        let route = self.shared.zero_route;
        if !is_in_one || !route.needs_only_tables(mode) || self.whole_granules(range) != range {
            return Tried::Not;
        }
        match self.engine().try_zero(GuestOffset(range.offset), range.length, mode) {
            Ok(Some(Answer::Ready(Zeroed::Done { bytes, unused }))) if bytes == range.length => {
                debug_assert!(unused.is_empty(), "nothing stays in its place");
                self.shared.note_answer();
                self.shared.note_change();
                Tried::Done
            }
            Ok(Some(Answer::Load(loads))) => Tried::Lacks(loads),
            // A waiter whose waker does nothing is never woken, and blocks no other waiter.
            _ => Tried::Not,
        }
    }

    /// Discards a range: whole granules only, the rest keeps its contents. `done` holds how far the range is done,
    /// and is advanced.
    pub async fn discard(&self, range: ByteRange, done: &Cell<u64>) -> Result<(), RequestError> {
        if self.shared.policy.discards == Discards::Ignore {
            return self.check_writable();
        }
        let route = self.shared.zero_route;
        if route == ZeroRoute::Raw {
            return self.raw_discard(range).await;
        }
        let granules = self.whole_granules(range).starting_at(done.get());
        if granules.is_empty() {
            return self.check_writable();
        }
        if route == ZeroRoute::RawView {
            return Box::pin(self.raw_view_discard(granules)).await;
        }
        let _claim = self.claim(granules).await;
        self.zero_granules(granules, ZeroMode::Discard, done).await
    }

    /// Makes exactly this range read as zero. `done` holds how far it is done, and is advanced.
    pub async fn write_zeroes(
        &self,
        range: ByteRange,
        unmap: bool,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        let mode = self.shared.policy.mode(unmap);
        if self.shared.zero_route.is_raw() {
            return Box::pin(self.raw_zeroes(range, mode)).await;
        }
        let left = range.starting_at(done.get());
        let _claim = self.claim(left).await;
        self.zero_by_tables(left, mode, done).await
    }

    /// As [`Worker::write_zeroes`], for a range on which the caller holds a claim.
    pub async fn zero_range(&self, range: ByteRange, mode: ZeroMode) -> Result<(), RequestError> {
        if self.shared.zero_route.is_raw() {
            return Box::pin(self.raw_zeroes(range, mode)).await;
        }
        self.zero_by_tables(range, mode, &Cell::new(0)).await
    }

    /// Zeroes whole granules by the tables, and the ragged ends as data.
    async fn zero_by_tables(
        &self,
        range: ByteRange,
        mode: ZeroMode,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        let granules = self.whole_granules(range);
        if granules.is_empty() {
            return Box::pin(self.zero_piece(range)).await;
        }
        let (head, tail) = (range.before(granules.offset), range.starting_at(granules.end()));
        if !head.is_empty() {
            Box::pin(self.zero_piece(head)).await?;
        }
        self.zero_granules(granules, mode, done).await?;
        if tail.is_empty() { Ok(()) } else { Box::pin(self.zero_piece(tail)).await }
    }

    /// Removes the entries of whole clusters past the end of a disk that became smaller, and frees their space.
    pub async fn remove_entries(&self, range: ByteRange) -> Result<(), RequestError> {
        let done = Cell::new(range.offset);
        loop {
            let epoch = self.enter();
            let left = range.starting_at(done.get());
            let claim = self.claim(left).await;
            let removed = self.zero_granules(left, ZeroMode::Remove, &done).await;
            drop(claim);
            self.exit(epoch);
            match removed {
                Err(RequestError::Crowded) => self.relieve().await?,
                ended => return ended,
            }
        }
    }

    /// The whole granules (clusters or subclusters) in a range. The disk's last granule counts as whole where the
    /// disk ends.
    fn whole_granules(&self, range: ByteRange) -> ByteRange {
        let granule = self.engine().granule();
        let whole = range.whole_blocks(granule);
        if range.end() == self.engine().size() {
            ByteRange::between(whole.offset, range.end())
        } else {
            whole
        }
    }

    async fn zero_granules(
        &self,
        granules: ByteRange,
        mode: ZeroMode,
        done: &Cell<u64>,
    ) -> Result<(), RequestError> {
        // Emptied at once at the end: until then nothing of the range is done.
        let at_the_end = self.shared.zero_route == ZeroRoute::DataFile;
        let (mut at, end) = (granules.offset, granules.end());
        let mut rounds = 0_u32;
        while at < end {
            rounds += 1;
            if rounds.is_multiple_of(ROUNDS_AT_ONCE) {
                self.driver.yield_now().await;
            }
            let zeroed =
                self.ask(|engine, waker| engine.apply_zero(GuestOffset(at), end - at, mode, waker)).await;
            // Also after a failure: part of the range may have been changed before.
            self.shared.note_change();
            at += match zeroed? {
                Zeroed::Done { bytes, unused } => {
                    if !at_the_end {
                        self.empty(&unused).await;
                    }
                    bytes
                }
                Zeroed::NeedsData(bytes) => {
                    Box::pin(self.write(at, Payload::Zeros(bytes))).await?;
                    bytes
                }
            };
            if !at_the_end {
                done.set(at);
            }
        }
        if at_the_end && mode != ZeroMode::Keep {
            self.empty(&[HostRange::new(HostOffset(granules.offset), granules.length)]).await;
        }
        Ok(())
    }

    /// Gives the space of clusters that keep their location back to the host.
    async fn empty(&self, runs: &[HostRange]) {
        let file = self.shared.data_file();
        for some in runs.chunks(PUNCHES_AT_ONCE) {
            let started: Vec<_> =
                some.iter().filter_map(|run| self.start_punch(file, (*run).into()).1).collect();
            if !rules::waits_for(Awaited::PunchInPlace) {
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
    async fn zero_piece(&self, range: ByteRange) -> Result<(), RequestError> {
        self.check_writable()?;
        let extents = self.extents(range).await?;
        if extents.iter().all(|extent| extent.source == Source::Zero) {
            return Ok(());
        }
        self.write(range.offset, Payload::Zeros(range.length)).await
    }

    /// Punches the whole file system blocks of the range; the rest keeps its contents.
    async fn raw_discard(&self, range: ByteRange) -> Result<(), RequestError> {
        self.check_writable()?;
        let blocks = self.shared.data_file().whole_blocks(range);
        self.raw_punch(blocks).await.map(|_| ())
    }

    /// Discards whole granules in an external data file that can be read as a raw image. They then read as zero there
    /// too, so tables that lead to them may stay as they are.
    async fn raw_view_discard(&self, granules: ByteRange) -> Result<(), RequestError> {
        self.check_writable()?;
        let blocks = self.shared.data_file().whole_blocks(granules);
        let (head, tail) = if blocks.is_empty() {
            (granules, ByteRange::new(granules.end(), 0))
        } else if self.raw_punch(blocks).await? {
            (granules.before(blocks.offset), granules.starting_at(blocks.end()))
        } else {
            return Ok(());
        };
        for range in [head, tail] {
            match self.write_raw_zeros(range).await {
                // A discard must not fail for lack of space.
                Err(error) if error.is_no_space() => return Ok(()),
                ended => ended?,
            }
        }
        Ok(())
    }

    /// Punches a hole for a discard; false where the host cannot. A discard is a hint, so nothing is lost then.
    async fn raw_punch(&self, blocks: ByteRange) -> Result<bool, RequestError> {
        if blocks.is_empty() {
            return Ok(true);
        }
        let punch =
            Operation::bare(self.shared.data_file().id, Kind::Punch { length: blocks.length }, blocks.offset);
        match self.driver.run_bare(punch).await {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP) => Ok(false),
            Err(source) => Err(RequestError::Io { action: "punching", source }),
        }
    }

    /// Zeroes whole file system blocks by the host's operation, and the ragged ends by writing zeros.
    async fn raw_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<(), RequestError> {
        self.check_writable()?;
        let file = self.shared.data_file();
        let blocks = file.whole_blocks(range);
        if blocks.is_empty() {
            return self.write_raw_zeros(range).await;
        }
        self.write_raw_zeros(range.before(blocks.offset)).await?;
        self.write_raw_zeros(range.starting_at(blocks.end())).await?;
        let ByteRange { offset, length } = blocks;
        if mode == ZeroMode::Unmap
            && self.driver.run_bare(Operation::bare(file.id, Kind::Punch { length }, offset)).await.is_ok()
        {
            return Ok(());
        }
        let zero = Operation::bare(file.id, Kind::Zero { length }, offset);
        self.driver.run_bare(zero).await.map_err(RequestError::io("writing zeroes"))
    }
}
