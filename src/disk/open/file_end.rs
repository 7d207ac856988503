//! The end of a file: extends files before other writes to them.

use storage::{IoQueue, Kind, Operation};

use crate::error::OpenError;
use crate::layer::DiskFile;
use crate::runtime::driver::Driver;

/// Extends a writable file to a whole block of its file system. Growing it later from inside a block would write that
/// block through the host's page cache, where it can collide with a direct write (`FileInfo::block_size`).
pub(crate) async fn fill_last_block<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
) -> Result<(), OpenError> {
    let length = file.info.length.next_multiple_of(u64::from(file.info.block_size.max(1)));
    lengthen(driver, file, length).await
}

/// Extends a file to a length, if it is shorter.
pub(crate) async fn lengthen<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
    length: u64,
) -> Result<(), OpenError> {
    if length <= file.info.length {
        return Ok(());
    }
    let grow = Operation::bare(file.id, Kind::SetLength, length);
    let path = file.info.path.clone();
    driver.run_bare(grow).await.map_err(|source| OpenError::Io {
        path,
        structure: "end of the file",
        offset: length,
        source,
    })
}
