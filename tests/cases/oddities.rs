//! The handling of each oddity of an image. docs/oddities.md has the table; this test makes one image for each row and
//! compares. `STRATA_ODDITIES_WRITE=1` rewrites the table, which must then be reviewed: every row is a promise.

use std::path::{Path, PathBuf};
use std::process::Command;

use disk::check::{RepairKind, Verdict};
use disk::{DiskOptions, OpenError};
use storage::host::HostStorage;
use strata_kit::Qemu;
use strata_kit::images::{Content, Format, ImageSpec, find_tool};
use strata_kit::model::Operation;
use strata_rig::{K, M, Rig, options, patch, pattern, tables, word, write};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The table is between these lines of the page.
const BEGIN: &str = "<!-- begin: tests/cases/oddities.rs -->\n";
const END: &str = "<!-- end -->\n";
/// The value of the bytes that the guest wrote to the second cluster, which has the odd entry.
const DATA: u8 = 7;

/// An image with an oddity that accesses of the second guest cluster meet.
struct Oddity {
    name: &'static str,
    spec: ImageSpec,
    harm: fn(&Path),
}

fn plain() -> ImageSpec {
    ImageSpec::qcow2(2 * M).with(pattern(0, 256 * K, DATA))
}

/// Changes the entry of the second guest cluster.
fn entry(image: &Path, change: impl FnOnce(u64) -> u64) {
    let at = tables(image).1 + 8;
    patch(image, at, &change(word(image, at)).to_be_bytes());
}

/// The same for an extended L2 entry: changes the descriptor and the bitmap.
fn extended(image: &Path, change: impl FnOnce(u64, u64) -> (u64, u64)) {
    let at = tables(image).1 + 16;
    let (descriptor, bitmap) = change(word(image, at), word(image, at + 8));
    patch(image, at, &descriptor.to_be_bytes());
    patch(image, at + 8, &bitmap.to_be_bytes());
}

/// Changes the first entry of the L1 table.
fn l1(image: &Path, change: impl FnOnce(u64) -> u64) {
    let at = word(image, 40);
    patch(image, at, &change(word(image, at)).to_be_bytes());
}

/// Sets the 16-bit refcount of the cluster at an offset.
fn count(image: &Path, offset: u64, count: u16) {
    patch(image, tables(image).2 + offset / (64 * K) * 2, &count.to_be_bytes());
}

/// The host offset of the second guest cluster.
fn data(image: &Path) -> u64 {
    word(image, tables(image).1 + 8) & 0x00ff_ffff_ffff_fe00
}

fn oddities() -> Vec<Oddity> {
    let v3 = |name, harm| Oddity { name, spec: plain(), harm };
    let v2 = |name, harm| Oddity { name, spec: plain().version(2), harm };
    let parts = |name, harm| Oddity { name, spec: plain().extended(), harm };
    let packed = |name, harm| {
        let content = Content::Compressed { offset: 0, length: 256 * K, byte: DATA };
        Oddity { name, spec: ImageSpec::qcow2(2 * M).with(content), harm }
    };
    let elsewhere = |name, harm| {
        let spec = ImageSpec { data_file: Some((PathBuf::from("data"), false)), ..plain() };
        Oddity { name, spec, harm }
    };
    let over = |name, harm| Oddity { name, spec: plain().version(2).backing("base", Format::Qcow2), harm };
    vec![
        v3("L2 entry: COPIED, no offset", |image| entry(image, |_| COPIED)),
        v3("L2 entry: no offset, a reserved bit", |image| entry(image, |_| 1 << 61)),
        v3("L2 entry: data and a reserved bit", |image| entry(image, |raw| raw | 2)),
        v3("L2 entry: COPIED cleared", |image| entry(image, |raw| raw & !COPIED)),
        v3("L2 entry: not at a cluster's start", |image| entry(image, |raw| raw | 0x200)),
        v3("L2 entry: zero, not at a cluster's start", |image| entry(image, |raw| raw | 0x201)),
        v3("L2 entry: past the end of the file", |image| entry(image, |_| COPIED | 1 << 40)),
        v3("L2 entry: names the L2 table", |image| entry(image, |_| COPIED | tables(image).1)),
        v3("L2 entry: names another cluster's data", |image| {
            entry(image, |raw| raw + 64 * K);
        }),
        v3("data whose refcount is 0", |image| count(image, data(image), 0)),
        v3("data whose refcount is 2", |image| count(image, data(image), 2)),
        v2("version 2: zero flag and data", |image| entry(image, |raw| raw | 1)),
        v2("version 2: zero flag, no offset", |image| entry(image, |_| 1)),
        over("version 2, over a backing file: zero flag and data", |image| entry(image, |raw| raw | 1)),
        packed("compressed: COPIED", |image| entry(image, |raw| raw | COPIED)),
        packed("compressed: past the end of the file", |image| entry(image, |raw| raw | 1 << 40)),
        parts("subclusters: COPIED, no offset, one zero", |image| extended(image, |_, _| (COPIED, 1 << 32))),
        parts("subclusters: bit 0 of the entry", |image| extended(image, |raw, bits| (raw | 1, bits))),
        parts("subclusters: one both data and zero", |image| {
            extended(image, |raw, bits| (raw, bits | 1 << 32));
        }),
        parts("subclusters: data, no offset", |image| extended(image, |_, bits| (0, bits))),
        elsewhere("external data: at another offset", |image| entry(image, |raw| raw + 64 * K)),
        elsewhere("external data: compressed", |image| entry(image, |raw| raw | COMPRESSED)),
        v3("L1 entry: COPIED, no offset", |image| l1(image, |_| COPIED)),
        v3("L1 entry: a reserved bit", |image| l1(image, |raw| raw | 1)),
        v3("L1 entry: COPIED cleared", |image| l1(image, |raw| raw & !COPIED)),
        v3("L1 entry: not at a cluster's start", |image| l1(image, |raw| raw | 0x200)),
        v3("L1 entry: past the end of the file", |image| l1(image, |_| COPIED | 1 << 40)),
        v3("L1 entry: names the refcount block", |image| l1(image, |_| COPIED | tables(image).2)),
        v3("L2 table whose refcount is 0", |image| count(image, tables(image).1, 0)),
        v3("header whose refcount is 0", |image| count(image, 0, 0)),
        v3("refcount table: a reserved bit", |image| {
            let at = word(image, 48);
            patch(image, at, &(word(image, at) | 1).to_be_bytes());
        }),
        v3("refcount table: not at a cluster's start", |image| {
            let at = word(image, 48);
            patch(image, at, &(word(image, at) | 0x200).to_be_bytes());
        }),
    ]
}

/// A folder in which each image is made again.
struct Bench {
    qemu: Qemu,
    folder: tempfile::TempDir,
}

impl Bench {
    /// Makes the image of a row. The other images of the row are copies.
    fn make(&self, oddity: &Oddity) {
        let mut spec = oddity.spec.clone();
        if let Some((data, _)) = &mut spec.data_file {
            *data = self.folder.path().join("data");
        }
        let first = self.folder.path().join("first");
        self.qemu.create(&first, &spec).expect("an image");
        (oddity.harm)(&first);
    }

    fn image(&self) -> PathBuf {
        let image = self.folder.path().join("image");
        std::fs::copy(self.folder.path().join("first"), &image).expect("a copy");
        image
    }

    fn options(&self, oddity: &Oddity) -> DiskOptions {
        let data_file = oddity.spec.data_file.as_ref().map(|_| self.folder.path().join("data"));
        DiskOptions { data_file, ..options() }
    }

    /// A row of the table.
    fn row(&self, oddity: &Oddity) -> String {
        self.make(oddity);
        let ours = [self.check(), self.read(oddity), self.write(oddity), self.repair(oddity)];
        let theirs = [
            self.their_check(),
            self.their_io(oddity, "read 64k 4k"),
            self.their_io(oddity, "write 64k 4k"),
            self.their_repair(),
        ];
        format!("| {} | {} | {} |\n", oddity.name, ours.join(" | "), theirs.join("; "))
    }

    fn check(&self) -> String {
        let image = self.image();
        let report = disk::check::check(&HostStorage::new(), &image, &options()).expect("a check");
        let mut kinds: Vec<_> = report.findings.iter().map(|finding| finding.kind.name()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let verdict = verdict(report.verdict());
        if kinds.is_empty() { verdict.into() } else { format!("{verdict}: {}", kinds.join(", ")) }
    }

    /// The result of a read. A read changes nothing: afterwards the disk behaves as without it.
    fn read(&self, oddity: &Oddity) -> String {
        let image = self.image();
        let opened = Rig::open(&image, &self.options(oddity));
        let read_only = DiskOptions { read_only: true, ..self.options(oddity) };
        let is_writable = opened.is_ok();
        let mut rig = opened.unwrap_or_else(|_| Rig::open(&image, &read_only).expect("opens for reading"));
        let read = rig.try_one(&Operation::Read { offset: 64 * K, length: 4 * K });
        let told = match read {
            Err(_) => "fails".into(),
            Ok(()) => match rig.read_all()[64 << 10] {
                0 => "zeros".into(),
                DATA => "data".into(),
                _ => "something else".to_owned(),
            },
        };
        if is_writable {
            rig.try_one(&Operation::Flush).expect("a read has not ended writes");
        }
        drop(rig);
        assert!(!is_marked(&image, oddity), "{}: a read has marked the image", oddity.name);
        told
    }

    fn write(&self, oddity: &Oddity) -> String {
        let image = self.image();
        let Ok(mut rig) = Rig::open(&image, &self.options(oddity)) else { return "not opened for it".into() };
        let written = rig.try_one(&write(64 * K, 4 * K, 1)).is_ok();
        // A write that needs a new cluster, which searches for refcounts of zero.
        let allocated = rig.try_one(&write(M, 4 * K, 1)).is_ok();
        let goes_on = rig.try_one(&Operation::Flush).is_ok();
        drop(rig);
        let told = match (written, allocated, goes_on) {
            (true, true, true) => "done",
            (false, _, true) => "fails",
            (false, _, false) => "ends writes",
            (true, _, _) => "done; the next allocation ends writes",
        };
        let marks = if is_marked(&image, oddity) { ", marks" } else { "" };
        format!("{told}{marks}")
    }

    fn repair(&self, oddity: &Oddity) -> String {
        let image = self.image();
        match disk::check::repair(&HostStorage::new(), &image, RepairKind::All, &options()) {
            Ok(repaired) if repaired.writes == 0 => "nothing to do".into(),
            Ok(repaired) => format!("mends; then {}", verdict(repaired.left.verdict())),
            Err(OpenError::NotRepairable { .. }) => "refused".into(),
            Err(error) => panic!("{}: {error}", oddity.name),
        }
    }

    fn their_check(&self) -> String {
        format!("check: {}", self.qemu_img_check(&self.image(), &[]))
    }

    fn their_repair(&self) -> String {
        let image = self.image();
        self.qemu_img_check(&image, &["-r", "all"]);
        format!("after `-r all`: {}", self.qemu_img_check(&image, &[]))
    }

    fn qemu_img_check(&self, image: &Path, options: &[&str]) -> &'static str {
        let mut command = Command::new(find_tool("qemu-img").expect("found before"));
        command.current_dir(self.folder.path()).args(["check", "-q", "-f", "qcow2"]).args(options).arg(image);
        match command.output().expect("runs").status.code() {
            Some(0) => "clean",
            Some(2) => "corrupt",
            Some(3) => "leaks",
            _ => "cannot",
        }
    }

    /// The result of a command in qemu-io, and whether the disk still works afterwards.
    fn their_io(&self, oddity: &Oddity, command: &str) -> String {
        let image = self.image();
        let mut io = Command::new(find_tool("qemu-io").expect("found before"));
        io.current_dir(self.folder.path()).args(["-f", "qcow2", "-c", command]);
        let output = io.args(["-c", "write 1M 4k", "-c", "flush"]).arg(&image).output().expect("runs");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let what = command.split(' ').next().unwrap_or_default();
        let told = match () {
            () if text.contains("can't open") => "refused",
            () if text.contains(&format!("{what} failed")) && text.contains("corrupt") => "ends all",
            () if text.contains(&format!("{what} failed")) => "fails",
            () if text.contains("corrupt") => "done; the next allocation ends all",
            () => "done",
        };
        let marks = if is_marked(&image, oddity) { ", marks" } else { "" };
        format!("{what}: {told}{marks}")
    }
}

fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Clean => "clean",
        Verdict::Leaks => "leaks",
        Verdict::Corrupt => "corrupt",
    }
}

fn is_marked(image: &Path, oddity: &Oddity) -> bool {
    oddity.spec.version == 3 && word(image, 72) & 2 != 0
}

#[test]
fn each_oddity_is_treated_as_the_page_says() {
    let Some(qemu) = Qemu::find() else { return };
    let bench = Bench { qemu, folder: tempfile::tempdir().expect("a folder") };
    bench.qemu.create(&bench.folder.path().join("base"), &ImageSpec::qcow2(2 * M)).expect("a base");
    let mut table = String::from(
        "| oddity | check | read | write | `check -r all` | QEMU 10 |\n|---|---|---|---|---|---|\n",
    );
    for oddity in oddities() {
        let row = bench.row(&oddity);
        // A check never reports an image as clean that cannot be served.
        let is_served = !row.contains("| clean") || (!row.contains("fails") && !row.contains("| ends"));
        assert!(is_served, "{row}");
        table += &row;
    }
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/oddities.md");
    let text = std::fs::read_to_string(&page).expect("the page");
    let (before, rest) = text.split_once(BEGIN).expect("where the table begins");
    let (kept, after) = rest.split_once(END).expect("where the table ends");
    if std::env::var_os("STRATA_ODDITIES_WRITE").is_some() {
        std::fs::write(&page, format!("{before}{BEGIN}{table}{END}{after}")).expect("written");
        return;
    }
    assert_eq!(table, kept, "STRATA_ODDITIES_WRITE=1 writes docs/oddities.md anew");
}
