//! Image locks against other processes: QEMU's tools in both directions, and our own second opening.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{LockHow, Owner, lock_image};
use crate::error::{LockConflict, Permission, StorageError};
use crate::host::HostStorage;
use crate::host::tests::skip_unless_required;
use crate::{OpenOptions, Storage};

/// A file for tests without QEMU.
fn image() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image.raw");
    std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("an image");
    (folder, path)
}

/// A qcow2 image. On a raw one QEMU's readers let others write.
fn qcow2_image() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M");
    assert!(create.status().expect("qemu-img can be started").success());
    (folder, path)
}

fn options(writable: bool) -> OpenOptions {
    OpenOptions { writable, direct: false, lock_timeout: Duration::ZERO }
}

/// Whether a tool can be run. Reports a missing tool, and fails if it is required.
fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_ok();
    if !found {
        skip_unless_required(&format!("{tool} is not installed"));
    }
    found
}

fn succeeds(tool: &str, arguments: &[&str], path: &Path) -> bool {
    let output = Command::new(tool).args(arguments).arg(path).output().expect("the tool runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || error.contains("lock"), "{tool} failed for another reason: {error}");
    output.status.success()
}

/// A qemu-io that has the image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn open(path: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(arguments).arg(path);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-io can be started");
        child.stdin.as_mut().expect("a pipe").write_all(b"length\n").expect("qemu-io takes commands");
        let mut answer = String::new();
        let mut output = BufReader::new(child.stdout.as_mut().expect("a pipe"));
        output.read_line(&mut answer).expect("qemu-io answers");
        assert!(answer.contains("MiB"), "qemu-io opened the image: {answer:?}");
        Holder(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn conflict(path: &Path, writable: bool) -> Option<LockConflict> {
    match HostStorage::new().open(path, &options(writable)) {
        Ok(_) => None,
        Err(StorageError::Locked { path: named, conflict, .. }) => {
            assert_eq!(named, path);
            Some(conflict)
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_writer_of_ours_keeps_qemu_out() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (_folder, path) = qcow2_image();
    let storage = HostStorage::new();
    storage.open(&path, &options(true)).expect("no process has it open");
    assert!(!succeeds("qemu-img", &["info", "-f", "qcow2"], &path));
    assert!(!succeeds("qemu-io", &["-f", "qcow2", "-c", "read 0 512"], &path));
    assert!(!succeeds("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512"], &path));
    assert!(succeeds("qemu-img", &["info", "-U", "-f", "qcow2"], &path));
    drop(storage);
    assert!(succeeds("qemu-io", &["-f", "qcow2", "-c", "write 0 512"], &path));
}

#[test]
fn a_reader_of_ours_keeps_only_writers_out() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (_folder, path) = qcow2_image();
    let storage = HostStorage::new();
    storage.open(&path, &options(false)).expect("no process has it open");
    assert!(succeeds("qemu-img", &["info", "-f", "qcow2"], &path));
    assert!(succeeds("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512"], &path));
    assert!(!succeeds("qemu-io", &["-f", "qcow2", "-c", "write 0 512"], &path));
}

#[test]
fn qemu_keeps_us_out() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let (_folder, path) = qcow2_image();
    let writer = Holder::open(&path, &["-f", "qcow2"]);
    assert!(conflict(&path, true).is_some());
    assert!(conflict(&path, false).is_some());
    drop(writer);
    let reader = Holder::open(&path, &["-r", "-f", "qcow2"]);
    assert!(conflict(&path, true).is_some());
    assert_eq!(conflict(&path, false), None);
    drop(reader);
    assert_eq!(conflict(&path, true), None);

    let (_folder, raw) = image();
    let writer = Holder::open(&raw, &["-f", "raw"]);
    assert_eq!(conflict(&raw, true), Some(LockConflict::Uses(Permission::Write)));
    assert_eq!(conflict(&raw, false), Some(LockConflict::Uses(Permission::Write)));
    drop(writer);
}

#[test]
fn a_lock_is_waited_for_and_a_failed_attempt_leaves_none_behind() {
    let (_folder, path) = image();
    let first = HostStorage::new();
    first.open(&path, &options(false)).expect("no process has it open");
    assert_eq!(conflict(&path, true), Some(LockConflict::DoesNotShare(Permission::Write)));
    // If the attempt above had left a lock, this reader would be refused.
    assert_eq!(conflict(&path, false), None);

    let started = Instant::now();
    let short = OpenOptions { lock_timeout: Duration::from_millis(50), ..options(true) };
    assert!(matches!(HostStorage::new().open(&path, &short), Err(StorageError::Locked { .. })));
    assert!(started.elapsed() >= Duration::from_millis(50));

    let waiter = std::thread::spawn({
        let (path, long) =
            (path.clone(), OpenOptions { lock_timeout: Duration::from_secs(60), ..options(true) });
        move || HostStorage::new().open(&path, &long).map(|_| ())
    });
    drop(first);
    waiter.join().expect("no panic").expect("the lock became free");
}

#[test]
fn an_open_without_a_lock_succeeds_and_blocks_no_writer() {
    let (_folder, path) = image();
    let writer = HostStorage::new();
    writer.open(&path, &options(true)).expect("no process has it open");
    assert!(conflict(&path, false).is_some());
    let shared = HostStorage::new();
    let (id, info) = shared.open_shared(&path, false).expect("no lock is asked for");
    assert!(!info.writable);
    assert_eq!(shared.length(id).expect("a length"), info.length);
    drop(writer);
    assert_eq!(conflict(&path, true), None);
}

#[test]
fn the_message_names_file_and_permission() {
    let (_folder, path) = image();
    let storage = HostStorage::new();
    storage.open(&path, &options(true)).expect("no process has it open");
    let error = HostStorage::new().open(&path, &options(false)).expect_err("it is locked").to_string();
    assert!(error.contains(path.to_str().expect("a plain name")), "{error}");
    assert!(error.contains("uses the permission \"write\""), "{error}");
    // Both descriptions are of this process; the one without the lock is not taken for the holder.
    assert!(error.contains(&format!("(pid {}, ", std::process::id())), "{error}");
}

#[test]
fn failing_locks_are_distinguished_from_missing_locks() {
    let unsupported = |errno| super::is_unsupported(&std::io::Error::from_raw_os_error(errno));
    for absent in [libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP] {
        assert!(unsupported(absent), "{absent}");
    }
    let goes_on = |errno, allowed| super::may_go_on(&std::io::Error::from_raw_os_error(errno), allowed);
    assert!(!goes_on(libc::ENOLCK, false) && goes_on(libc::ENOLCK, true), "the operator decides");
    assert!(!goes_on(libc::EIO, true) && goes_on(libc::ENOSYS, false));
    for failed in [libc::ENOLCK, libc::EIO, libc::EBADF, libc::EACCES] {
        assert!(!unsupported(failed), "{failed}");
    }
}

#[test]
fn an_owner_waits_for_the_io_of_its_earlier_storages() {
    let (_folder, path) = image();
    let base = |owner: &str| HostStorage::new().owned_by(Owner::of(owner.as_bytes()));
    let first = base("a.sock");
    first.open(&path, &options(false)).expect("it is free");
    // Another owner shares it, and so does a storage of none.
    let other = base("b.sock");
    other.open(&path, &options(false)).expect("readers share");
    HostStorage::new().open(&path, &options(false)).expect("readers share");
    let again = || base("a.sock").open(&path, &options(false));
    let refused = again().expect_err("the first may be under way");
    let StorageError::Locked { conflict, .. } = refused else { panic!("{refused}") };
    assert_eq!(conflict, LockConflict::Predecessor);
    drop(first);
    let second = base("a.sock");
    second.open(&path, &options(false)).expect("its I/O is over");
    second.open(&path, &options(false)).expect_err("one description at a time");
}

#[test]
fn an_owners_lock_lasts_as_long_as_its_description() {
    let (_folder, path) = image();
    let how = LockHow { owner: Some(Owner::of(b"s")), ..LockHow::default() };
    let open = || std::fs::File::open(&path).expect("opened");
    let lock = |file: &std::fs::File| lock_image(file, &path, &options(false), &how);
    let file = open();
    lock(&file).expect("it is free");
    // A reference to the description, as an operation in flight has one. It outlives the descriptor of its opener.
    let in_flight = file.try_clone().expect("a reference");
    drop(file);
    lock(&open()).expect_err("an operation is in flight");
    let refused = open();
    lock(&refused).expect_err("an operation is in flight");
    drop(in_flight);
    lock(&refused).expect("it is over, and the refused attempts left no lock");
    // The same for one that waits.
    let next = open();
    let waiting = std::thread::scope(|scope| {
        let patient = OpenOptions { lock_timeout: Duration::from_secs(60), ..options(false) };
        let (path, how) = (&path, &how);
        let waits = scope.spawn(move || lock_image(&next, path, &patient, how).is_ok());
        std::thread::yield_now();
        drop(refused);
        waits.join().expect("no panic")
    });
    assert!(waiting);
}

#[test]
fn a_wait_for_a_lock_can_be_given_up() {
    let (_folder, path) = image();
    let first = HostStorage::new();
    first.open(&path, &options(true)).expect("no process has it open");
    let (gives_up, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let waiter = std::thread::spawn({
        let (path, gives_up, asked) = (path.clone(), Arc::clone(&gives_up), Arc::clone(&asked));
        let storage = HostStorage::new().giving_up(move || {
            asked.store(true, Ordering::SeqCst);
            gives_up.load(Ordering::SeqCst)
        });
        let long = OpenOptions { lock_timeout: Duration::from_secs(600), ..options(true) };
        move || storage.open(&path, &long).map(|_| ())
    });
    while !asked.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    gives_up.store(true, Ordering::SeqCst);
    assert!(matches!(waiter.join().expect("no panic"), Err(StorageError::Locked { .. })));
}

#[test]
fn owners_have_bytes_of_their_own() {
    let bytes: std::collections::BTreeSet<i64> =
        (0..10_000).map(|n| Owner::of(format!("/run/vm-{n}.sock").as_bytes()).byte()).collect();
    assert_eq!(bytes.len(), 10_000);
    assert!(bytes.iter().all(|byte| *byte >= 1 << 62));
}
