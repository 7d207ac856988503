//! Header extensions: their framing, and the contents of the few that Strata reads (spec: "Header extensions").
//!
//! Owns the frame of every extension. It never drops or changes an extension's bytes, so that another tool's extensions
//! survive a rewrite of the header.

use crate::error::{FormatError, FormatErrorKind, Structure};

/// Type of the mark that ends the area of the extensions.
pub const END: u32 = 0;
/// Type of the backing file's format name.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Type of the feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// Type of the bitmaps extension.
pub const BITMAPS: u32 = 0x2385_2875;
/// Type of the pointer to the encryption header.
pub const ENCRYPTION_HEADER: u32 = 0x0537_be77;
/// Type of the external data file's name.
pub const DATA_FILE: u32 = 0x4441_5441;

/// Bytes before an extension's data: type and length.
pub(crate) const FRAME_LENGTH: usize = 8;
/// Bytes of an entry in the feature name table: type, bit number, name.
const FEATURE_NAME_LENGTH: usize = 48;
/// Feature type of an incompatible feature in the feature name table.
const FEATURE_TYPE_INCOMPATIBLE: u8 = 0;

/// A header extension, known or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extension {
    /// Its type, never [`END`].
    pub magic: u32,
    /// Its data, without the padding to a multiple of 8 bytes.
    pub data: Vec<u8>,
}

impl Extension {
    /// Bytes in the header: frame, data, padding.
    pub fn encoded_length(&self) -> usize {
        FRAME_LENGTH + self.data.len().next_multiple_of(8)
    }
}

/// The structure that an error about an extension names.
pub(crate) fn structure(magic: u32) -> Structure {
    match magic {
        BACKING_FORMAT => Structure::BackingFormat,
        BITMAPS => Structure::Bitmaps,
        ENCRYPTION_HEADER => Structure::EncryptionHeader,
        _ => Structure::Extension { magic },
    }
}

/// Reads the extensions from `start` to the end mark, or to `end`, the first byte that cannot belong to them. `bytes`
/// is the available part of the header's cluster; no allocation is larger than it. If the area is damaged, returns the
/// extensions before the damage, and the damage.
pub(crate) fn parse_all(bytes: &[u8], start: usize, end: usize) -> (Vec<Extension>, Option<FormatError>) {
    let mut extensions = Vec::new();
    let damage = parse_into(&mut extensions, bytes, start, end).err();
    (extensions, damage)
}

fn parse_into(
    extensions: &mut Vec<Extension>,
    bytes: &[u8],
    start: usize,
    end: usize,
) -> Result<(), FormatError> {
    let mut at = start;
    // Past the end of a short file all bytes read as zero, which is an end mark.
    while at < bytes.len() && at < end {
        let room = end - at;
        if room < FRAME_LENGTH {
            let rest = &bytes[at..end.min(bytes.len())];
            if rest.iter().all(|byte| *byte == 0) {
                break;
            }
            let kind = FormatErrorKind::ExtensionCut { room: room as u64 };
            return Err(FormatError::new(kind, Structure::Extensions, at));
        }
        let Some((frame, rest)) = bytes[at..].split_first_chunk::<FRAME_LENGTH>() else {
            return Err(truncated(Structure::Extensions, at, FRAME_LENGTH, bytes.len()));
        };
        let [magic, length] =
            [[frame[0], frame[1], frame[2], frame[3]], [frame[4], frame[5], frame[6], frame[7]]]
                .map(u32::from_be_bytes);
        if magic == END {
            break;
        }
        let room = room - FRAME_LENGTH;
        let length = length as usize;
        if length > room {
            let kind = FormatErrorKind::ExtensionTooLong { length: length as u64, room: room as u64 };
            return Err(FormatError::new(kind, structure(magic), at));
        }
        let Some(data) = rest.get(..length) else {
            return Err(truncated(structure(magic), at, FRAME_LENGTH + length, bytes.len()));
        };
        extensions.push(Extension { magic, data: data.to_vec() });
        // No overflow: the length is at most a cluster.
        at += FRAME_LENGTH + length.next_multiple_of(8);
    }
    Ok(())
}

fn truncated(structure: Structure, at: usize, length: usize, available: usize) -> FormatError {
    let kind = FormatErrorKind::Truncated { needed: (at + length) as u64, available: available as u64 };
    FormatError::new(kind, structure, at)
}

/// The backing file's format; the last one if, against the spec, there are several.
pub(crate) fn backing_format(extensions: &[Extension]) -> Option<String> {
    let extension = extensions.iter().rfind(|extension| extension.magic == BACKING_FORMAT)?;
    let name = String::from_utf8_lossy(&extension.data).into_owned();
    (!name.is_empty()).then_some(name)
}

/// The name that the image gives to an incompatible feature bit.
pub(crate) fn incompatible_feature_name(extensions: &[Extension], bit: u32) -> Option<Vec<u8>> {
    let tables = extensions.iter().filter(|extension| extension.magic == FEATURE_NAMES);
    let mut entries = tables.flat_map(|table| table.data.as_chunks::<FEATURE_NAME_LENGTH>().0);
    let entry = entries.find(|entry| entry[0] == FEATURE_TYPE_INCOMPATIBLE && u32::from(entry[1]) == bit)?;
    let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
    (!name.is_empty()).then(|| name.to_vec())
}
