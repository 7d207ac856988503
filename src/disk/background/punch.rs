//! Punches: giving the host the space of a run of a file.

use std::future::Future;

use storage::{Kind, Operation, Storage};

use crate::layer::DiskFile;
use crate::runtime::driver::Outcome;
use crate::serve::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Punches the whole file system blocks in a run, if there are any. Also returns whether they are the whole run.
    /// A punch that ends inside a block would collide with direct I/O in the same block
    /// ([`storage::FileInfo::block_size`]).
    pub fn start_punch(
        &self,
        file: &DiskFile,
        offset: u64,
        length: u64,
    ) -> (bool, Option<impl Future<Output = Outcome>>) {
        let (start, end) = file.whole_blocks(offset, length);
        let whole = (start, end) == (offset, offset + length);
        let punch = Operation::bare(file.id, Kind::Punch { length: end.saturating_sub(start) }, start);
        (whole, (start < end).then(|| self.driver.run(punch)))
    }
}
