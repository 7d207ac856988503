//! Feature bits, and the valid features that Strata does not support.
//!
//! Owns the bits' names and the reasons to refuse an image that is not broken. It does not decide when to refuse.

use names::shown;
use thiserror::Error;

use crate::error::FormatError;

/// Incompatible feature bits: an image with an unknown bit must not be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Incompatible(pub u64);

impl Incompatible {
    /// Refcounts may be wrong: repair them before use.
    pub const DIRTY: Incompatible = Incompatible(1);
    /// Any metadata may be wrong: do not write.
    pub const CORRUPT: Incompatible = Incompatible(1 << 1);
    /// Guest data is in another file.
    pub const DATA_FILE: Incompatible = Incompatible(1 << 2);
    /// Compressed clusters are not deflate.
    pub const COMPRESSION: Incompatible = Incompatible(1 << 3);
    /// L2 entries have 128 bits.
    pub const EXTENDED_L2: Incompatible = Incompatible(1 << 4);
    /// The bits that this crate knows.
    pub const KNOWN: Incompatible = Incompatible(0x1f);

    /// True if all of `features` are set.
    pub const fn contains(self, features: Incompatible) -> bool {
        self.0 & features.0 == features.0
    }

    /// The union with `features`.
    #[must_use]
    pub const fn with(self, features: Incompatible) -> Incompatible {
        Incompatible(self.0 | features.0)
    }

    /// The bits without `features`.
    #[must_use]
    pub const fn without(self, features: Incompatible) -> Incompatible {
        Incompatible(self.0 & !features.0)
    }

    /// The number of the lowest bit that this crate does not know.
    pub const fn unknown_bit(self) -> Option<u32> {
        match self.without(Incompatible::KNOWN).0 {
            0 => None,
            unknown => Some(unknown.trailing_zeros()),
        }
    }
}

/// Compatible feature bit 0: refcounts may be written late while the image is marked dirty.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit 0: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature bit 1: the external data file can be read as a raw image.
pub const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;

/// Autoclear features 2 to 63 while a daemon keeps a journal of the image: the number in bits 2 to 55, and this above
/// them. The format defines none of these bits, so every other program clears them when it opens the image for writing.
const JOURNAL_TAG: u64 = 0x53 << JOURNAL_TAG_SHIFT;
const JOURNAL_TAG_SHIFT: u32 = 56;
/// Autoclear features 0 and 1, which the format defines.
const AUTOCLEAR_DEFINED: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE;

/// The number of a journal: it changes with each journal, and goes when the image is written without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalNumber(u64);

impl JournalNumber {
    /// A number made of 54 bits of these.
    pub const fn of_bits(random: u64) -> Self {
        JournalNumber(random >> 10)
    }

    /// The number in the autoclear features of a version 3 header.
    pub fn of_autoclear(autoclear: u64) -> Option<Self> {
        let tagged = autoclear >> JOURNAL_TAG_SHIFT == JOURNAL_TAG >> JOURNAL_TAG_SHIFT;
        tagged.then_some(JournalNumber((autoclear & !JOURNAL_TAG) >> 2))
    }

    /// The number itself, below 2^54.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// These autoclear features with a journal's number, or without one. No feature that the format does not define stays.
pub fn autoclear_with_journal(autoclear: u64, number: Option<JournalNumber>) -> u64 {
    let journal = number.map_or(0, |number| JOURNAL_TAG | number.0 << 2);
    autoclear & AUTOCLEAR_DEFINED | journal
}

/// The compression method of compressed clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// A deflate stream without a header, written with a window of 4 KiB.
    Deflate,
    /// Zstandard: a frame, or several.
    Zstd,
}

/// A valid feature because of which Strata cannot serve or cannot write an image.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Unsupported {
    /// An incompatible feature that this crate does not know.
    #[error("incompatible feature bit {bit} ({}) is not known: use the tool that created the image",
        name.as_ref().map_or_else(|| "the image gives it no name".to_owned(), |name| shown(name).to_string()))]
    IncompatibleFeature {
        /// Its number, 0 to 63.
        bit: u32,
        /// Its name if the image's feature name table has one.
        name: Option<Vec<u8>>,
    },
    /// The image is encrypted.
    #[error("the image is encrypted ({}), which is not supported: decrypt it with qemu-img convert", method_name(*method))]
    Encryption {
        /// The header's crypt method.
        method: u32,
    },
    /// The compression type is neither deflate nor zstd.
    #[error(
        "compression type {compression_type} is not known: convert the image with \
        qemu-img convert -o compression_type=zstd"
    )]
    Compression {
        /// The header's compression type.
        compression_type: u8,
    },
    /// Snapshots of a disk with an external data file, which cannot hold data of the past.
    #[error(
        "the image has internal snapshots and keeps its data in an external data file, so that every write would \
        change the snapshots too: open it read-only"
    )]
    SnapshotsWithDataFile,
    /// A disk larger than an external data file can hold.
    #[error("the disk is larger than 2^56 bytes, the largest offset of data in an external data file")]
    DataFileTooLarge,
    /// A header extension is damaged: what the extensions behind it require of a writer is not known.
    #[error("{source}; the extensions after it cannot be read: open the image read-only")]
    DamagedExtensions {
        /// The damage and its offset.
        source: FormatError,
    },
    /// The corrupt bit is set: any metadata may be wrong.
    #[error("the image is marked corrupt: repair it with `strata check -r all`, or open it read-only")]
    Corrupt,
}

fn method_name(method: u32) -> &'static str {
    match method {
        1 => "AES",
        2 => "LUKS",
        _ => "by an unknown method",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_and_unknown_bits_are_distinguished() {
        let features = Incompatible::DIRTY.with(Incompatible::EXTENDED_L2);
        assert!(features.contains(Incompatible::DIRTY) && !features.contains(Incompatible::CORRUPT));
        assert!(!features.contains(Incompatible::DIRTY.with(Incompatible::CORRUPT)));
        assert_eq!(features.without(Incompatible::DIRTY), Incompatible::EXTENDED_L2);
        assert_eq!(Incompatible::KNOWN.unknown_bit(), None);
        assert_eq!(Incompatible(1 << 5 | 1 << 63 | 1).unknown_bit(), Some(5));
        assert_eq!(Incompatible(1 << 63).unknown_bit(), Some(63));
    }

    #[test]
    fn a_journals_number_fits_beside_the_features_of_the_format() {
        for random in [0, 1 << 10, u64::MAX, 0x0123_4567_89ab_cdef] {
            let number = JournalNumber::of_bits(random);
            let autoclear = autoclear_with_journal(AUTOCLEAR_DEFINED | 1 << 40, Some(number));
            assert_eq!(JournalNumber::of_autoclear(autoclear), Some(number));
            assert_eq!(autoclear & AUTOCLEAR_DEFINED, AUTOCLEAR_DEFINED);
            assert_eq!(autoclear_with_journal(autoclear, None), AUTOCLEAR_DEFINED);
        }
        for other in [0, 3, 1 << 40, 0x54 << 56, u64::MAX] {
            assert_eq!(JournalNumber::of_autoclear(other), None, "{other:#x}");
        }
    }

    #[test]
    fn a_refusal_names_the_feature() {
        let named = Unsupported::IncompatibleFeature { bit: 7, name: Some("time travel".into()) };
        assert!(named.to_string().starts_with("incompatible feature bit 7 (time travel) is not known"));
        let unnamed = Unsupported::IncompatibleFeature { bit: 7, name: None };
        assert!(unnamed.to_string().contains("the image gives it no name"));
        assert!(Unsupported::Encryption { method: 2 }.to_string().contains("LUKS"));
        assert!(Unsupported::Compression { compression_type: 2 }.to_string().contains("type 2 is not known"));
    }
}
