//! How a disk is opened: formats, files, caches, and policies.
//!
//! Owns the options and their defaults. An open reads them; the files of each room apply them.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::thread::available_parallelism;
use std::time::Duration;

/// The most threads of a disk that inflate, unless the options name more.
const INFLATE_THREADS: usize = 4;

/// The processors that this process may use. To ask the host opens several files, so it is asked once.
static PROCESSORS: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, usize::from));

/// The format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The plain bytes of the disk.
    Raw,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The top image's format.
    pub format: Format,
    /// The format of backing files whose overlay does not record one.
    pub backing_format: Option<Format>,
    /// The external file that holds the top image's data. The name in the image's header is not followed.
    pub data_file: Option<PathBuf>,
    /// The data files of backing files: the path of the backing file as it is opened, and its data file.
    pub backing_data_files: Vec<(PathBuf, PathBuf)>,
    /// Never write to the top image.
    pub read_only: bool,
    /// The ID or the name of an internal snapshot of the top image to open instead of the active disk: read-only.
    pub snapshot: Option<String>,
    /// Bypass the host's page cache, except for backing files.
    pub direct: bool,
    /// Bypass the page cache for backing files too.
    pub backing_direct: bool,
    /// How long to wait for another process's image lock.
    pub lock_timeout: Duration,
    /// The most bytes of chain map. A resident guest cluster takes 8 bytes, except where clusters lie in order.
    pub map_bytes: usize,
    /// The most bytes of clean L2 tables and refblocks to cache.
    pub table_bytes: usize,
    /// The most bytes of inflated clusters to cache.
    pub inflated_bytes: usize,
    /// The most threads that inflate; with none, each request inflates on its queue's thread.
    pub inflate_threads: usize,
    /// How to treat a request that finds no space on the host.
    pub on_enospc: OnEnospc,
    /// Whether writes of zeros become write zeroes.
    pub detect_zeroes: DetectZeroes,
    /// How to treat discards.
    pub discards: Discards,
    /// A cluster that the guest discards or zeroes keeps its host cluster, so that the image does not become
    /// fragmented. The space is given back all the same. Only for a qcow2 image of version 3.
    pub discard_no_unref: bool,
    /// While the disk is in use, search for clusters that a writer left counted but unused when it did not close the
    /// image.
    pub search_leaks: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions {
            format: Format::Qcow2,
            backing_format: None,
            data_file: None,
            backing_data_files: Vec::new(),
            read_only: false,
            snapshot: None,
            direct: true,
            backing_direct: false,
            lock_timeout: Duration::from_secs(5),
            map_bytes: 32 << 20,
            table_bytes: 16 << 20,
            inflated_bytes: 16 << 20,
            inflate_threads: PROCESSORS.min(INFLATE_THREADS),
            on_enospc: OnEnospc::Report,
            detect_zeroes: DetectZeroes::Off,
            discards: Discards::Unmap,
            discard_no_unref: false,
            search_leaks: true,
        }
    }
}

/// Whether a write of zeros becomes a write zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// No: it is written like any other.
    #[default]
    Off,
    /// Yes; allocated space stays allocated.
    On,
    /// Yes, and space may be given back.
    Unmap,
}

/// How to treat the guest's discards, and its permission to give space back in a write zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discards {
    /// Space is given back.
    #[default]
    Unmap,
    /// They succeed without any effect.
    Ignore,
}

/// How to treat a request that finds no space on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnEnospc {
    /// It fails.
    #[default]
    Report,
    /// It waits until there is space; other requests continue.
    Wait,
}
