//! Serial numbers of disks.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The longest serial in bytes: the size of a GET_ID answer (virtio 1.2, 5.2.6).
pub const SERIAL_MAX: usize = 20;

/// A serial number, padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial(pub [u8; SERIAL_MAX]);

/// Why a text is not a serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a serial is at most {SERIAL_MAX} printable ASCII characters")]
pub struct SerialError;

impl FromStr for Serial {
    type Err = SerialError;

    fn from_str(text: &str) -> Result<Self, SerialError> {
        let mut bytes = [0; SERIAL_MAX];
        let room = bytes.get_mut(..text.len()).ok_or(SerialError)?;
        if !text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
            return Err(SerialError);
        }
        room.copy_from_slice(text.as_bytes());
        Ok(Serial(bytes))
    }
}

impl Serial {
    /// The beginning of the file's name and a hash of its path, so that disks of the same name in different folders
    /// differ. Other names of the same folder give the same serial. Only letters, digits and `.+-_`, so that it
    /// appears unchanged in /dev/disk/by-id.
    pub fn of_image(image: &Path) -> Self {
        let name = image.file_stem().unwrap_or(OsStr::new("disk")).as_encoded_bytes();
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".+-_".contains(byte);
        let hash = format!("-{:08x}", hash(whole_path(image).as_os_str().as_encoded_bytes()));
        let plain = name.iter().map(|byte| if is_plain(byte) { *byte } else { b'_' });
        let mut bytes = [0; SERIAL_MAX];
        let serial = plain.take(SERIAL_MAX - hash.len()).chain(hash.bytes());
        bytes.iter_mut().zip(serial).for_each(|(to, from)| *to = from);
        Serial(bytes)
    }
}

/// The path from the root. Symlinks in the folder's path are followed. A symlink that is the file itself is not:
/// its target changes when a disk gets an overlay.
fn whole_path(image: &Path) -> PathBuf {
    let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (std::fs::canonicalize(folder), image.file_name()) {
        (Ok(folder), Some(name)) => folder.join(name),
        _ => std::path::absolute(image).unwrap_or_else(|_| image.to_owned()),
    }
}

/// FNV-1a, 32 bits: serials must not change with a compiler's version.
fn hash(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}
