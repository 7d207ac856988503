//! The journal of what is committed and not durable yet (docs/durability.md, "The journal"). Owns when one begins
//! and ends, and carries out what a dead daemon left in it.
//!
//! The engine keeps the records and carries them out. This file owns the order: the number in the header, the cut before
//! a switch, and the steps of a replay.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{JournalError, JournalMemory, Replay};
use names::shown;
use qcow2::feature::autoclear_with_journal;
use qcow2::position::{AUTOCLEAR, patch_autoclear};
use qcow2::{JournalNumber, Version};
use storage::Storage;
use tracing::{error, info, warn};

use crate::error::{OpenError, RequestError};
use crate::open::header::HeaderSector;
use crate::rules;
use crate::runtime::driver::Driver;
use crate::serve::worker::Worker;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared, WORKERS_MAX};

/// What became of the memory that was offered for a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalKept {
    /// Nothing is recorded: no memory was offered, it is too small, or the image has no journal.
    No,
    /// A journal was begun.
    Begun {
        /// Guest clusters with entries that a dead daemon had left, and that were carried out.
        replayed: u64,
    },
}

/// See [`crate::Disk::keep_journal`].
pub(crate) fn keep<S: Storage>(
    shared: &Arc<Shared<S>>,
    memory: Option<JournalMemory>,
) -> Result<JournalKept, OpenError> {
    if shared.read_only {
        return Ok(JournalKept::No);
    }
    let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
    let worker = Worker::new(Arc::clone(shared), Rc::clone(&driver))
        .ok_or(OpenError::TooManyQueues { limit: WORKERS_MAX })?;
    driver.block_on(worker.switch_journal(memory))
}

/// See [`crate::Disk::keep_journal_again`].
pub(crate) fn keep_again<S: Storage>(
    shared: &Arc<Shared<S>>,
    memory: Option<JournalMemory>,
) -> Result<JournalKept, OpenError> {
    let wanted = memory.is_some() && shared.journal_sector().is_some();
    let kept = keep(shared, memory);
    if let Err(error) = &kept
        && wanted
        && !shared.engine.has_journal()
        && !shared.engine.has_failed()
    {
        shared.engine.fail();
        let path = shown(&shared.layers[0].path);
        error!(%path, %error, "the disk has failed, as its journal could not begin: \
            writes and flushes are refused from now on");
    }
    kept
}

impl<S: Storage> Shared<S> {
    /// True while a journal that a dead daemon left may still be carried out.
    pub fn awaits_journal(&self) -> bool {
        // Acquire pairs with the release in `decide`: what was carried out is there, and the old number is gone.
        self.awaits_journal.load(Ordering::Acquire)
    }

    /// The journal of a dead daemon was carried out, or is given up.
    fn decide(&self) {
        self.awaits_journal.store(false, Ordering::Release);
        self.bell.wake();
    }

    /// The sector with the journal's number, if the image can have a journal. Clusters of an external data file
    /// have fixed places, and version 2 has no feature bits.
    fn journal_sector(&self) -> Option<&HeaderSector> {
        let header = self.layers[0].header.as_ref()?;
        let may_have = header.version == Version::V3 && !self.has_data_file();
        self.header.as_ref().filter(|_| may_have)
    }

    fn number(&self) -> Option<JournalNumber> {
        let sector = self.journal_sector()?;
        JournalNumber::of_autoclear(u64::from_be_bytes(sector.field(AUTOCLEAR)))
    }
}

impl<S: Storage> Worker<S> {
    async fn switch_journal(&self, memory: Option<JournalMemory>) -> Result<JournalKept, OpenError> {
        let failed =
            |source: RequestError| OpenError::Request { path: self.shared.layers[0].path.clone(), source };
        if self.engine().has_failed() {
            // It only reads from now on, and the frontend may do that with or without a region.
            return Ok(JournalKept::No);
        }
        let mut replayed = 0;
        if self.shared.awaits_journal() {
            replayed = self.take_over(memory.as_ref()).await.map_err(failed)?;
        }
        self.flush().await.map_err(failed)?;
        self.engine().end_journal();
        let kept = self.begin_journal(memory, replayed).await;
        // Not earlier: as long as the image may have the old number, the search for leaks must leave alone what the old
        // journal names. If the number could not be stored, the disk has failed, and nothing is given back.
        self.shared.decide();
        kept
    }

    /// Gives the image the number of a new journal in this memory, if there is one and the image can have a journal.
    async fn begin_journal(
        &self,
        memory: Option<JournalMemory>,
        replayed: u64,
    ) -> Result<JournalKept, OpenError> {
        if self.shared.journal_sector().is_none() {
            return Ok(JournalKept::No);
        }
        let Some(memory) = memory else {
            self.store_number(None).await?;
            return Ok(JournalKept::No);
        };
        // A new number with each journal: what the frontend may have kept of an earlier one is of no use.
        let number = JournalNumber::of_bits(RandomState::new().build_hasher().finish());
        self.store_number(Some(number)).await?;
        if self.engine().begin_journal(memory, number.get()) {
            return Ok(JournalKept::Begun { replayed });
        }
        self.store_number(None).await?;
        Ok(JournalKept::No)
    }

    /// At a clean end, when everything is durable: the image no longer has a journal.
    pub async fn give_up_journal(&self) -> Result<(), RequestError> {
        self.store_number(None).await.map_err(|error| match error {
            OpenError::Io { source, .. } => RequestError::Io { action: "header write", source },
            _ => RequestError::Io { action: "header write", source: storage::Errno::EIO },
        })?;
        self.engine().end_journal();
        Ok(())
    }

    async fn store_number(&self, number: Option<JournalNumber>) -> Result<(), OpenError> {
        let Some(sector) = self.shared.journal_sector().filter(|_| self.shared.number() != number) else {
            return Ok(());
        };
        let present = u64::from_be_bytes(sector.field(AUTOCLEAR));
        let patch = patch_autoclear(autoclear_with_journal(present, number));
        let stored = sector.patch_and_sync(&self.driver, self.shared.top_image(), patch).await;
        if let Err(error) = &stored {
            // Which number the image has is unknown, and so is whether a journal of it is worth anything.
            self.engine().fail();
            let path = shown(&self.shared.layers[0].path);
            error!(%path, %error, "the disk has failed: writes and flushes are refused from now on");
        }
        stored
    }

    /// Carries out what a dead daemon left, if this is the memory that it used. Returns for how many guest clusters.
    async fn take_over(&self, memory: Option<&JournalMemory>) -> Result<u64, RequestError> {
        let path = shown(&self.shared.layers[0].path);
        let (Some(number), Some(memory)) = (self.shared.number(), memory) else {
            warn!(%path, "the last daemon did not close the image, and its journal is not there: \
                writes that it answered and did not flush may be lost");
            return Ok(0);
        };
        let replayed = match self.engine().read_journal(memory, number.get()) {
            Ok(mut replay) => self.replay(&mut replay).await?,
            Err(wrong) => Err(wrong),
        };
        match replayed {
            Ok(0) => Ok(0),
            Ok(clusters) => {
                info!(%path, clusters, "what the last daemon had not made durable was carried out");
                Ok(clusters)
            }
            Err(JournalError::Foreign) => {
                warn!(%path, "the journal is of another state of the image: \
                    writes that the last daemon answered and did not flush may be lost");
                Ok(0)
            }
            Err(wrong) => {
                error!(%path, error = %wrong, "the journal was damaged, and none of it is carried out: \
                    writes that the last daemon answered and did not flush are lost");
                Ok(0)
            }
        }
    }

    /// Checks a journal, then carries it out in memory; the next cut makes it durable. An inner error if the journal
    /// cannot be true: nothing was changed then.
    async fn replay(&self, replay: &mut Replay) -> Result<Result<u64, JournalError>, RequestError> {
        loop {
            match self.ask(|engine, waker| engine.check_replay(replay, waker)).await? {
                Ok(true) => break,
                Ok(false) => {}
                Err(wrong) => return Ok(Err(wrong)),
            }
        }
        self.shared.leaks.half_replayed.store(true, Ordering::SeqCst);
        while let Some(plan) = self.ask(|engine, waker| engine.plan_replay_growth(replay, waker)).await? {
            self.carry_out_reserve(plan).await?;
        }
        if rules::replay_counts_first() {
            while !self.ask(|engine, waker| engine.claim_replayed(replay, waker)).await? {}
        }
        loop {
            match self.ask(|engine, waker| engine.link_replayed(replay, waker)).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(RequestError::Crowded) => self.relieve().await?,
                Err(error) => return Err(error),
            }
        }
        while !self.ask(|engine, waker| engine.claim_replayed(replay, waker)).await? {}
        self.shared.leaks.half_replayed.store(false, Ordering::SeqCst);
        self.shared.note_change();
        Ok(Ok(replay.clusters()))
    }
}
