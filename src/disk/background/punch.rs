//! Punches: giving the host the space of a run of a file.

use std::future::Future;

use storage::{Kind, Operation, Storage};

use crate::layer::DiskFile;
use crate::range::ByteRange;
use crate::runtime::driver::Outcome;
use crate::serve::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Punches the whole file system blocks in a run, if there are any. Also returns whether they are the whole run.
    /// A punch that ends inside a block would collide with direct I/O in the same block
    /// ([`storage::FileInfo::block_size`]).
    pub fn start_punch(
        &self,
        file: &DiskFile,
        run: ByteRange,
    ) -> (bool, Option<impl Future<Output = Outcome>>) {
        let blocks = file.whole_blocks(run);
        let punch = Operation::bare(file.id, Kind::Punch { length: blocks.length }, blocks.offset);
        (blocks == run, (!blocks.is_empty()).then(|| self.driver.run(punch)))
    }
}
