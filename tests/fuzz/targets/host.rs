//! A file in a simulated host, and operations on it while no disk has it open.
//!
//! Each operation uses a storage of its own, because a lock lasts as long as its storage.

use std::path::Path;
use std::time::Duration;

use disk::check::{RepairKind, Repaired, Report, check, repair};
use disk::{DiskOptions, OpenError};
use qcow2::{Header, Incompatible};
use storage_sim::{SimOptions, SimStorage, SimWorld};

/// The image's name.
pub const TOP: &str = "top";
/// The largest cluster size in bytes.
pub const CLUSTER_MAX: u64 = 2 << 20;
/// The name of a raw file that images may use as their backing file.
const BASE: &str = "base";

/// The name of a file that may hold the data of an image.
const DATA: &str = "elsewhere";

/// A host on which the image has these bytes.
pub fn world(bytes: &[u8]) -> SimWorld {
    let world = SimWorld::new(1, SimOptions::calm());
    world.add_file(BASE, &[0xba; 16 << 10]);
    world.add_file(DATA, &[0; 16 << 10]);
    world.add_file(TOP, bytes);
    world
}

/// The first bytes of the image, at most `most`: a small file that has grown may be as long as a disk can be.
pub fn bytes(world: &SimWorld, most: u64) -> Vec<u8> {
    let image = world.image();
    let contents = image.file(Path::new(TOP)).expect("it was added");
    let mut bytes = vec![0; contents.length().min(most) as usize];
    contents.read(0, &mut bytes);
    bytes
}

/// The image's header, if it can be parsed. It may take up the whole first cluster.
pub fn header(world: &SimWorld) -> Option<Header> {
    let start = bytes(world, CLUSTER_MAX);
    Header::parse(&start, start.len() as u64).ok()
}

/// The options of disks here: with the default caches, or with the smallest.
pub fn options(small: bool) -> DiskOptions {
    let options = DiskOptions { lock_timeout: Duration::ZERO, inflate_threads: 0, ..DiskOptions::default() };
    match small {
        false => options,
        true => DiskOptions { map_bytes: 4096, table_bytes: 16 << 10, inflated_bytes: 1024, ..options },
    }
}

/// As [`options`], with the data file if the image needs one, as its operator would give it.
pub fn operated(world: &SimWorld, small: bool) -> DiskOptions {
    let wants = header(world).is_some_and(|header| header.incompatible.contains(Incompatible::DATA_FILE));
    DiskOptions { data_file: wants.then(|| DATA.into()), ..options(small) }
}

/// Checks the image.
pub fn checked(world: &SimWorld) -> Result<Report, OpenError> {
    check(&world.storage(), Path::new(TOP), &options(true))
}

/// Repairs everything.
pub fn repaired(world: &SimWorld) -> Result<Repaired, OpenError> {
    repair(&world.storage(), Path::new(TOP), RepairKind::All, &options(true))
}

/// The storage of a new process.
pub fn storage(world: &SimWorld) -> SimStorage {
    world.storage()
}
