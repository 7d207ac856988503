//! The header's checks: every limit and one value past it, through the public interface only.
//!
//! Starts from the bytes of a small valid header and changes one field at a time.

use qcow2::extension::{BACKING_FORMAT, BITMAPS, ENCRYPTION_HEADER, FEATURE_NAMES};
use qcow2::header::HEADER_LENGTH_V3;
use qcow2::{Compression, Geometry, NewImage, position};
use qcow2::{
    FormatError, FormatErrorKind, Header, HostOffset, Incompatible, Structure, Unsupported, Version,
};

const CLUSTER: u64 = 1 << 16;
const I64_MAX: u64 = i64::MAX as u64;

/// The first cluster of a valid version 3 image of 1 GiB.
fn valid() -> Vec<u8> {
    valid_with(Version::V3, 16)
}

fn valid_with(version: Version, cluster_bits: u32) -> Vec<u8> {
    let geometry = Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, size: 1 << 20 };
    let mut bytes = NewImage::new(geometry).layout().expect("a valid geometry").swap_remove(0).1;
    // Room for two more L1 entries than needed, so that the size can be varied.
    bytes[position::L1_ENTRIES + 3] += 2;
    bytes
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn parse(bytes: &[u8]) -> Result<Header, FormatError> {
    Header::parse(bytes, bytes.len() as u64)
}

fn with32(at: usize, value: u32) -> Result<Header, FormatError> {
    let mut bytes = valid();
    put32(&mut bytes, at, value);
    parse(&bytes)
}

fn with64(at: usize, value: u64) -> Result<Header, FormatError> {
    let mut bytes = valid();
    put64(&mut bytes, at, value);
    parse(&bytes)
}

/// Parses a valid header with extensions, which are framed here and not by the crate under test.
fn with_extensions(
    extensions: &[(u32, &[u8])],
    change: impl FnOnce(&mut Vec<u8>),
) -> Result<Header, FormatError> {
    let mut bytes = valid();
    let mut at = HEADER_LENGTH_V3 as usize;
    for (magic, data) in extensions {
        put32(&mut bytes, at, *magic);
        put32(&mut bytes, at + 4, data.len() as u32);
        bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
        at += 8 + data.len().div_ceil(8) * 8;
    }
    change(&mut bytes);
    parse(&bytes)
}

/// The header is valid for reading and refuses writes.
fn assert_damage(
    parsed: Result<Header, FormatError>,
    structure: Structure,
    offset: u64,
    kind: FormatErrorKind,
) {
    let header = parsed.expect("a header that can be used for reading");
    let source = FormatError { kind, structure, offset: HostOffset(offset) };
    assert_eq!(header.damaged_extensions, Some(source));
    assert_eq!(header.write_refusal(), Some(Unsupported::DamagedExtensions { source }));
    assert_eq!((header.unsupported(), header.encode()), (None, Err(source)));
}

#[track_caller]
fn assert_error(
    result: Result<Header, FormatError>,
    structure: Structure,
    offset: usize,
    kind: FormatErrorKind,
) {
    assert_eq!(result, Err(FormatError { kind, structure, offset: HostOffset(offset as u64) }));
}

fn out_of_range(value: u64, min: u64, max: u64) -> FormatErrorKind {
    FormatErrorKind::OutOfRange { value, min, max }
}

fn unaligned(value: u64) -> FormatErrorKind {
    FormatErrorKind::Unaligned { value, unit: CLUSTER }
}

#[test]
fn the_magic_is_checked_first() {
    for (bytes, magic) in [(vec![], 0), (vec![b'Q', b'F'], 0x5146_0000), (vec![0x55; 4096], 0x5555_5555)] {
        assert_error(parse(&bytes), Structure::Header, 0, FormatErrorKind::BadMagic { magic });
        let error = Header::cluster_size_hint(&bytes).expect_err("no qcow2");
        assert!(error.to_string().contains("not a qcow2 image"), "{error}");
    }
}

#[test]
fn versions_other_than_2_and_3_are_refused() {
    for version in [0, 1, 4, u32::MAX] {
        let kind = FormatErrorKind::UnknownVersion { version };
        assert_error(with32(position::VERSION, version), Structure::Header, 4, kind);
    }
}

#[test]
fn cluster_bits_are_9_to_21() {
    for bits in 9..=21 {
        let bytes = valid_with(Version::V3, bits);
        assert_eq!(Header::cluster_size_hint(&bytes[..24]), Ok(1 << bits));
        assert_eq!(parse(&bytes).map(|header| header.cluster_bits), Ok(bits));
    }
    for bits in [0, 8, 22, 64, u32::MAX] {
        let kind = out_of_range(bits.into(), 9, 21);
        assert_error(with32(position::CLUSTER_BITS, bits), Structure::ClusterBits, 20, kind);
        let mut bytes = valid();
        put32(&mut bytes, position::CLUSTER_BITS, bits);
        assert!(Header::cluster_size_hint(&bytes).is_err());
    }
}

#[test]
fn extended_l2_needs_clusters_of_16_kib() {
    for (bits, good) in [(13, false), (14, true), (21, true)] {
        let mut bytes = valid_with(Version::V3, bits);
        put64(&mut bytes, position::INCOMPATIBLE, Incompatible::EXTENDED_L2.0);
        let result = parse(&bytes);
        if good {
            let header = result.expect("valid");
            assert!(header.geometry().extended_l2);
            assert_eq!(header.unsupported(), None);
            assert_eq!(header.write_refusal(), None);
        } else {
            assert_error(result, Structure::ClusterBits, 20, out_of_range(13, 14, 21));
        }
    }
}

#[test]
fn the_header_length_is_a_multiple_of_8_from_104_to_a_cluster() {
    for length in [104, 112, 120, CLUSTER as u32] {
        let header = with32(position::HEADER_LENGTH, length).expect("a valid length");
        assert_eq!(header.header_length, length);
        assert_eq!(header.unknown_fields.len(), (length as usize).saturating_sub(105));
    }
    for length in [0, 72, 103, CLUSTER as u32 + 1, u32::MAX] {
        let kind = out_of_range(length.into(), 104, CLUSTER);
        assert_error(with32(position::HEADER_LENGTH, length), Structure::HeaderLength, 100, kind);
    }
    let kind = FormatErrorKind::Unaligned { value: 108, unit: 8 };
    assert_error(with32(position::HEADER_LENGTH, 108), Structure::HeaderLength, 100, kind);
}

#[test]
fn version_2_ends_after_72_bytes() {
    let mut bytes = valid_with(Version::V2, 16);
    // Where version 3 has its fields, version 2 has extensions.
    put32(&mut bytes, 72, 0x1234_5678);
    put32(&mut bytes, 76, 3);
    bytes[80..83].copy_from_slice(b"abc");
    let header = parse(&bytes).expect("valid");
    assert_eq!((header.header_length, header.refcount_order, header.version), (72, 4, Version::V2));
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (Incompatible(0), 0, 0));
    assert_eq!(header.extensions.len(), 1);
    assert_eq!(
        (header.extensions[0].magic, header.extensions[0].data.as_slice()),
        (0x1234_5678, &b"abc"[..])
    );
}

#[test]
fn a_file_that_ends_in_the_header_is_refused() {
    let bytes = valid();
    for (length, needed) in [(4, 24), (23, 24), (24, 104), (103, 104), (104, 112), (111, 112)] {
        let kind = FormatErrorKind::Truncated { needed, available: length };
        assert_error(parse(&bytes[..length as usize]), Structure::Header, 0, kind);
    }
    let header = parse(&bytes[..112]).expect("missing bytes read as zero");
    assert_eq!(Ok(header), parse(&bytes));
}

#[test]
fn bytes_shorter_than_the_file_and_the_cluster_are_an_error() {
    let bytes = valid();
    let kind = FormatErrorKind::Truncated { needed: CLUSTER, available: 4096 };
    assert_error(Header::parse(&bytes[..4096], CLUSTER + 1), Structure::Header, 0, kind);
    assert!(Header::parse(&bytes[..4096], 4096).is_ok());
    let mut longer = bytes.clone();
    longer.resize(3 * CLUSTER as usize, 0xaa);
    assert_eq!(parse(&longer), parse(&bytes));
}

#[test]
fn the_refcount_order_is_at_most_6() {
    for order in 0..=6 {
        assert_eq!(with32(position::REFCOUNT_ORDER, order).map(|header| header.refcount_order), Ok(order));
    }
    for order in [7, 64, u32::MAX] {
        let kind = out_of_range(order.into(), 0, 6);
        assert_error(with32(position::REFCOUNT_ORDER, order), Structure::RefcountOrder, 96, kind);
    }
}

#[test]
fn the_refcount_table_has_a_valid_length_and_offset() {
    for clusters in [1, 128] {
        assert!(with32(position::REFCOUNT_TABLE_CLUSTERS, clusters).is_ok());
    }
    for clusters in [0, 129, u32::MAX] {
        let kind = out_of_range(clusters.into(), 1, 128);
        assert_error(with32(position::REFCOUNT_TABLE_CLUSTERS, clusters), Structure::RefcountTable, 56, kind);
    }
    let with_offset = |offset| with64(position::REFCOUNT_TABLE_OFFSET, offset);
    assert!(with_offset(1 << 40).is_ok(), "past the end of the file");
    assert!(with_offset(I64_MAX + 1 - 2 * CLUSTER).is_ok());
    let past_end = |start| FormatErrorKind::PastEnd { start, length: CLUSTER };
    for (offset, kind) in [
        (I64_MAX + 1 - CLUSTER, past_end(I64_MAX + 1 - CLUSTER)),
        (0_u64.wrapping_sub(CLUSTER), past_end(0_u64.wrapping_sub(CLUSTER))),
        (CLUSTER + 512, unaligned(CLUSTER + 512)),
        (0, FormatErrorKind::OverlapsHeader),
    ] {
        assert_error(with_offset(offset), Structure::RefcountTable, 48, kind);
    }
}

#[test]
fn the_l1_table_has_a_valid_length() {
    let max = 4 << 20;
    for entries in [1, 3, max] {
        assert_eq!(with32(position::L1_ENTRIES, entries).map(|header| header.l1_entries), Ok(entries));
    }
    for entries in [max + 1, u32::MAX] {
        let kind = out_of_range(entries.into(), 0, max.into());
        assert_error(with32(position::L1_ENTRIES, entries), Structure::L1Table, 36, kind);
    }
    let kind = FormatErrorKind::TooFewL1Entries { entries: 0, needed: 1 };
    assert_error(with32(position::L1_ENTRIES, 0), Structure::L1Table, 36, kind);
}

#[test]
fn the_l1_table_maps_the_whole_disk() {
    let reach = 512 << 20;
    assert!(with64(position::SIZE, 3 * reach).is_ok());
    let kind = FormatErrorKind::TooFewL1Entries { entries: 3, needed: 4 };
    assert_error(with64(position::SIZE, 3 * reach + 1), Structure::L1Table, 36, kind);
    let kind = FormatErrorKind::DiskTooLarge { needed: 1 << 35, max: 4 << 20 };
    assert_error(with64(position::SIZE, u64::MAX), Structure::L1Table, 24, kind);

    let mut bytes = valid_with(Version::V3, 21);
    put32(&mut bytes, position::L1_ENTRIES, 4 << 20);
    put64(&mut bytes, position::SIZE, 1 << 61);
    assert_eq!(parse(&bytes).map(|header| header.size), Ok(1 << 61));
    put64(&mut bytes, position::SIZE, (1 << 61) + 1);
    let kind = FormatErrorKind::DiskTooLarge { needed: (4 << 20) + 1, max: 4 << 20 };
    assert_error(parse(&bytes), Structure::L1Table, 24, kind);
}

#[test]
fn the_l1_table_has_a_valid_offset() {
    let with_offset = |offset| with64(position::L1_OFFSET, offset);
    assert!(with_offset(I64_MAX + 1 - CLUSTER).is_ok(), "three entries fit below");
    let start = I64_MAX + 1;
    for (offset, kind) in [
        (start, FormatErrorKind::PastEnd { start, length: 24 }),
        (CLUSTER - 1, unaligned(CLUSTER - 1)),
        (0, FormatErrorKind::OverlapsHeader),
    ] {
        assert_error(with_offset(offset), Structure::L1Table, 40, kind);
    }
    let mut bytes = valid();
    put64(&mut bytes, position::SIZE, 0);
    put32(&mut bytes, position::L1_ENTRIES, 0);
    put64(&mut bytes, position::L1_OFFSET, 0);
    assert!(parse(&bytes).is_ok(), "an empty disk needs no table");
}

#[test]
fn the_snapshot_table_has_a_valid_count_and_offset() {
    let with_table = |count, offset| {
        let mut bytes = valid();
        put32(&mut bytes, position::SNAPSHOTS, count);
        put64(&mut bytes, position::SNAPSHOTS_OFFSET, offset);
        parse(&bytes)
    };
    let header = with_table(65_536, 8 * CLUSTER).expect("valid");
    assert_eq!((header.snapshots, header.unsupported(), header.write_refusal()), (65_536, None, None));
    for count in [65_537, u32::MAX] {
        let kind = out_of_range(count.into(), 0, 65_536);
        assert_error(with_table(count, 8 * CLUSTER), Structure::SnapshotTable, 60, kind);
    }
    let past_end = FormatErrorKind::PastEnd { start: I64_MAX + 1 - CLUSTER, length: 40 * 2_000 };
    for (count, offset, kind) in [
        (1, 3, unaligned(3)),
        (0, 3, unaligned(3)),
        (2_000, I64_MAX + 1 - CLUSTER, past_end),
        (1, 0, FormatErrorKind::OverlapsHeader),
    ] {
        assert_error(with_table(count, offset), Structure::SnapshotTable, 64, kind);
    }
}

#[test]
fn unsupported_features_are_named() {
    let refusal = |features: u64, name: &[u8]| {
        with_extensions(&[(FEATURE_NAMES, name)], |bytes| put64(bytes, position::INCOMPATIBLE, features))
            .expect("valid")
            .unsupported()
    };
    let mut names = vec![0; 96];
    names[..12].copy_from_slice(b"\x01\x09compatible");
    names[48..61].copy_from_slice(b"\x00\x09time\x1btravel");
    let named = Unsupported::IncompatibleFeature { bit: 9, name: Some(b"time\x1btravel".to_vec()) };
    assert!(named.to_string().contains("(time\\u{1b}travel)"), "{named}");
    assert_eq!(refusal(1 << 9, &names), Some(named));
    assert_eq!(refusal(1 << 9, &names[..95]), Some(Unsupported::IncompatibleFeature { bit: 9, name: None }));
    let last = Unsupported::IncompatibleFeature { bit: 63, name: None };
    assert_eq!(refusal(1 << 63 | Incompatible::DATA_FILE.0, &names), Some(last));
    assert_eq!(refusal(Incompatible::DATA_FILE.0, &[]), None);
    assert_eq!(refusal(Incompatible::DIRTY.0, &[]), None);
    for method in [1, 2, 3] {
        let refusal = with32(position::CRYPT_METHOD, method).expect("valid").unsupported();
        assert_eq!(refusal, Some(Unsupported::Encryption { method }));
    }
}

#[test]
fn images_that_are_corrupt_are_not_written() {
    for (features, refusal) in [
        (Incompatible(0), None),
        // The refcounts of a dirty image are rebuilt before it is written.
        (Incompatible::DIRTY, None),
        (Incompatible::CORRUPT, Some(Unsupported::Corrupt)),
        (Incompatible::DIRTY.with(Incompatible::CORRUPT), Some(Unsupported::Corrupt)),
    ] {
        let header = with64(position::INCOMPATIBLE, features.0).expect("valid");
        assert_eq!(header.write_refusal(), refusal);
    }
}

#[test]
fn compression_type_and_its_feature_bit_agree() {
    let with_type = |compression_type, features: u64, length| {
        let mut bytes = valid();
        bytes[position::COMPRESSION_TYPE] = compression_type;
        put64(&mut bytes, position::INCOMPATIBLE, features);
        put32(&mut bytes, position::HEADER_LENGTH, length);
        parse(&bytes)
    };
    let bit = Incompatible::COMPRESSION.0;
    assert_eq!(with_type(0, 0, 112).expect("valid").compression(), Some(Compression::Deflate));
    let zstd = with_type(1, bit, 112).expect("valid");
    assert_eq!((zstd.unsupported(), zstd.compression()), (None, Some(Compression::Zstd)));
    for compression_type in [2, 255] {
        let header = with_type(compression_type, bit, 112).expect("valid");
        assert_eq!(header.unsupported(), Some(Unsupported::Compression { compression_type }));
    }
    for (compression_type, features, length) in [(0, bit, 112), (1, 0, 112), (0, bit, 104)] {
        let kind = FormatErrorKind::CompressionMismatch { compression_type };
        let result = with_type(compression_type, features, length);
        assert_error(result, Structure::CompressionType, 104, kind);
    }
}

#[test]
fn the_backing_file_name_is_bounded() {
    let with_name = |offset, length| {
        let mut bytes = valid();
        put64(&mut bytes, position::BACKING_FILE_OFFSET, offset);
        put32(&mut bytes, position::BACKING_FILE_LENGTH, length);
        bytes[1024..2048].fill(b'n');
        parse(&bytes)
    };
    let name_length =
        |result: Result<Header, FormatError>| result.map(|h| h.backing_file.map(|name| name.len()));
    assert_eq!(name_length(with_name(1024, 1023)), Ok(Some(1023)));
    assert_eq!(name_length(with_name(1024, 0)), Ok(None));
    assert_eq!(name_length(with_name(0, u32::MAX)), Ok(None), "without an offset there is no name");
    assert_eq!(name_length(with_name(112, 1)), Ok(Some(1)));
    assert_eq!(name_length(with_name(CLUSTER - 1, 1)), Ok(Some(1)));
    for (offset, length, max) in [(1024, 1024, 1023), (1024, u32::MAX, 1023), (CLUSTER - 1, 2, 1)] {
        let kind = out_of_range(length.into(), 0, max);
        assert_error(with_name(offset, length), Structure::BackingFile, 16, kind);
    }
    for offset in [1, 111, CLUSTER, u64::MAX] {
        let kind = out_of_range(offset, 112, CLUSTER - 1);
        assert_error(with_name(offset, 4), Structure::BackingFile, 8, kind);
    }
}

#[test]
fn a_name_that_the_file_cuts_short_is_refused() {
    let mut bytes = valid();
    put64(&mut bytes, position::BACKING_FILE_OFFSET, 1024);
    put32(&mut bytes, position::BACKING_FILE_LENGTH, 8);
    bytes[1024..1032].copy_from_slice(b"base.raw");
    assert_eq!(
        parse(&bytes[..1032]).expect("all there").backing_file.as_deref(),
        Some(b"base.raw".as_slice())
    );
    let kind = FormatErrorKind::Truncated { needed: 1032, available: 1031 };
    assert_error(parse(&bytes[..1031]), Structure::BackingFile, 1024, kind);
}

#[test]
fn extensions_end_at_the_mark_the_name_or_the_cluster() {
    let header = with_extensions(&[(7, b"seven"), (7, b""), (8, b"12345678")], |_| {}).expect("valid");
    let found: Vec<(u32, &[u8])> = header.extensions.iter().map(|e| (e.magic, e.data.as_slice())).collect();
    assert_eq!(found, [(7, &b"seven"[..]), (7, b""), (8, b"12345678")]);

    let room = CLUSTER - 120;
    let fill = |length: u64, change: fn(&mut Vec<u8>)| {
        let mut bytes = valid();
        bytes[112..].fill(0xcc);
        put32(&mut bytes, 116, length as u32);
        change(&mut bytes);
        parse(&bytes)
    };
    assert_eq!(fill(room, |_| {}).map(|header| header.extensions[0].data.len() as u64), Ok(room));
    let too_long = |length, room| FormatErrorKind::ExtensionTooLong { length, room };
    let structure = Structure::Extension { magic: 0xcccc_cccc };
    assert_damage(fill(room + 1, |_| {}), structure, 112, too_long(room + 1, room));
    let most = u64::from(u32::MAX);
    assert_damage(fill(most, |_| {}), structure, 112, too_long(most, room));

    let name_at_160 = |bytes: &mut Vec<u8>| {
        put64(bytes, position::BACKING_FILE_OFFSET, 160);
        put32(bytes, position::BACKING_FILE_LENGTH, 4);
    };
    assert_eq!(fill(40, name_at_160).map(|header| header.extensions.len()), Ok(1));
    assert_damage(fill(41, name_at_160), structure, 112, too_long(41, 40));
}

#[test]
fn an_area_too_short_for_another_extension_holds_none() {
    for room in 1..8_u64 {
        let mut bytes = valid();
        put32(&mut bytes, 112, 7);
        put32(&mut bytes, 116, 8);
        bytes[128..160].fill(0);
        put64(&mut bytes, position::BACKING_FILE_OFFSET, 128 + room);
        put32(&mut bytes, position::BACKING_FILE_LENGTH, 4);
        bytes[128 + room as usize..][..4].copy_from_slice(b"base");
        let header = parse(&bytes).expect("an end mark without its length");
        assert_eq!((header.extensions.len(), header.damaged_extensions), (1, None), "{room}");
        // The start of a type, or of a type and a length of 0x7fffffff.
        let start = [0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff];
        bytes[128..128 + room as usize].copy_from_slice(&start[..room as usize]);
        assert_damage(parse(&bytes), Structure::Extensions, 128, FormatErrorKind::ExtensionCut { room });
    }
}

#[test]
fn an_extension_that_the_file_cuts_short_is_damage() {
    let mut bytes = valid();
    put32(&mut bytes, 112, 7);
    put32(&mut bytes, 116, 16);
    assert!(parse(&bytes[..136]).is_ok());
    let kind = FormatErrorKind::Truncated { needed: 136, available: 135 };
    assert_damage(parse(&bytes[..135]), Structure::Extension { magic: 7 }, 112, kind);
    let kind = FormatErrorKind::Truncated { needed: 120, available: 119 };
    assert_damage(parse(&bytes[..119]), Structure::Extensions, 112, kind);
}

#[test]
fn the_backing_format_is_read_from_its_extension() {
    let format = |data: &[u8]| with_extensions(&[(BACKING_FORMAT, data)], |_| {}).map(|h| h.backing_format);
    assert_eq!(format(b"qcow2"), Ok(Some("qcow2".into())));
    assert_eq!(format(b"fifteen-letters"), Ok(Some("fifteen-letters".into())));
    assert_eq!(format(b""), Ok(None));
    assert_eq!(format(b"\xff"), Ok(Some("\u{fffd}".into())));
    let error = with_extensions(&[(BACKING_FORMAT, b"sixteen--letters")], |_| {});
    assert_error(error, Structure::BackingFormat, 112, out_of_range(16, 0, 15));
}

#[test]
fn the_bitmaps_extension_is_bounded() {
    let bitmaps = |count: u32, reserved: u32, size: u64, offset: u64| {
        let mut data = Vec::new();
        data.extend_from_slice(&count.to_be_bytes());
        data.extend_from_slice(&reserved.to_be_bytes());
        data.extend_from_slice(&size.to_be_bytes());
        data.extend_from_slice(&offset.to_be_bytes());
        data
    };
    let with_bitmaps = |data: &[u8], autoclear| {
        with_extensions(&[(BITMAPS, data)], |bytes| put64(bytes, position::AUTOCLEAR, autoclear))
    };
    let size_max = 65_535 << 10;
    for good in [bitmaps(1, 0, 1, CLUSTER), bitmaps(65_535, 0, size_max, CLUSTER)] {
        assert!(with_bitmaps(&good, 1).is_ok());
    }
    let start = I64_MAX + 1 - CLUSTER;
    for (bad, kind) in [
        (bitmaps(0, 0, 1, CLUSTER), out_of_range(0, 1, 65_535)),
        (bitmaps(65_536, 0, 1, CLUSTER), out_of_range(65_536, 1, 65_535)),
        (bitmaps(1, 5, 1, CLUSTER), FormatErrorKind::Reserved { value: 5 }),
        (bitmaps(1, 0, 0, CLUSTER), out_of_range(0, 1, size_max)),
        (bitmaps(1, 0, size_max + 1, CLUSTER), out_of_range(size_max + 1, 1, size_max)),
        (bitmaps(1, 0, 1, 1), unaligned(1)),
        (bitmaps(1, 0, CLUSTER, start), FormatErrorKind::PastEnd { start, length: CLUSTER }),
        (bitmaps(1, 0, 1, 0), FormatErrorKind::OverlapsHeader),
    ] {
        assert_error(with_bitmaps(&bad, 1), Structure::Bitmaps, 112, kind);
        assert!(with_bitmaps(&bad, 0).is_ok(), "without the autoclear bit the contents are ignored");
    }
    for length in [0, 23, 25, 32] {
        let kind = out_of_range(length, 24, 24);
        assert_error(with_bitmaps(&vec![0; length as usize], 0), Structure::Bitmaps, 112, kind);
    }
}

#[test]
fn an_encryption_header_needs_encryption() {
    let with_method = |method, data: &[u8]| {
        with_extensions(&[(ENCRYPTION_HEADER, data)], |bytes| put32(bytes, position::CRYPT_METHOD, method))
    };
    let mut place = [0; 16];
    put64(&mut place, 0, CLUSTER);
    put64(&mut place, 8, 4096);
    assert!(with_method(2, &place).is_ok());
    for method in [0, 1] {
        let kind = FormatErrorKind::NotEncrypted { method };
        assert_error(with_method(method, &place), Structure::EncryptionHeader, 112, kind);
    }
    let structure = Structure::EncryptionHeader;
    assert_error(with_method(2, &place[..15]), structure, 112, out_of_range(15, 16, 16));
    put64(&mut place, 0, 512);
    assert_error(with_method(2, &place), structure, 112, unaligned(512));
}

#[test]
fn a_header_that_cannot_be_parsed_is_not_encoded() {
    let good = parse(&valid()).expect("valid");
    let inconsistent = |change: fn(&mut Header)| {
        let mut header = good.clone();
        change(&mut header);
        header.encode().map_err(|error| error.kind)
    };
    let error = Err(FormatErrorKind::Inconsistent);
    assert_eq!(inconsistent(|header| header.version = Version::V2), error);
    assert_eq!(inconsistent(|header| header.header_length = 104), error);
    assert_eq!(inconsistent(|header| header.unknown_fields.push(0)), error);
    assert_eq!(inconsistent(|header| header.backing_format = Some("raw".into())), error);
    assert_eq!(inconsistent(|header| header.backing_file = Some(Vec::new())), Err(out_of_range(0, 1, 1023)));
    assert_eq!(inconsistent(|header| header.cluster_bits = 64), Err(out_of_range(64, 9, 21)));
}

#[test]
fn the_header_must_fit_in_a_cluster() {
    let mut header = parse(&valid_with(Version::V3, 9)).expect("valid");
    header.backing_file = Some(vec![b'n'; 400]);
    let bytes = header.encode().expect("fits without an end mark");
    assert_eq!((bytes.len(), parse(&bytes)), (512, Ok(header.clone())));
    header.backing_file = Some(vec![b'n'; 392]);
    let bytes = header.encode().expect("fits with an end mark");
    assert_eq!((bytes.len(), parse(&bytes)), (512, Ok(header.clone())));
    header.backing_file = Some(vec![b'n'; 401]);
    let kind = FormatErrorKind::HeaderFull { needed: 513, room: 512 };
    assert_eq!(header.encode().map_err(|error| error.kind), Err(kind));
}

#[test]
fn the_backing_format_changes_in_the_field_and_in_the_extensions() {
    let mut header =
        with_extensions(&[(7, b"first"), (BACKING_FORMAT, b"raw"), (8, b"")], |_| {}).expect("valid");
    header.set_backing_format(Some("qcow2"));
    let magics: Vec<u32> = header.extensions.iter().map(|extension| extension.magic).collect();
    assert_eq!(magics, [7, BACKING_FORMAT, 8]);
    let again = parse(&header.encode().expect("valid")).expect("valid");
    assert_eq!((again.backing_format.as_deref(), &again), (Some("qcow2"), &header));
    header.set_backing_format(Some(""));
    assert_eq!((header.backing_format.as_deref(), header.extensions.len()), (None, 2));
    assert!(header.encode().is_ok());
}
