//! Errors of a header: the kind, the structure and the offset.
//!
//! Owns [`FormatError`], for broken values. A valid feature that Strata does not support is an
//! [`Unsupported`](crate::Unsupported), and a broken table entry is an [`EntryError`](crate::EntryError).

use std::fmt;

use thiserror::Error;

use crate::address::HostOffset;

/// A header that cannot be read or cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("{structure} (byte {offset}): {kind}")]
pub struct FormatError {
    /// The kind of error.
    pub kind: FormatErrorKind,
    /// The structure with the error.
    pub structure: Structure,
    /// Where the structure, or the field that describes it, begins in the image file, in bytes.
    pub offset: HostOffset,
}

impl FormatError {
    /// The error without the advice behind the semicolon, for tools that can repair the image.
    pub fn without_advice(&self) -> String {
        let text = self.to_string();
        text.split("; the image is").next().unwrap_or_default().to_owned()
    }

    pub(crate) fn new(kind: FormatErrorKind, structure: Structure, offset: usize) -> FormatError {
        FormatError { kind, structure, offset: HostOffset(offset as u64) }
    }
}

/// The part of the header that an error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Structure {
    /// The header as a whole.
    Header,
    /// The field with the header's length.
    HeaderLength,
    /// The field with the cluster size's logarithm.
    ClusterBits,
    /// The field with the refcount width's logarithm.
    RefcountOrder,
    /// The active L1 table.
    L1Table,
    /// The refcount table.
    RefcountTable,
    /// The snapshot table.
    SnapshotTable,
    /// The field with the compression type.
    CompressionType,
    /// The name of the backing file.
    BackingFile,
    /// The header extension with the backing file's format.
    BackingFormat,
    /// The header extension that describes bitmaps.
    Bitmaps,
    /// The header extension that points to the encryption header.
    EncryptionHeader,
    /// The area of the header extensions.
    Extensions,
    /// Any other header extension.
    Extension {
        /// Its type.
        magic: u32,
    },
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Structure::Header => f.write_str("header"),
            Structure::HeaderLength => f.write_str("header length"),
            Structure::ClusterBits => f.write_str("cluster bits"),
            Structure::RefcountOrder => f.write_str("refcount order"),
            Structure::L1Table => f.write_str("L1 table"),
            Structure::RefcountTable => f.write_str("refcount table"),
            Structure::SnapshotTable => f.write_str("snapshot table"),
            Structure::CompressionType => f.write_str("compression type"),
            Structure::BackingFile => f.write_str("backing file name"),
            Structure::BackingFormat => f.write_str("backing format extension"),
            Structure::Bitmaps => f.write_str("bitmaps extension"),
            Structure::EncryptionHeader => f.write_str("encryption header extension"),
            Structure::Extensions => f.write_str("header extensions"),
            Structure::Extension { magic } => write!(f, "header extension {magic:#010x}"),
        }
    }
}

/// The kinds of errors in a structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum FormatErrorKind {
    /// The magic is not qcow2's.
    #[error("not a qcow2 image (magic {magic:#010x})")]
    BadMagic {
        /// The first four bytes.
        magic: u32,
    },
    /// A version that this crate does not know.
    #[error(
        "version {version} is not known, only versions 2 and 3: convert the image with qemu-img convert -O qcow2"
    )]
    UnknownVersion {
        /// The version.
        version: u32,
    },
    /// The file, or the part of it that the caller read, ends within the structure.
    #[error("cut short: it needs {needed} bytes and has {available}; the image is incomplete, copy it again")]
    Truncated {
        /// Bytes from the start of the file that the structure needs.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// A value outside its range.
    #[error("{value} is not within {min} to {max}; the image is damaged, restore it from a copy")]
    OutOfRange {
        /// The value.
        value: u64,
        /// The least allowed.
        min: u64,
        /// The most allowed.
        max: u64,
    },
    /// A value that must be a multiple of another.
    #[error("{value:#x} is not a multiple of {unit}; the image is damaged, restore it from a copy")]
    Unaligned {
        /// The value.
        value: u64,
        /// The unit.
        unit: u64,
    },
    /// A table that ends past the largest offset of a file.
    #[error(
        "{length} bytes at {start:#x} end past the largest offset of a file; the image is damaged, restore it from a copy"
    )]
    PastEnd {
        /// Where the table begins.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// A table in the header's cluster.
    #[error("it overlaps the header; the image is damaged, restore it from a copy")]
    OverlapsHeader,
    /// The L1 table cannot map the whole disk.
    #[error(
        "{entries} entries, but the disk's size needs {needed}; the image is damaged, restore it from a copy"
    )]
    TooFewL1Entries {
        /// Entries of the table.
        entries: u64,
        /// Entries needed.
        needed: u64,
    },
    /// The disk is larger than the largest L1 table can map with this cluster size.
    #[error("the disk's size needs {needed} entries, but at most {max} are possible: choose larger clusters")]
    DiskTooLarge {
        /// Entries needed.
        needed: u64,
        /// The most that a table may have.
        max: u64,
    },
    /// Of the compression type and its incompatible feature bit, only one means deflate.
    #[error("type {compression_type} disagrees with incompatible feature bit 3; the image is damaged")]
    CompressionMismatch {
        /// The compression type.
        compression_type: u8,
    },
    /// A header extension longer than the area left for extensions.
    #[error("it claims {length} bytes of data, but only {room} are left; the image is damaged")]
    ExtensionTooLong {
        /// Bytes claimed.
        length: u64,
        /// Bytes left.
        room: u64,
    },
    /// The type and the length of a header extension do not fit in the area left for extensions.
    #[error(
        "an extension begins with {room} bytes left, too few for its type and its length; the image is damaged"
    )]
    ExtensionCut {
        /// Bytes left.
        room: u64,
    },
    /// A reserved field is in use.
    #[error("a reserved field holds {value:#x} instead of 0; the image is damaged")]
    Reserved {
        /// Its value.
        value: u64,
    },
    /// An encryption header, but an encryption method without one.
    #[error(
        "crypt method {method} has no such extension; the image is damaged, and must not be read as unencrypted"
    )]
    NotEncrypted {
        /// The encryption method in the header.
        method: u32,
    },
    /// On writing: the contents of the first cluster do not fit in it.
    #[error(
        "{needed} bytes do not fit in the first cluster of {room}: choose larger clusters or a shorter name"
    )]
    HeaderFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes in a cluster.
        room: u64,
    },
    /// On writing: two fields for the same fact disagree, or version 2 has no field for it.
    #[error("its fields disagree with each other or with the image's version, so it cannot be written")]
    Inconsistent,
}
