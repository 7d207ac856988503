//! Jobs that a plan may need first: reserving clusters and making L2 tables.

use engine::TableSlot;
use storage::{Errno, Kind, Operation, Storage};

use crate::error::RequestError;
use crate::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Where the host has no space: makes ready what was freed; false if there is nothing of that. The caller is in no
    /// epoch, as that would hold the freed clusters up.
    pub async fn make_space(&self) -> bool {
        if self.engine().status().quarantined_clusters == 0 || self.flush().await.is_err() {
            return false;
        }
        // What fails, or what the housekeeper has taken on, shows when the request is tried again.
        while let Ok(true) = self.reclaim_some().await {}
        true
    }

    /// Reserves a window of clusters.
    pub async fn reserve(&self) -> Result<(), RequestError> {
        let Some(mut plan) = self.ask(|engine, waker| engine.plan_reserve(waker)).await? else {
            return Ok(());
        };
        let top = self.shared.top_file();
        let mut result = Ok(());
        // The file always ends with a block of its file system: see `fill_last_block`.
        let block = u64::from(self.shared.files[0].info.block_size.max(1));
        plan.file_length = plan.file_length.map(|length| length.next_multiple_of(block));
        if let Some(length) = plan.file_length {
            result = self.grow_file(length).await;
        }
        if let (Ok(()), Some((offset, length))) = (result, plan.metadata) {
            result = self.allocate(Operation::bare(top, Kind::Allocate { length }, offset.0)).await;
        }
        match result {
            Ok(()) => self.engine().commit_reserve(plan),
            Err(_) => self.engine().abort_reserve(plan),
        }
        result.map_err(RequestError::io("growing the image file"))
    }

    async fn grow_file(&self, length: u64) -> Result<(), Errno> {
        let top = self.shared.top_file();
        // Never shorten: the file may be longer than what is in use (an earlier crash).
        if self.shared.storage.length(top).map_err(|_| Errno::EIO)? >= length {
            return Ok(());
        }
        self.driver.run_bare(Operation::bare(top, Kind::SetLength, length)).await
    }

    /// Has the host allocate metadata, where its file system can: elsewhere running out of space is found when the
    /// table is written.
    async fn allocate(&self, operation: Operation) -> Result<(), Errno> {
        match self.driver.run_bare(operation).await {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Makes an L2 table the top image's own.
    pub async fn make_table(&self, slot: TableSlot) -> Result<(), RequestError> {
        let Some(plan) = self.ask(|engine, waker| engine.plan_table(slot, waker)).await? else {
            return Ok(());
        };
        let operation =
            Operation::bare(self.shared.top_file(), Kind::Allocate { length: plan.length }, plan.offset.0);
        match self.allocate(operation).await {
            Ok(()) => {
                self.engine().commit_table(plan);
                self.shared.touched();
                Ok(())
            }
            Err(error) => {
                self.engine().abort_table(plan);
                self.shared.touched();
                Err(RequestError::Io { what: "allocating an L2 table", source: error })
            }
        }
    }
}
