//! An image on the bench: the contents that its disk and each of its snapshots must have, whether Strata or QEMU
//! changes them.
//!
//! Owns the changes of snapshots by either tool and the comparisons afterwards. It makes no image and chooses no
//! operation. Every difference panics.

use std::path::{Path, PathBuf};

use disk::DiskOptions;
use disk::snapshot::{Change, ChangeError, ChangeRefusal, Snapshot};
use serde_json::Value;
use storage::host::HostStorage;
use strata_kit::images::{Format, ImageError};
use strata_kit::model::{DiscardRule, Operation};
use strata_kit::{ByteModel, Qemu};

use crate::Rig;
use crate::agree::assert_clean;

/// A change of a snapshot, with the name that `qemu-img snapshot` uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// The snapshot is made.
    Create,
    /// The disk becomes the snapshot.
    Apply,
    /// The snapshot is deleted.
    Delete,
}

impl Deed {
    /// The option of `qemu-img snapshot`.
    fn option(self) -> &'static str {
        match self {
            Self::Create => "-c",
            Self::Apply => "-a",
            Self::Delete => "-d",
        }
    }

    /// Strata's form of the change.
    pub fn of(self, name: &str) -> Change {
        match self {
            Self::Create => Change::Create { name: name.into(), seconds: 1_795_272_286, nanoseconds: 123 },
            Self::Apply => Change::Apply { wanted: name.into() },
            Self::Delete => Change::Delete { wanted: name.into() },
        }
    }
}

/// An image, the expected contents of its disk, and those of each snapshot.
pub struct Bench {
    /// QEMU's tools.
    pub qemu: Qemu,
    /// The top image.
    pub image: PathBuf,
    /// The options with which Strata opens it.
    pub options: DiskOptions,
    /// Bytes of the smallest allocation: a subcluster or a cluster.
    pub granule: u64,
    /// The expected contents of its disk.
    pub contents: Vec<u8>,
    /// The snapshots by name, in the order of the image's table, with the contents of each.
    pub snapshots: Vec<(String, Vec<u8>)>,
    /// The effect of a discard.
    pub rule: DiscardRule,
}

impl Bench {
    /// Runs operations on the disk and on a model of it, compares the whole disk, and closes it.
    pub fn run(&mut self, operations: &[Operation]) {
        let size = self.contents.len() as u64;
        let mut model = ByteModel::with_contents(&self.contents, size, self.granule, self.rule);
        let mut rig = Rig::open(&self.image, &self.options).expect("it opens");
        rig.run(operations, &mut model);
        self.contents = rig.read_all();
        model.compare_all(&self.contents).expect("the disk equals the model");
        rig.close();
    }

    /// Makes a change with Strata.
    pub fn try_ours(&self, deed: Deed, name: &str) -> Result<Snapshot, ChangeError> {
        disk::snapshot::change(&HostStorage::new(), &self.image, deed.of(name), &self.options)
    }

    /// Makes a change with QEMU's tool.
    pub fn try_theirs(&self, deed: Deed, name: &str) -> Result<String, ImageError> {
        self.qemu.img(["snapshot", deed.option(), name, &self.image.display().to_string()])
    }

    /// Makes a change with QEMU's tool on a copy, which replaces the image on success. QEMU may leave leaks when it
    /// fails half-way.
    pub fn try_theirs_aside(&mut self, deed: Deed, name: &str) -> Result<(), ImageError> {
        let copy = self.image.with_extension("aside");
        std::fs::copy(&self.image, &copy).expect("a copy");
        let image = std::mem::replace(&mut self.image, copy.clone());
        let result = self.try_theirs(deed, name);
        self.image = image;
        if result.is_ok() {
            std::fs::rename(&copy, &self.image).expect("a rename");
            self.note(deed, name);
        } else {
            std::fs::remove_file(&copy).expect("the copy goes");
        }
        result.map(|_| ())
    }

    /// Makes a change with Strata, if `ours`, or with QEMU's tool.
    pub fn change(&mut self, deed: Deed, name: &str, ours: bool) {
        if ours {
            self.try_ours(deed, name).unwrap_or_else(|error| panic!("{deed:?} {name}: {error}"));
        } else {
            self.try_theirs(deed, name).expect("qemu-img");
        }
        self.note(deed, name);
    }

    /// Updates the expected contents after a change.
    pub fn note(&mut self, deed: Deed, name: &str) {
        let place = self.snapshots.iter().position(|(known, _)| known == name);
        match (deed, place) {
            (Deed::Create, _) => self.snapshots.push((name.to_owned(), self.contents.clone())),
            (Deed::Apply, Some(place)) => self.contents.clone_from(&self.snapshots[place].1),
            (Deed::Delete, Some(place)) => {
                self.snapshots.remove(place);
            }
            _ => panic!("there is no {name}"),
        }
    }

    /// Tries a change that Strata must refuse without changing a byte.
    pub fn refused(&self, change: Change) -> ChangeRefusal {
        let before = std::fs::read(&self.image).expect("image");
        let error = match disk::snapshot::change(&HostStorage::new(), &self.image, change, &self.options) {
            Err(ChangeError::Refused { source, .. }) => source,
            other => panic!("{other:?}"),
        };
        assert!(
            std::fs::read(&self.image).expect("image") == before,
            "{error}: a refusal wrote to the image"
        );
        error
    }

    /// Checks the image with both checkers. Compares the disk and all snapshots with the expected contents.
    pub fn examine(&self, what: &str) {
        self.examine_disk(what);
        for (name, contents) in &self.snapshots {
            assert!(self.read_snapshot(name) == *contents, "{what}: {name} reads otherwise");
        }
    }

    /// As [`Bench::examine`], without the contents of the snapshots.
    pub fn examine_disk(&self, what: &str) {
        assert_clean(&self.image, what);
        self.compare_lists();
        assert!(read(&self.image, &self.options) == self.contents, "{what}: the disk reads otherwise");
        let theirs = self.qemu.read_all(&self.image, Format::Qcow2).expect("read");
        assert!(theirs == self.contents, "{what}: qemu-img reads otherwise");
    }

    fn compare_lists(&self) {
        let ours = list(&self.image, &self.options);
        assert_eq!(ours.len(), self.snapshots.len());
        if ours.is_empty() {
            return;
        }
        let image = self.image.display().to_string();
        let text = self.qemu.img(["info", "--output=json", &image]).expect("info");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let theirs = json.get("snapshots").and_then(Value::as_array).cloned().unwrap_or_default();
        assert_eq!(ours.len(), theirs.len());
        for ((ours, theirs), (name, _)) in ours.iter().zip(&theirs).zip(&self.snapshots) {
            let text = |name: &str| theirs[name].as_str().expect("text").as_bytes().to_vec();
            let number = |name: &str| theirs[name].as_u64().unwrap_or(0);
            assert_eq!((&ours.id, &ours.name), (&text("id"), &text("name")));
            assert_eq!(ours.name, name.as_bytes());
            let date = (u64::from(ours.seconds), u64::from(ours.nanoseconds));
            assert_eq!(date, (number("date-sec"), number("date-nsec")));
            assert_eq!(
                (ours.vm_state_size(), ours.icount().unwrap_or(0)),
                (number("vm-state-size"), number("icount"))
            );
        }
    }

    /// The contents of a snapshot, read by Strata.
    pub fn read_snapshot(&self, name: &str) -> Vec<u8> {
        read(&self.image, &DiskOptions { snapshot: Some(name.into()), ..self.options.clone() })
    }

    /// The contents of a snapshot, read by QEMU.
    pub fn theirs(&self, name: &str) -> Vec<u8> {
        let target = self.image.with_extension("raw");
        let [image, out] = [&self.image, &target].map(|path| path.display().to_string());
        let name = format!("snapshot.name={name}");
        self.qemu.img(["convert", "-l", &name, "-f", "qcow2", "-O", "raw", &image, &out]).expect("convert");
        let found = std::fs::read(&target).expect("the copy");
        std::fs::remove_file(&target).expect("the copy goes");
        found
    }
}

/// The internal snapshots of an image.
pub fn list(image: &Path, options: &DiskOptions) -> Vec<Snapshot> {
    disk::snapshot::list(&HostStorage::new(), image, options).expect("a list")
}

/// The whole contents of a disk.
pub fn read(image: &Path, options: &DiskOptions) -> Vec<u8> {
    let mut rig = Rig::open(image, options).expect("it opens");
    let found = rig.read_all();
    rig.close();
    found
}
