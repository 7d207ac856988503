//! Tests of opening: refused kinds of files, locks, file ids, direct I/O and block devices.

use super::*;

#[test]
fn a_file_that_cannot_be_an_image_is_refused_with_its_type() {
    let folder = in_memory();
    let refused = |path: &Path| HostStorage::new().open(path, &options(false, true)).expect_err("no image");
    let kind = |path: &Path| match refused(path) {
        StorageError::NotAnImage { kind, .. } => kind,
        other => panic!("{other}"),
    };
    assert_eq!(kind(folder.path()), FileKind::Directory);
    assert_eq!(kind(Path::new("/dev/null")), FileKind::CharacterDevice);
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).expect("a fifo");
    assert_eq!(kind(&fifo), FileKind::Fifo);
    let socket = folder.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    assert_eq!(kind(&socket), FileKind::Socket);
    let missing = refused(&folder.path().join("missing")).to_string();
    assert!(missing.contains("missing: opening failed: No such file"), "{missing}");
    let writable = HostStorage::new().open(folder.path(), &options(true, true)).expect_err("no image");
    assert!(matches!(writable, StorageError::NotAnImage { kind: FileKind::Directory, .. }), "{writable}");
}

#[test]
fn closing_releases_the_lock_while_another_descriptor_shares_the_description() {
    everywhere(&pattern(4096, 14), |bench| {
        // As in a child between fork and exec.
        let shared = bench.storage.file(bench.file).file.try_clone().expect("a second descriptor");
        assert_eq!(bench.bare(Kind::Sync, 0), Ok(()));
        let path = bench.folder.path().join("image");
        let other = HostStorage::new();
        bench.storage = HostStorage::new();
        // The queue may still do I/O on the file.
        assert!(matches!(other.open(&path, &options(true, true)), Err(StorageError::Locked { .. })));
        bench.queue = bench.storage.queue(8).expect("a queue");
        other.open(&path, &options(true, true)).expect("it is free");
        drop(shared);
    });
}

#[test]
fn a_file_open_for_writing_is_not_opened_again() {
    let folder = in_memory();
    let (path, link) = (folder.path().join("image"), folder.path().join("link"));
    std::fs::write(&path, [0; 512]).expect("a file");
    std::fs::hard_link(&path, &link).expect("a link");
    let patient = OpenOptions { lock_timeout: LONG, ..options(true, false) };
    let storage = HostStorage::new();
    storage.open(&path, &patient).expect("it opens");
    // At once, not after the lock's timeout.
    let started = Instant::now();
    let again = storage.open(&link, &OpenOptions { writable: false, ..patient.clone() });
    assert!(matches!(again, Err(StorageError::AlreadyOpen { file: FileId(0), .. })));
    assert!(started.elapsed() < LONG / 2);

    let readers = HostStorage::new();
    drop(storage);
    let (_, first) = readers.open(&path, &options(false, false)).expect("it opens");
    let (_, second) = readers.open(&link, &options(false, false)).expect("a second reader");
    assert_eq!(first.identity, second.identity);
    assert!(matches!(readers.open(&path, &patient), Err(StorageError::AlreadyOpen { .. })));
}

#[test]
fn the_direct_option_sets_o_direct() {
    let Some(folder) = on_disk() else { return };
    for direct in [false, true] {
        let bench = Bench::new(tempfile::tempdir_in(folder.path()).expect("a folder"), direct, &[0; 4096]);
        let open = bench.storage.file(bench.file);
        let flags = rustix::fs::fcntl_getfl(&open.file).expect("the flags");
        assert!(!flags.contains(OFlags::NONBLOCK));
        assert_eq!(flags.contains(OFlags::DIRECT), bench.info.offset_alignment > 1);
        assert!(direct || bench.info.offset_alignment == 1);
        assert!(!open.memory_backed && !bench.info.block_device);
        let mut text = String::new();
        let number = std::os::fd::AsRawFd::as_raw_fd(&open.file);
        let mut about = std::fs::File::open(format!("/proc/self/fdinfo/{number}")).expect("it is there");
        about.read_to_string(&mut text).expect("it can be read");
        let octal = text.lines().find_map(|line| line.strip_prefix("flags:")).expect("a line").trim();
        let flags = u32::from_str_radix(octal, 8).expect("octal");
        assert_ne!(flags & libc::O_CLOEXEC as u32, 0);
    }
}

/// A loop device over a file, detached when dropped.
struct LoopDevice(String);

impl LoopDevice {
    fn attach(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(path).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(LoopDevice(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_served() {
    let Some(folder) = on_disk() else { return };
    let backing = folder.path().join("backing");
    std::fs::write(&backing, pattern(1 << 20, 13)).expect("a file");
    let Some(device) = LoopDevice::attach(&backing) else {
        skip("no loop device can be made here");
        return;
    };
    for direct in [true, false] {
        let storage = HostStorage::new();
        let (file, info) = storage.open(Path::new(&device.0), &options(true, direct)).expect("it opens");
        assert_eq!((info.block_device, info.length, info.identity.device), (true, 1 << 20, 0));
        assert_eq!(info.offset_alignment, if direct { 512 } else { 1 });
        assert_eq!(storage.length(file).expect("the host reports it"), 1 << 20);
        assert_eq!(storage.allocated(file).expect("the host reports it"), 1 << 20);
        let queue = storage.queue(8).expect("a queue");
        let mut bench = Bench {
            folder: tempfile::tempdir_in(folder.path()).expect("a folder"),
            storage,
            queue,
            file,
            info,
        };
        assert_eq!(bench.run(Kind::Write, 4096, Parts::from_vec(vec![owned(&[5; 8192])])).result, Ok(()));
        assert_eq!(bench.bare(Kind::Zero { length: 4096 }, 8192), Ok(()));
        let read = bench.run(Kind::Read, 4096, Parts::from_vec(vec![owned(&[1; 8192])]));
        assert!(all_bytes(&read.parts) == [[5; 4096], [0; 4096]].concat());
        // The backing file supports punching, so the device does.
        assert_eq!(bench.bare(Kind::Punch { length: 4096 }, 4096), Ok(()));
        assert_eq!(bench.bare(Kind::Sync, 0), Ok(()));
        let end = bench.run(Kind::Read, (1 << 20) - 4096, Parts::from_vec(vec![owned(&[1; 8192])]));
        let expected = [&pattern(1 << 20, 13)[(1 << 20) - 4096..], &[0; 4096]].concat();
        assert!(end.result == Ok(()) && all_bytes(&end.parts) == expected);
        assert_eq!(bench.bare(Kind::Allocate { length: 4096 }, 0), Ok(()));
        assert_eq!(bench.bare(Kind::Allocate { length: 4096 }, 1 << 20), Err(Errno::ENOSPC));
        let beyond = bench.run(Kind::Write, 1 << 20, Parts::from_vec(vec![owned(&[1; 512])]));
        assert_eq!(beyond.result, Err(Errno::ENOSPC));
    }
}
