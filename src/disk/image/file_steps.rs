//! Carries out the steps of a plan for an image file that is not in use.
//!
//! Owns the file's end while it changes. The engine decides on the steps and their order.

use engine::FileStep;
use names::shown;
use storage::{Errno, IoQueue, Kind, Operation};
use tracing::warn;

use crate::error::OpenError;
use crate::image::image_file::ImageFile;
use crate::layer::whole_blocks;
use crate::range::ByteRange;

/// A plan that is being carried out.
pub(crate) struct FileSteps<'a, Q> {
    image: &'a ImageFile<'a, Q>,
    /// The file's length in bytes.
    length: u64,
    /// The host can give space back, as far as known.
    punches: bool,
    /// The writes so far.
    writes: u64,
}

impl<'a, Q: IoQueue> FileSteps<'a, Q> {
    /// No step is done.
    pub fn new(image: &'a ImageFile<'a, Q>) -> Self {
        FileSteps { image, length: image.info.length, punches: true, writes: 0 }
    }

    /// How many writes there were.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Carries out a step.
    pub async fn carry_out(&mut self, step: FileStep) -> Result<(), OpenError> {
        match step {
            FileStep::Write { offset, bytes } => {
                self.writes += 1;
                self.length = self.length.max(offset.0 + bytes.len() as u64);
                self.image.write(offset.0, &bytes).await
            }
            FileStep::Sync => self.image.sync().await,
            FileStep::Punch(range) => {
                self.punches = self.punches && self.give_back(range.into()).await;
                Ok(())
            }
            FileStep::Cut { length } => {
                self.cut(length).await;
                Ok(())
            }
        }
    }

    /// Makes the file durably at least `length` bytes long. If there is no room, the plan goes on, and the leaks of an
    /// earlier crash may stay.
    pub async fn lengthen(&mut self, length: u64) -> Result<(), OpenError> {
        let length = self.to_blocks(length);
        if length <= self.length {
            return Ok(());
        }
        match self.set_length(length).await {
            Ok(()) => {
                self.image.sync().await?;
                self.length = length;
            }
            Err(error) => {
                warn!(path = %shown(&self.image.info.path), %error,
                    "the image file cannot be made longer: space that an earlier crash left counted may stay counted");
            }
        }
        Ok(())
    }

    /// Cuts the file after `length` bytes and the rest of their last block, if it is longer.
    async fn cut(&mut self, length: u64) {
        let length = self.to_blocks(length);
        if length >= self.length {
            return;
        }
        match self.set_length(length).await {
            Ok(()) => self.length = length,
            Err(error) => {
                warn!(path = %shown(&self.image.info.path), %error, "the end of the image file could not be cut off");
            }
        }
    }

    /// Gives space back to the host; false if that is of no use.
    async fn give_back(&self, range: ByteRange) -> bool {
        let blocks = whole_blocks(self.image.info, range);
        if blocks.is_empty() {
            return true;
        }
        let punch = Operation::bare(self.image.id, Kind::Punch { length: blocks.length }, blocks.offset);
        match self.image.driver.run_bare(punch).await {
            Ok(()) => true,
            Err(Errno::EOPNOTSUPP) => false,
            Err(error) => {
                warn!(path = %shown(&self.image.info.path), %error, "space could not be given back to the host");
                false
            }
        }
    }

    async fn set_length(&self, length: u64) -> Result<(), Errno> {
        self.image.driver.run_bare(Operation::bare(self.image.id, Kind::SetLength, length)).await
    }

    /// The length in whole blocks of the file system.
    fn to_blocks(&self, length: u64) -> u64 {
        length.next_multiple_of(u64::from(self.image.info.block_size.max(1)))
    }
}
