//! The reasons why our outcome for a damaged image differs from QEMU's. A change that makes the two differ must add its
//! reason here.

/// Damages, and the reason for the difference.
const REASONS: &[(&[&str], &str)] = &[
    (
        &[
            "an L1 table of 32 MiB",
            "a refcount table of 8 MiB",
            "an L2 table in a refblock",
            "an L2 table in the L1 table",
            "two L1 entries share a table",
            "the refblock named twice",
            "a refblock in the L2 table",
            "a refblock in the L1 table",
            "a refblock in the refcount table",
            "the refcount table in the L1 table",
            "the L1 table in the refblock",
            "a snapshot's L1 table is the active one",
            "a part of a bitmap in the L1 table",
        ],
        "two structures lie in one place, which we see before anything is written, and QEMU when it writes there",
    ),
    (
        &[
            "the L1 table at offset 0",
            "the refcount table at offset 0",
            "a snapshot at offset 0",
            "a refcount table of no clusters",
        ],
        "a table where the header is, or of no length: there is nothing to read in it",
    ),
    (
        &[
            "an extension one byte past the cluster",
            "an extension of 2^32-1 bytes",
            "an extension that the name cuts",
        ],
        "reading the disk needs no header extensions but those that are found",
    ),
    (&["version 2 instead of 3"], "QEMU's check lets pass what QEMU then cannot read"),
    (
        &["a subcluster both allocated and zero", "no subcluster of an allocated cluster allocated"],
        "a read fails for itself, and only a change that needs the entry marks the image",
    ),
    (&["the refblock unaligned"], "all refblocks are looked at before anything is written"),
    (
        &["the L1 table in the last cluster that can be", "the refcount table ends at 2^63-1"],
        "data past the end of the file is missing, wherever it is; QEMU asks the host to read there",
    ),
    (
        &[
            "65,536 snapshots past the file",
            "65,536 snapshots far past the file",
            "the snapshot table far past the file",
        ],
        "nothing is in the file of the table, which QEMU takes for entries of zeros",
    ),
    (
        &["a snapshot in guest data", "a snapshot with too much extra data"],
        "reading the disk needs no snapshots",
    ),
    (
        &["a snapshot's L1 table too long"],
        "QEMU takes all that the table claims for its place, so that nothing is left",
    ),
    (
        &["COPIED of an L1 entry cleared"],
        "the flag is set: what a snapshot has too would be changed in place",
    ),
    (&["bitmaps, by a bit alone"], "QEMU takes a directory of no bytes to lie where the header is"),
    (
        &["a raw external data file, by its autoclear bit alone"],
        "an autoclear bit of a feature that is not used means nothing, and is cleared",
    ),
    (&["a header of 108 bytes"], "the specification wants a multiple of 8"),
    (&["a file of 104 bytes"], "QEMU takes the missing end of the header for zeros"),
    (&["an end mark with a length"], "the mark ends the area, whatever its length"),
    (&["that name and its bit"], "no file is opened because an image says so"),
    (
        &[
            "65,535 bitmaps past the file",
            "a part of a bitmap unaligned",
            "reserved bit 1 of an entry of a bitmap's table",
            "reserved bit 63 of an entry of a bitmap's table",
            "a bitmap's table in the L2 table",
            "a bitmap's table unaligned",
            "a bitmap's table at offset 0",
            "a bitmap of an unknown type",
            "a bitmap without a name",
            "a bitmap with extra data",
            "a bitmap with unknown flags",
            "a bitmap too many",
            "the bitmap directory longer",
            "the bitmap directory far past the file",
            "the bitmap directory in the L1 table",
        ],
        "broken bitmaps are given up, and the disk is served without them",
    ),
    (&["a part of a bitmap in guest data"], "the clusters of bitmaps are guarded, too"),
    (&["a name in the last bytes of the header"], "a name has no place in the header"),
    (&["a name in the last byte of the cluster"], "QEMU ends a name at a zero byte"),
    (&["over a file whose format is not said"], "no format is guessed"),
    (&["over itself", "over itself, as raw"], "QEMU would go down the chain until it has no memory left"),
    (
        &[
            "a name of 1,023 bytes",
            "over a raw file that is said to be qcow2",
            "over a format that is not served",
            "over a file that is not there",
            "over a server",
            "over a name with a zero in it",
            "over a node in JSON",
            "over a node in broken JSON",
            "over a protocol in JSON",
            "over an external command in JSON",
        ],
        "an image is checked by itself, whether or not there is a file below it",
    ),
    (&["over a host's device"], "only files are opened"),
    (&["data at the largest offset"], "the simulated host takes a file of any length"),
    (
        &["data in the refcount table", "data in its L2 table"],
        "without COPIED QEMU writes elsewhere, and lowers the refcount of the table",
    ),
    (
        &["an L2 table right past the file", "a short L1 table past the end, not counted"],
        "QEMU finds the place free, and hands it out; we go past it",
    ),
    (&["an L2 table in guest data"], "what is freed must have been counted"),
    (
        &["data right past the file", "data not counted"],
        "an entry names what counts as free: QEMU hands it out all the same",
    ),
    (
        &[
            "an L2 entry cleared",
            "an L2 entry without offset but COPIED, zero",
            "reserved bit 61 of an empty L2 entry",
        ],
        "an entry that makes no sense is not thrown away by a discard",
    ),
];

/// The same for an image with an external data file.
const WITH_DATA_FILE: (&[&str], &str) = (
    &[
        "two guest clusters share one",
        "two L2 entries swapped",
        "data right past the file",
        "data far past the file",
        "data at the largest offset",
        "data in the L1 table",
        "data in its L2 table",
        "data in a refblock",
    ],
    "such a file has one place for each cluster, and QEMU looks at what an entry says only where it reads",
);

/// The reason why QEMU treats an image with this damage differently. The image may have an external data file.
///
/// # Panics
/// If no reason is given.
pub fn of(damage: &str, has_data_file: bool) -> &'static str {
    let reasons = has_data_file.then_some(&WITH_DATA_FILE).into_iter().chain(REASONS);
    let found = reasons.into_iter().find(|(damages, _)| damages.contains(&damage));
    found.unwrap_or_else(|| panic!("{damage}: QEMU does otherwise, and there is no reason")).1
}

/// Each damage that has a reason.
pub fn damages() -> impl Iterator<Item = &'static str> {
    REASONS.iter().chain([&WITH_DATA_FILE]).flat_map(|(damages, _)| damages.iter().copied())
}
