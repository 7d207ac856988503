//! Raw layers: their size, and a warning where their bytes look like another format.

use std::path::Path;

use names::shown;
use qcow2::SECTOR;
use storage::{FileInfo, IoQueue};
use tracing::warn;

use crate::image::image_file::ImageFile;
use crate::layer::Layer;
use crate::open::foreign::Foreign;

/// A raw layer. As in QEMU, a sector in which its file ends is part of the disk, and its missing bytes read as zero.
pub(crate) fn raw_layer(path: &Path, info: &FileInfo) -> Layer {
    Layer {
        path: path.to_path_buf(),
        header: None,
        size: info.length.next_multiple_of(SECTOR),
        file_length: info.length,
    }
}

/// Warns of a raw layer whose bytes have the marks of a format. The guest sees the marks, and its writes destroy the
/// contents in that format.
pub(crate) async fn warn_of_marks<Q: IoQueue>(image: &ImageFile<'_, Q>, writable: bool) {
    let Some(foreign) = image.recognise().await else { return };
    let (path, what) = (shown(&image.info.path), foreign.in_words());
    match (foreign, writable) {
        // A raw disk may well be an ISO image.
        (Foreign::Iso9660, false) => {}
        (Foreign::Iso9660, true) => {
            warn!(%path, "opened writable as a raw image, but the file {what}: open it read-only");
        }
        (Foreign::Empty, _) => {
            warn!(%path, "opened as a raw image, but the file {what}: the disk has no bytes");
        }
        (Foreign::Luks, _) => {
            warn!(
                %path,
                "opened as a raw image, but the file {what}: this is right only if the guest decrypts it itself"
            );
        }
        (_, true) => {
            warn!(
                %path,
                "opened WRITABLE as a raw image, but the file {what}: the guest sees its raw bytes, and what the \
                 guest writes destroys the file's contents; stop now unless this is meant"
            );
        }
        (_, false) => {
            warn!(
                %path,
                "opened as a raw image, but the file {what}: the guest sees its raw bytes and not the disk in it"
            );
        }
    }
}
