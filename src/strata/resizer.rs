//! Resizes the disk that is being served, when SIGHUP asks for it.
//!
//! Owns the thread that does so, and where the wanted size comes from. The signal's thread must not wait for the host,
//! and a stop must be heard meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use disk::resize::{NewSize, ResizeError, Shrinking};
use names::shown;
use storage::host::HostStorage;
use tracing::{info, warn};
use vhost_blk::{BackChannel, StopHandle};

use crate::device::DiskDevice;
use crate::error::ProgramError;
use crate::size::{self, Size, SizeError};

/// The longest file that may name a size, in bytes.
const SIZE_FILE_MAX: usize = 64;
/// The word after a size that accepts the loss of what lies past a smaller end.
const SHRINK: &str = "shrink";

/// Why the wanted size is unknown.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error("{}: {source}", shown(path))]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", shown(path))]
    Size { path: PathBuf, source: SizeError },
    #[error("{}: a size is expected, alone or followed by \"{SHRINK}\"", shown(path))]
    Syntax { path: PathBuf },
    #[error(transparent)]
    Storage(#[from] storage::StorageError),
}

/// What a resize needs.
struct Job {
    device: Arc<DiskDevice<HostStorage>>,
    back_channel: Arc<BackChannel>,
    size_file: Option<PathBuf>,
    stop: StopHandle,
    ending: Arc<AtomicBool>,
}

/// The thread that resizes the disk. Dropping it gives up a resize under way and waits for its end; all askers must be
/// gone by then.
pub struct Resizer {
    asks: Option<Sender<()>>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Resizer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(
        device: Arc<DiskDevice<HostStorage>>,
        back_channel: Arc<BackChannel>,
        size_file: Option<PathBuf>,
        stop: StopHandle,
    ) -> Result<Self, ProgramError> {
        let (asks, asked) = mpsc::channel();
        let ending = Arc::new(AtomicBool::new(false));
        let job = Job { device, back_channel, size_file, stop, ending: Arc::clone(&ending) };
        let thread = thread::Builder::new()
            .name("strata-resize".to_owned())
            .spawn(move || asked.into_iter().for_each(|()| job.run()))
            .map_err(|source| ProgramError::Host { step: "starting a thread", source })?;
        Ok(Resizer { asks: Some(asks), ending, thread: Some(thread) })
    }

    /// A function that asks for a resize to the size that is then wanted. It never waits.
    pub fn asker(&self) -> impl Fn() + Send + use<> {
        let asks = self.asks.clone();
        move || {
            // The thread is gone only when the disk is.
            let _ = asks.as_ref().map(|asks| asks.send(()));
        }
    }
}

impl Drop for Resizer {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.asks = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread that resizes the disk ended in a panic");
        }
    }
}

impl Job {
    fn run(&self) {
        match self.wanted() {
            Ok(None) => info!(
                "SIGHUP: nothing is read anew: a qcow2 image is resized in use to the size in the file of --size-file"
            ),
            Ok(Some((size, shrinking))) => self.resize(size, shrinking),
            Err(error) => warn!(%error, "SIGHUP: the disk keeps its size"),
        }
    }

    /// The size that the disk is to have: that in the file, else that of a raw image's own file or device.
    fn wanted(&self) -> Result<Option<(u64, Shrinking)>, Unknown> {
        match &self.size_file {
            Some(path) => read_size(path).map(Some),
            None => {
                let length = self.device.disk().map(|disk| disk.raw_length()).transpose()?.flatten();
                Ok(length.map(|length| (length, Shrinking::Refused)))
            }
        }
    }

    fn resize(&self, size: u64, shrinking: Shrinking) {
        let block = self.device.logical_block_size();
        if !size.is_multiple_of(block) {
            return warn!(
                "SIGHUP: the disk keeps its size: {size} bytes are no multiple of a block of {block} bytes"
            );
        }
        let gives_up = || self.stop.is_stopped() || self.ending.load(Ordering::Relaxed);
        match self.device.resize(NewSize::Of(size), shrinking, gives_up) {
            Ok(None) => info!("SIGHUP: another daemon has the image now, so the disk keeps its size"),
            Ok(Some(resized)) if resized.from == resized.to => {
                info!("SIGHUP: the disk has {} already", size::in_words(resized.to));
            }
            Ok(Some(resized)) => {
                let (from, to) = (size::in_words(resized.from), size::in_words(resized.to));
                let told = match self.back_channel.tell_change() {
                    Ok(true) => "the frontend has been told",
                    Ok(false) => {
                        "the frontend has no back channel, so the guest sees it when its device starts anew"
                    }
                    Err(error) => {
                        warn!(%error, "the frontend could not be told that the disk has another size");
                        "the guest sees it when its device starts anew"
                    }
                };
                info!("SIGHUP: the disk has {to} now, {from} before; {told}");
            }
            Err(ResizeError::WouldShrink { from, to, .. }) if self.size_file.is_none() => warn!(
                "SIGHUP: the disk keeps its {}, although its file now has only {}: reads past that end fail",
                size::in_words(from),
                size::in_words(to)
            ),
            Err(ResizeError::WouldShrink { from, to, .. }) => warn!(
                "SIGHUP: the disk keeps its {}: with {} what lies past the new end would be lost; \"{SHRINK}\" after the size says \
                 that this is meant",
                size::in_words(from),
                size::in_words(to)
            ),
            Err(error) => warn!(%error, "SIGHUP: the disk keeps its size"),
        }
    }
}

/// Reads `SIZE` or `SIZE shrink`.
fn read_size(path: &Path) -> Result<(u64, Shrinking), Unknown> {
    let file = |source| Unknown::File { path: path.to_owned(), source };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|opened| {
            use std::io::Read as _;
            opened.take(SIZE_FILE_MAX as u64 + 1).read_to_string(&mut text)
        })
        .map_err(file)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let (size, shrinking) = match words[..] {
        _ if text.len() > SIZE_FILE_MAX => return Err(Unknown::Syntax { path: path.to_owned() }),
        [size] => (size, Shrinking::Refused),
        [size, SHRINK] => (size, Shrinking::Accepted),
        _ => return Err(Unknown::Syntax { path: path.to_owned() }),
    };
    let Size(bytes) = size.parse().map_err(|source| Unknown::Size { path: path.to_owned(), source })?;
    Ok((bytes, shrinking))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_file_has_a_size_and_perhaps_a_word() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("size");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("it is written");
            read_size(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read("20G\n"), Ok((20 << 30, Shrinking::Refused)));
        assert_eq!(read("  512 shrink "), Ok((512, Shrinking::Accepted)));
        for wrong in ["", "shrink", "1G shrunk", "1G shrink now", "big", &"1".repeat(65)] {
            let error = read(wrong).expect_err(wrong);
            assert!(error.contains("size"), "{error}");
        }
        assert!(read_size(folder.path()).is_err(), "a folder is no file");
    }
}
