//! Closing a disk cleanly: nothing dirty, nothing leaked, no longer than it need be.

use std::rc::Rc;
use std::sync::Arc;

use qcow2::HostOffset;
use storage::{Kind, Operation, Storage};

use crate::error::{OpenError, RequestError};
use crate::rules;
use crate::runtime::driver::Driver;
use crate::serve::worker::Worker;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared};

pub(crate) fn close<S: Storage>(shared: &Arc<Shared<S>>) -> Result<(), OpenError> {
    // What a dead daemon left in its journal stays where it is: nothing is freed, and nothing is cut off.
    if shared.read_only || shared.awaits_journal() {
        return Ok(());
    }
    let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
    let worker =
        Worker::new(Arc::clone(shared), Rc::clone(&driver)).expect("all queues of the disk are gone");
    driver
        .block_on(finish(&worker))
        .map_err(|source| OpenError::Request { path: shared.layers[0].path.clone(), source })
}

async fn finish<S: Storage>(worker: &Worker<S>) -> Result<(), RequestError> {
    settle(worker).await?;
    if worker.shared.is_qcow2() {
        let keeps_mark = worker.has_leaks_to_search().await;
        worker.trim_file(keeps_mark).await?;
        // After the cut the disk must not be used on. What can fail from here on fails the disk.
        worker.give_up_journal().await?;
    }
    worker.flush().await
}

/// Makes the top image durable, without anything reserved or freed. No request is in flight. The disk may be used on.
pub(crate) async fn settle<S: Storage>(worker: &Worker<S>) -> Result<(), RequestError> {
    if !worker.shared.is_qcow2() {
        return worker.flush().await;
    }
    worker.ask(|engine, waker| engine.release_windows(waker)).await?;
    // The first flush makes the unlinks durable. Then their clusters can be freed, and the second flush writes that.
    worker.flush().await?;
    let mut freed = false;
    while worker.reclaim_some().await? {
        freed = true;
    }
    if freed { worker.flush().await } else { Ok(()) }
}

impl<S: Storage> Worker<S> {
    /// Cuts the file after its last cluster in use. With `keeps_mark` it leaves the free clusters that make the next
    /// writer search for leaks.
    async fn trim_file(&self, keeps_mark: bool) -> Result<(), RequestError> {
        let top = self.shared.top_file();
        let present = self.shared.storage.length(top).unwrap_or(0);
        if let Some(length) = self.engine().closed_length(present)? {
            let length = length + if keeps_mark { self.engine().mark_bytes() } else { 0 };
            // To the end of a block: see `fill_last_block`.
            let length = length.next_multiple_of(u64::from(self.shared.top_image().info.block_size.max(1)));
            if length >= present {
                return Ok(());
            }
            let length = rules::closed_length(HostOffset(length), self.engine().unit());
            let cut = Operation::bare(top, Kind::SetLength, length);
            self.driver.run_bare(cut).await.map_err(RequestError::io("cutting the image file"))?;
        }
        Ok(())
    }
}
