//! Shortages of space on a small real file system: ext4 on a loop device, or a tmpfs if there are no loop devices.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use disk::{DiskOptions, OnEnospc};
use qcow2::create::NewImage;
use qcow2::{Geometry, Version};
use strata_kit::ByteModel;
use strata_kit::model::{DiscardRule, Operation};
use strata_rig::{Rig, options, write};
use tempfile::TempDir;

/// Bytes of the file system, and of the disk.
const HOST: u64 = 24 << 20;
const SIZE: u64 = 64 << 20;
const BLOCK: u64 = 64 << 10;
/// Blocks that the guest writes and frees, again and again.
const SPAN: u64 = 16;
/// Rounds through these blocks: somewhat more than the file system has space for.
const ROUNDS: u32 = (HOST / (SPAN * BLOCK) + 4) as u32;

/// The most bytes of the image: the data of the guest, the space that may be held back, and metadata.
const MOST: u64 = SPAN * BLOCK + SIZE / 8 + (1 << 20);

/// A mounted file system, unmounted when dropped.
struct Mount {
    point: PathBuf,
    _folder: TempDir,
}

impl Mount {
    fn new() -> Option<Self> {
        let folder = TempDir::new().expect("a temporary folder");
        let (point, device) = (folder.path().join("mount"), folder.path().join("ext4"));
        std::fs::create_dir(&point).expect("a folder");
        File::create(&device).and_then(|file| file.set_len(HOST)).expect("a file");
        let ext4 = || {
            succeeds(Command::new("mkfs.ext4").arg("-q").arg(&device))
                && succeeds(Command::new("mount").args(["-o", "loop"]).args([&device, &point]))
        };
        let size = format!("size={HOST}");
        let tmpfs =
            || succeeds(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&point));
        (ext4() || tmpfs()).then_some(Mount { point, _folder: folder })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        assert!(succeeds(Command::new("umount").arg(&self.point)), "{} stays", self.point.display());
    }
}

fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// Makes an image whose tables are holes of its file.
fn create(path: &Path) {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        size: SIZE,
    };
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path).expect("the image");
    for (offset, piece) in NewImage::new(geometry).layout().expect("a valid image") {
        file.set_len(offset.0 + piece.len() as u64).expect("a length");
        for (at, page) in (offset.0..).step_by(4096).zip(piece.chunks(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, at).expect("room");
            }
        }
    }
}

#[test]
fn a_guest_that_frees_what_it_writes_never_fills_a_small_host() {
    let Some(mount) = Mount::new() else {
        // This is no failure even where tools are required: containers may not mount, and the simulated host covers
        // this case.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no file system can be mounted here (needs root)");
        return;
    };
    let image = mount.point.join("disk.qcow2");
    for on_enospc in [OnEnospc::Report, OnEnospc::Wait] {
        for zeroes in [false, true] {
            create(&image);
            let mut rig = Rig::open(&image, &DiskOptions { on_enospc, ..options() }).expect("it opens");
            let rule = DiscardRule::ZeroesClusters;
            let mut model = ByteModel::with_contents(&[], SIZE, BLOCK, rule);
            for round in 0..ROUNDS {
                for block in 0..SPAN {
                    rig.run(&[write(block * BLOCK, BLOCK, 2 * round + 1)], &mut model);
                    let (offset, length) = (block * BLOCK, BLOCK);
                    let frees = match zeroes {
                        false => Operation::Discard { offset, length },
                        true => Operation::WriteZeroes { offset, length, unmap: true },
                    };
                    rig.run(&[frees], &mut model);
                }
                let taken = std::fs::metadata(&image).expect("the image").blocks() * 512;
                assert!(taken <= MOST, "{on_enospc:?}, zeroes {zeroes}: the file takes {taken} bytes");
            }
            rig.run(&[Operation::Read { offset: 0, length: SPAN * BLOCK }], &mut model);
            rig.close();
        }
    }
}
