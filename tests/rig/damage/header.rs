//! Damages of single header fields, each at its limits and one past them. Also of the other contents of the header's
//! cluster: the backing file's name and the extensions. The image must have version 3 and clusters of 4 KiB.

use qcow2::header::HEADER_LENGTH_V3;
use qcow2::{extension, position};

use super::{Damage, Raw};

/// The offset in bytes of the area after the header.
const AREA: usize = HEADER_LENGTH_V3 as usize;
/// The offset at which names are stored.
const NAME: usize = 1024;
const CLUSTER: u64 = 4096;
/// The offset of the last cluster that a file can have.
const LAST: u64 = (1 << 63) - CLUSTER;

impl Raw {
    fn put32(&mut self, at: usize, value: u32) -> bool {
        self.put_bytes(at, &value.to_be_bytes())
    }

    fn put64(&mut self, at: usize, value: u64) -> bool {
        self.put_bytes(at, &value.to_be_bytes())
    }

    pub(super) fn put_bytes(&mut self, at: usize, bytes: &[u8]) -> bool {
        let place = &mut self.bytes[at..at + bytes.len()];
        let changed = place != bytes;
        place.copy_from_slice(bytes);
        changed
    }

    /// Writes extensions at their proper offset, and an end mark behind them.
    fn extend(&mut self, extensions: &[(u32, &[u8])]) -> bool {
        let mut at = AREA;
        for (magic, data) in extensions {
            self.put32(at, *magic);
            self.put32(at + 4, data.len() as u32);
            self.put_bytes(at + 8, data);
            at += 8 + data.len().next_multiple_of(8);
        }
        self.put64(at, 0);
        true
    }

    /// Names a backing file, with its format if there is one.
    fn back(&mut self, name: &[u8], format: &[u8]) -> bool {
        if !format.is_empty() {
            self.extend(&[(extension::BACKING_FORMAT, format)]);
        }
        self.put_bytes(NAME, name);
        self.put64(position::BACKING_FILE_OFFSET, NAME as u64);
        self.put32(position::BACKING_FILE_LENGTH, name.len() as u32)
    }

    /// Sets the offset and the length of the backing file's name.
    fn name_at(&mut self, offset: u64, length: u32) -> bool {
        self.extend(&[(extension::BACKING_FORMAT, b"raw")]);
        self.put_bytes(NAME, &[b'n'; 2048]);
        self.put64(position::BACKING_FILE_OFFSET, offset);
        self.put32(position::BACKING_FILE_LENGTH, length)
    }

    /// Adds a bitmaps extension with these fields.
    fn bitmaps(&mut self, count: u32, reserved: u32, length: u64, offset: u64) -> bool {
        let mut data = count.to_be_bytes().to_vec();
        data.extend(reserved.to_be_bytes());
        data.extend(length.to_be_bytes());
        data.extend(offset.to_be_bytes());
        self.put64(position::AUTOCLEAR, 1);
        self.extend(&[(extension::BITMAPS, &data)])
    }

    fn incompatible(&mut self, bit: u32) -> bool {
        self.put64(position::INCOMPATIBLE, 1 << bit)
    }

    fn cut_to(&mut self, length: usize) -> bool {
        self.bytes.truncate(length);
        true
    }
}

/// Damages of the header's fields.
pub const HEADER: &[Damage] = &[
    ("another magic", |i| i.put32(position::MAGIC, 0x5146_49fa)),
    ("version 0", |i| i.put32(position::VERSION, 0)),
    ("version 1", |i| i.put32(position::VERSION, 1)),
    ("version 2 instead of 3", |i| i.put32(position::VERSION, 2)),
    ("version 4", |i| i.put32(position::VERSION, 4)),
    ("clusters of 2^8 bytes", |i| i.put32(position::CLUSTER_BITS, 8)),
    ("clusters of 2^9 bytes", |i| i.put32(position::CLUSTER_BITS, 9)),
    ("clusters of 2^21 bytes", |i| i.put32(position::CLUSTER_BITS, 21)),
    ("clusters of 2^22 bytes", |i| i.put32(position::CLUSTER_BITS, 22)),
    ("clusters of 2^(2^32-1) bytes", |i| i.put32(position::CLUSTER_BITS, u32::MAX)),
    ("a disk of no size", |i| i.put64(position::SIZE, 0)),
    ("a disk that ends within a sector", |i| i.put64(position::SIZE, (3 << 20) - 100)),
    ("a disk as large as its L1 table can map", |i| i.put64(position::SIZE, 4 << 20)),
    ("a disk one byte larger than that", |i| i.put64(position::SIZE, (4 << 20) + 1)),
    ("a disk of 2^63 bytes", |i| i.put64(position::SIZE, 1 << 63)),
    ("a disk of 2^64-1 bytes", |i| i.put64(position::SIZE, u64::MAX)),
    ("encrypted with AES", |i| i.put32(position::CRYPT_METHOD, 1)),
    ("encrypted with LUKS", |i| i.put32(position::CRYPT_METHOD, 2)),
    ("encrypted in an unknown way", |i| i.put32(position::CRYPT_METHOD, 3)),
    ("no L1 entries", |i| i.put32(position::L1_ENTRIES, 0)),
    ("an L1 entry too few", |i| i.put32(position::L1_ENTRIES, 1)),
    ("an L1 table of 32 MiB", |i| i.put32(position::L1_ENTRIES, 4 << 20)),
    ("an L1 table of 32 MiB and an entry", |i| i.put32(position::L1_ENTRIES, (4 << 20) + 1)),
    ("an L1 table of 2^32-1 entries", |i| i.put32(position::L1_ENTRIES, u32::MAX)),
    ("the L1 table unaligned", |i| i.put64(position::L1_OFFSET, i.l1 + 512)),
    ("the L1 table at offset 0", |i| i.put64(position::L1_OFFSET, 0)),
    ("the L1 table in the last cluster that can be", |i| i.put64(position::L1_OFFSET, LAST)),
    ("the L1 table at 2^63", |i| i.put64(position::L1_OFFSET, 1 << 63)),
    ("the refcount table unaligned", |i| i.put64(position::REFCOUNT_TABLE_OFFSET, i.refcount_table + 512)),
    ("the refcount table at offset 0", |i| i.put64(position::REFCOUNT_TABLE_OFFSET, 0)),
    ("the refcount table ends at 2^63-1", |i| i.put64(position::REFCOUNT_TABLE_OFFSET, LAST - CLUSTER)),
    ("the refcount table ends at 2^63", |i| i.put64(position::REFCOUNT_TABLE_OFFSET, LAST)),
    ("the refcount table at 2^63", |i| i.put64(position::REFCOUNT_TABLE_OFFSET, 1 << 63)),
    ("a refcount table of no clusters", |i| i.put32(position::REFCOUNT_TABLE_CLUSTERS, 0)),
    ("a refcount table of 8 MiB", |i| i.put32(position::REFCOUNT_TABLE_CLUSTERS, 2048)),
    ("a refcount table of 8 MiB and a cluster", |i| i.put32(position::REFCOUNT_TABLE_CLUSTERS, 2049)),
    ("a refcount table of 2^32-1 clusters", |i| i.put32(position::REFCOUNT_TABLE_CLUSTERS, u32::MAX)),
    ("65,536 snapshots past the file", |i| {
        i.put64(position::SNAPSHOTS_OFFSET, i.end()) && i.put32(position::SNAPSHOTS, 65_536)
    }),
    ("65,536 snapshots far past the file", |i| {
        i.put64(position::SNAPSHOTS_OFFSET, 1 << 50) && i.put32(position::SNAPSHOTS, 65_536)
    }),
    ("65,537 snapshots", |i| {
        i.put64(position::SNAPSHOTS_OFFSET, i.end()) && i.put32(position::SNAPSHOTS, 65_537)
    }),
    ("2^32-1 snapshots", |i| {
        i.put64(position::SNAPSHOTS_OFFSET, i.end()) && i.put32(position::SNAPSHOTS, u32::MAX)
    }),
    ("a snapshot at offset 0", |i| i.put32(position::SNAPSHOTS, 1)),
    ("a snapshot in guest data", |i| {
        let data = i.data(0) * CLUSTER;
        i.put64(position::SNAPSHOTS_OFFSET, data) && i.put32(position::SNAPSHOTS, 1)
    }),
    ("no snapshots at an offset that is none", |i| i.put64(position::SNAPSHOTS_OFFSET, 3)),
    ("a snapshot table that ends at 2^63", |i| {
        i.put64(position::SNAPSHOTS_OFFSET, LAST) && i.put32(position::SNAPSHOTS, 2000)
    }),
    ("an external data file, by a bit alone", |i| i.incompatible(2)),
    ("another compression, by a bit alone", |i| i.incompatible(3)),
    ("subclusters of 128 bytes", |i| i.incompatible(4)),
    ("unknown incompatible feature 5", |i| i.incompatible(5)),
    ("unknown incompatible feature 63", |i| i.incompatible(63)),
    ("an unknown compatible feature", |i| i.put64(position::COMPATIBLE, 1 << 7)),
    ("lazy refcounts", |i| i.put64(position::COMPATIBLE, 1)),
    ("an unknown autoclear feature", |i| i.put64(position::AUTOCLEAR, 1 << 40)),
    ("bitmaps, by a bit alone", |i| i.put64(position::AUTOCLEAR, 1)),
    ("a raw external data file, by its autoclear bit alone", |i| i.put64(position::AUTOCLEAR, 2)),
    ("refcounts of 1 bit instead of 16", |i| i.put32(position::REFCOUNT_ORDER, 0)),
    ("refcounts of 64 bits instead of 16", |i| i.put32(position::REFCOUNT_ORDER, 6)),
    ("refcounts of 128 bits", |i| i.put32(position::REFCOUNT_ORDER, 7)),
    ("refcounts of 2^(2^32-1) bits", |i| i.put32(position::REFCOUNT_ORDER, u32::MAX)),
    ("a header of 0 bytes", |i| i.put32(position::HEADER_LENGTH, 0)),
    ("a header of 103 bytes", |i| i.put32(position::HEADER_LENGTH, 103)),
    ("a header of 104 bytes", |i| i.put32(position::HEADER_LENGTH, 104)),
    ("a header of 108 bytes", |i| i.put32(position::HEADER_LENGTH, 108)),
    ("a header of 120 bytes", |i| i.put32(position::HEADER_LENGTH, 120)),
    ("a header as long as its cluster", |i| i.put32(position::HEADER_LENGTH, 4096)),
    ("a header 8 bytes longer than its cluster", |i| i.put32(position::HEADER_LENGTH, 4104)),
    ("a header of 2^32-1 bytes", |i| i.put32(position::HEADER_LENGTH, u32::MAX)),
    ("zstd without its bit", |i| i.put_bytes(position::COMPRESSION_TYPE, &[1])),
    ("zstd with a header of 104 bytes", |i| {
        i.put_bytes(position::COMPRESSION_TYPE, &[1])
            && i.put32(position::HEADER_LENGTH, 104)
            && i.incompatible(3)
    }),
    ("an unknown compression", |i| i.put_bytes(position::COMPRESSION_TYPE, &[2]) && i.incompatible(3)),
    ("an unknown field of the header", |i| i.put_bytes(position::COMPRESSION_TYPE + 3, &[7])),
];

/// Damages of the backing file's name and format. A raw file `base` exists, and the image is called `top`.
pub const BACKING: &[Damage] = &[
    ("a name within the header", |i| i.name_at(1, 4)),
    ("a name in the last bytes of the header", |i| i.name_at(111, 4)),
    ("a name in the last byte of the cluster", |i| i.name_at(CLUSTER - 1, 1)),
    ("a name of two bytes there", |i| i.name_at(CLUSTER - 1, 2)),
    ("a name behind the cluster", |i| i.name_at(CLUSTER, 4)),
    ("a name at 2^64-1", |i| i.name_at(u64::MAX, 4)),
    ("a name of no bytes", |i| i.name_at(NAME as u64, 0)),
    ("a name of 1,023 bytes", |i| i.name_at(NAME as u64, 1023)),
    ("a name of 1,024 bytes", |i| i.name_at(NAME as u64, 1024)),
    ("a name of 2^32-1 bytes", |i| i.name_at(NAME as u64, u32::MAX)),
    ("no name, but a length", |i| i.name_at(0, 4)),
    ("over a raw file", |i| i.back(b"base", b"raw")),
    ("over a raw file, by file:", |i| i.back(b"file:base", b"raw")),
    ("over a raw file that is said to be qcow2", |i| i.back(b"base", b"qcow2")),
    ("over a file whose format is not said", |i| i.back(b"base", b"")),
    ("over a format that is not served", |i| i.back(b"base", b"vmdk")),
    ("over a format of 16 letters", |i| i.back(b"base", b"sixteen--letters")),
    ("over a file that is not there", |i| i.back(b"missing", b"raw")),
    ("over itself", |i| i.back(b"top", b"qcow2")),
    ("over itself, as raw", |i| i.back(b"top", b"raw")),
    ("over a server", |i| i.back(b"nbd://127.0.0.1:1/x", b"raw")),
    ("over a host's device", |i| i.back(b"host_device:/dev/null", b"raw")),
    ("over a name with a zero in it", |i| i.back(b"ba\0se", b"raw")),
    ("over a node in JSON", |i| {
        i.back(b"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/base\"}}", b"raw")
    }),
    ("over a node in broken JSON", |i| i.back(b"json:{", b"raw")),
    ("over a protocol in JSON", |i| {
        i.back(
            b"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"nbd\",\"host\":\"127.0.0.1\",\"port\":\"1\"}}",
            b"raw",
        )
    }),
    ("over an external command in JSON", |i| {
        i.back(b"json:{\"driver\":\"qcow2\",\"data-file\":\"/etc/passwd\",\"file\":\"base\"}", b"qcow2")
    }),
];

/// Damages of the extensions.
pub const EXTENSIONS: &[Damage] = &[
    ("an unknown extension", |i| i.extend(&[(0x1234_5678, b"whatever")])),
    ("an extension up to the cluster's end", |i| {
        i.put32(AREA, 7);
        i.put32(AREA + 4, CLUSTER as u32 - 120)
    }),
    ("an extension one byte past the cluster", |i| {
        i.put32(AREA, 7);
        i.put32(AREA + 4, CLUSTER as u32 - 119)
    }),
    ("an extension of 2^32-1 bytes", |i| {
        i.put32(AREA, 7);
        i.put32(AREA + 4, u32::MAX)
    }),
    ("an extension that the name cuts", |i| {
        i.put32(AREA, 0x1234_5678);
        i.put32(AREA + 4, 0x7fff_ffff);
        i.put64(position::BACKING_FILE_OFFSET, AREA as u64 + 4)
    }),
    ("an end mark with a length", |i| i.put32(AREA + 4, u32::MAX)),
    ("a thousand empty extensions", |i| (0..490).all(|n| i.put32(AREA + 8 * n, 9))),
    ("feature names of an odd length", |i| i.extend(&[(extension::FEATURE_NAMES, b"\x00\x05odd")])),
    ("the name of an external data file", |i| i.extend(&[(extension::DATA_FILE, b"base")])),
    ("that name and its bit", |i| i.extend(&[(extension::DATA_FILE, b"base")]) && i.incompatible(2)),
    ("an encryption header and no encryption", |i| i.extend(&[(extension::ENCRYPTION_HEADER, &[0; 16])])),
    ("a bitmaps extension of 23 bytes", |i| i.extend(&[(extension::BITMAPS, &[0; 23])])),
    ("a bitmaps extension of 32 bytes", |i| i.extend(&[(extension::BITMAPS, &[0; 32])])),
    ("no bitmaps", |i| i.bitmaps(0, 0, 32, i.l1)),
    ("65,535 bitmaps past the file", |i| i.bitmaps(65_535, 0, 65_535 << 10, i.end())),
    ("65,536 bitmaps", |i| i.bitmaps(65_536, 0, 65_535 << 10, i.end())),
    ("a bitmaps extension with a reserved field in use", |i| i.bitmaps(1, 1, 32, i.end())),
    ("a bitmap directory of no bytes", |i| i.bitmaps(1, 0, 0, i.end())),
    ("a bitmap directory one byte too long", |i| i.bitmaps(1, 0, (65_535 << 10) + 1, i.end())),
    ("a bitmap directory unaligned", |i| i.bitmaps(1, 0, 32, i.end() + 512)),
    ("a bitmap directory at offset 0", |i| i.bitmaps(1, 0, 32, 0)),
    ("a bitmap directory at the end of what a file can have", |i| i.bitmaps(1, 0, 4096, LAST)),
];

/// Files that end early.
pub const LENGTHS: &[Damage] = &[
    ("an empty file", |i| i.cut_to(0)),
    ("a file of 3 bytes", |i| i.cut_to(3)),
    ("a file of the magic", |i| i.cut_to(4)),
    ("a file of 23 bytes", |i| i.cut_to(23)),
    ("a file of 72 bytes", |i| i.cut_to(72)),
    ("a file of 103 bytes", |i| i.cut_to(103)),
    ("a file of 104 bytes", |i| i.cut_to(104)),
    ("a file of 112 bytes", |i| i.cut_to(112)),
    ("a file of the header's cluster less a byte", |i| i.cut_to(4095)),
    ("a file of the header's cluster", |i| i.cut_to(4096)),
    ("a file that ends behind the refcount table", |i| i.cut_to(8192)),
];
