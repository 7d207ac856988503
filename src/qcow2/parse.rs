//! Header bytes to a [`Header`].
//!
//! Owns the order of reading: a length is checked before the bytes that it covers are read. The bytes are untrusted: no
//! input causes a panic, or an allocation larger than the input.

use crate::address::HostOffset;
use crate::error::{FormatError, FormatErrorKind, Structure};
use crate::extension;
use crate::feature::Incompatible;
use crate::geometry::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, REFCOUNT_ORDER_V2, Version};
use crate::header::{BACKING_FILE_LENGTH_MAX, HEADER_LENGTH_V2, HEADER_LENGTH_V3_MIN, Header, MAGIC};
use crate::position;

/// Bytes needed for [`Header::cluster_size_hint`].
const PREFIX_NEEDED: usize = position::CLUSTER_BITS + 4;

impl Header {
    /// Bytes from the start of the file to pass to [`Header::cluster_size_hint`]; fewer if the file is shorter.
    pub const PREFIX_MAX: usize = 4096;

    /// How many bytes from the start of the file [`Header::parse`] needs: one cluster, or the file if it is shorter.
    ///
    /// # Errors
    /// If the magic is not qcow2's, or the version or the cluster size is invalid.
    pub fn cluster_size_hint(prefix: &[u8]) -> Result<u64, FormatError> {
        let (_, cluster_bits) = parse_prefix(prefix)?;
        Ok(1 << cluster_bits)
    }

    /// Parses a header from the image's first cluster, or from the whole file if it is shorter; bytes behind the
    /// cluster are ignored. `file_length` is the file's length in bytes. Tables past the end of the file are no error
    /// here.
    ///
    /// # Errors
    /// On every value that breaks the format. Valid features that Strata does not support pass; see
    /// [`Header::unsupported`].
    pub fn parse(first_cluster: &[u8], file_length: u64) -> Result<Header, FormatError> {
        let header = Self::parse_fields(first_cluster, file_length)?;
        header.validate()?;
        Ok(header)
    }

    /// As [`Header::parse`], for an image check. If the fields of the refcount table or the snapshot table are
    /// invalid, the header is returned without that table. Neither is needed to find the guest's data.
    ///
    /// # Errors
    /// On every other value that breaks the format.
    pub fn salvage(first_cluster: &[u8], file_length: u64) -> Result<Salvaged, FormatError> {
        let mut header = Self::parse_fields(first_cluster, file_length)?;
        header.validate_sizes()?;
        let refcount_table = header.validate_refcount_table().err();
        if refcount_table.is_some() {
            // The smallest valid table; it is never read.
            (header.refcount_table_offset, header.refcount_table_clusters) = (HostOffset(0), 0);
        }
        let snapshots = header.validate_snapshots().err();
        if snapshots.is_some() {
            (header.snapshots, header.snapshots_offset) = (0, HostOffset(0));
        }
        header.validate_rest()?;
        Ok(Salvaged { header, refcount_table, snapshots })
    }

    /// Reads the fields, and checks only the lengths by which they are found.
    fn parse_fields(first_cluster: &[u8], file_length: u64) -> Result<Header, FormatError> {
        let (version, cluster_bits) = parse_prefix(first_cluster)?;
        let cluster_size = 1_usize << cluster_bits;
        let wanted = file_length.min(cluster_size as u64);
        if (first_cluster.len() as u64) < wanted {
            return Err(truncated(Structure::Header, 0, wanted, first_cluster));
        }
        let bytes = &first_cluster[..first_cluster.len().min(cluster_size)];
        let header_length = parse_header_length(bytes, version, cluster_size)?;
        let backing = parse_backing_file(bytes, header_length, cluster_size)?;
        let extensions_end = backing.offset.unwrap_or(cluster_size);
        let (extensions, damaged_extensions) = extension::parse_all(bytes, header_length, extensions_end);

        let v3 = version == Version::V3;
        let u64_v3 = |at| if v3 { u64_at(bytes, at) } else { 0 };
        // Fields beyond the header's length are absent and count as zero: extensions begin there.
        let fields = &bytes[..header_length];
        Ok(Header {
            version,
            cluster_bits,
            size: u64_at(bytes, position::SIZE),
            crypt_method: u32_at(bytes, position::CRYPT_METHOD),
            l1_entries: u32_at(bytes, position::L1_ENTRIES),
            l1_offset: HostOffset(u64_at(bytes, position::L1_OFFSET)),
            refcount_table_offset: HostOffset(u64_at(bytes, position::REFCOUNT_TABLE_OFFSET)),
            refcount_table_clusters: u32_at(bytes, position::REFCOUNT_TABLE_CLUSTERS),
            snapshots: u32_at(bytes, position::SNAPSHOTS),
            snapshots_offset: HostOffset(u64_at(bytes, position::SNAPSHOTS_OFFSET)),
            incompatible: Incompatible(u64_v3(position::INCOMPATIBLE)),
            compatible: u64_v3(position::COMPATIBLE),
            autoclear: u64_v3(position::AUTOCLEAR),
            refcount_order: if v3 { u32_at(bytes, position::REFCOUNT_ORDER) } else { REFCOUNT_ORDER_V2 },
            header_length: header_length as u32,
            compression_type: fields.get(position::COMPRESSION_TYPE).copied().unwrap_or(0),
            unknown_fields: fields.get(position::COMPRESSION_TYPE + 1..).unwrap_or_default().to_vec(),
            backing_file: backing.name,
            backing_format: extension::backing_format(&extensions),
            extensions,
            damaged_extensions,
        })
    }
}

/// A header from which a table may be missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Salvaged {
    /// The header, without the tables for which an error is given below.
    pub header: Header,
    /// The error in the refcount table's fields.
    pub refcount_table: Option<FormatError>,
    /// The error in the snapshot table's fields.
    pub snapshots: Option<FormatError>,
}

/// Reads and checks magic, version and cluster bits.
fn parse_prefix(bytes: &[u8]) -> Result<(Version, u32), FormatError> {
    let magic = u32_at(bytes, position::MAGIC);
    if magic != MAGIC {
        return Err(FormatError::new(
            FormatErrorKind::BadMagic { magic },
            Structure::Header,
            position::MAGIC,
        ));
    }
    if bytes.len() < PREFIX_NEEDED {
        return Err(truncated(Structure::Header, 0, PREFIX_NEEDED as u64, bytes));
    }
    let version = match u32_at(bytes, position::VERSION) {
        2 => Version::V2,
        3 => Version::V3,
        version => {
            let kind = FormatErrorKind::UnknownVersion { version };
            return Err(FormatError::new(kind, Structure::Header, position::VERSION));
        }
    };
    let cluster_bits = u32_at(bytes, position::CLUSTER_BITS);
    if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&cluster_bits) {
        let kind = FormatErrorKind::OutOfRange {
            value: cluster_bits.into(),
            min: CLUSTER_BITS_MIN.into(),
            max: CLUSTER_BITS_MAX.into(),
        };
        return Err(FormatError::new(kind, Structure::ClusterBits, position::CLUSTER_BITS));
    }
    Ok((version, cluster_bits))
}

/// The header's length: at most a cluster, and all of it is in `bytes`.
fn parse_header_length(bytes: &[u8], version: Version, cluster_size: usize) -> Result<usize, FormatError> {
    let least = match version {
        Version::V2 => HEADER_LENGTH_V2,
        Version::V3 => HEADER_LENGTH_V3_MIN,
    } as usize;
    if bytes.len() < least {
        return Err(truncated(Structure::Header, 0, least as u64, bytes));
    }
    let length = match version {
        Version::V2 => least,
        Version::V3 => u32_at(bytes, position::HEADER_LENGTH) as usize,
    };
    let error = |kind| FormatError::new(kind, Structure::HeaderLength, position::HEADER_LENGTH);
    if !(least..=cluster_size).contains(&length) {
        let [value, min, max] = [length, least, cluster_size].map(|length| length as u64);
        return Err(error(FormatErrorKind::OutOfRange { value, min, max }));
    }
    if !length.is_multiple_of(8) {
        return Err(error(FormatErrorKind::Unaligned { value: length as u64, unit: 8 }));
    }
    if bytes.len() < length {
        return Err(truncated(Structure::Header, 0, length as u64, bytes));
    }
    Ok(length)
}

/// The backing file's name and its offset, which also ends the area of the extensions.
struct BackingFile {
    offset: Option<usize>,
    name: Option<Vec<u8>>,
}

fn parse_backing_file(
    bytes: &[u8],
    header_length: usize,
    cluster_size: usize,
) -> Result<BackingFile, FormatError> {
    let offset = u64_at(bytes, position::BACKING_FILE_OFFSET);
    if offset == 0 {
        return Ok(BackingFile { offset: None, name: None });
    }
    let [min, max] = [header_length, cluster_size - 1].map(|length| length as u64);
    if !(min..=max).contains(&offset) {
        let kind = FormatErrorKind::OutOfRange { value: offset, min, max };
        return Err(FormatError::new(kind, Structure::BackingFile, position::BACKING_FILE_OFFSET));
    }
    // The cast is exact: the offset is within a cluster.
    let offset = offset as usize;
    let length = u32_at(bytes, position::BACKING_FILE_LENGTH) as usize;
    let length_max = BACKING_FILE_LENGTH_MAX.min(cluster_size - offset);
    if length > length_max {
        let kind = FormatErrorKind::OutOfRange { value: length as u64, min: 0, max: length_max as u64 };
        return Err(FormatError::new(kind, Structure::BackingFile, position::BACKING_FILE_LENGTH));
    }
    // A name cut short by the file's end could be another file's name.
    let Some(name) = bytes.get(offset..offset + length) else {
        return Err(truncated(Structure::BackingFile, offset, (offset + length) as u64, bytes));
    };
    Ok(BackingFile { offset: Some(offset), name: (length > 0).then(|| name.to_vec()) })
}

fn truncated(structure: Structure, at: usize, needed: u64, bytes: &[u8]) -> FormatError {
    FormatError::new(FormatErrorKind::Truncated { needed, available: bytes.len() as u64 }, structure, at)
}

/// The big-endian field at a position; bytes past the end read as zero.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field_at(bytes, at))
}

/// The big-endian field at a position; bytes past the end read as zero.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field_at(bytes, at))
}

fn field_at<const LENGTH: usize>(bytes: &[u8], at: usize) -> [u8; LENGTH] {
    let mut field = [0; LENGTH];
    for (to, from) in field.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    field
}
