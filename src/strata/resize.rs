//! `strata resize`: resizes the disk of an image that is not in use.
//!
//! Owns the meaning of the command line and what is printed. The disk crate changes the image.

use std::time::Duration;

use disk::DiskOptions;
use disk::change::ChangeError;
use disk::resize::{NewSize, ResizeError, Resized, Shrinking, resize};

use crate::cli::{Cache, ResizeArgs};
use crate::error::{ProgramError, Purpose};
use crate::signals;
use crate::size::{SizeChange, in_words};
use crate::text::print;

/// Long enough for the last I/O of a daemon that was just killed, short enough that people do not wonder.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Runs the command.
///
/// # Errors
/// When the image cannot be used, the resize fails, or the result cannot be printed.
pub fn run(options: &ResizeArgs) -> Result<(), ProgramError> {
    let storage =
        options.lock.storage().confined(&options.chain.chain_root).map_err(ProgramError::ChainRoot)?;
    let how = DiskOptions {
        format: options.chain.format.into(),
        backing_format: options.chain.backing_format.map(Into::into),
        data_file: options.data.data_file.clone(),
        backing_data_files: options.data.backing_data_file.clone(),
        direct: options.chain.cache == Cache::Direct,
        lock_timeout: options.lock.timeout(LOCK_PATIENCE),
        ..DiskOptions::default()
    };
    let wanted = match options.size {
        SizeChange::To(size) => NewSize::Of(size.0),
        SizeChange::More(by) => NewSize::Larger(by.0),
        SizeChange::Less(by) => NewSize::Smaller(by.0),
    };
    let shrinking = if options.shrink { Shrinking::Accepted } else { Shrinking::Refused };
    signals::finish_first()?;
    let resized = resize(storage, &options.image, wanted, shrinking, &how).map_err(|error| match error {
        ResizeError::Change(ChangeError::Open(source)) => {
            ProgramError::Open { image: options.image.clone(), purpose: Purpose::Resize, source }
        }
        source => ProgramError::Resize(source),
    })?;
    print(&told(resized)).map_err(ProgramError::Print)
}

fn told(Resized { from, to }: Resized) -> String {
    if from == to {
        return format!("The disk has {} already.\n", in_words(to));
    }
    format!("Image resized from {} to {}.\n", in_words(from), in_words(to))
}
