//! The built program as a user meets it: error messages, one daemon per image, sockets, signals, exit codes.
//!
//! No guest here: the workspace's tests cover what a machine does with the disk.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;

use rustix::process::Signal;

use kit::{Bench, Daemon, PROGRAM, output};

/// Runs the program to its end, which must be a failure whose message contains these words.
fn refused(command: &mut Command, code: i32, words: &[&str]) -> String {
    let (status, _, errors) = output(command);
    assert_eq!(status, Some(code), "{command:?}\n{errors}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is missing in:\n{errors}");
    }
    assert!(!errors.contains("panicked"), "{errors}");
    errors
}

#[test]
fn capabilities_are_printed_with_and_without_a_command() {
    let bench = Bench::new();
    let link = bench.path("strata-blk");
    std::os::unix::fs::symlink(PROGRAM, &link).expect("a link");
    for line in [vec!["--print-capabilities"], vec!["serve", "--print-capabilities"]] {
        for program in [PROGRAM.as_ref(), link.as_path()] {
            if program != link || line.len() == 1 {
                let (status, printed, errors) = output(Command::new(program).args(&line));
                assert_eq!(status, Some(0), "{errors}");
                assert_eq!(printed, "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n");
            }
        }
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    refused(Command::new(PROGRAM).arg("serve"), 2, &["--blk-file"]);
    refused(Command::new(PROGRAM).args(["info", "--format", "vdi", "x"]), 2, &["vdi"]);
    refused(Command::new(PROGRAM).args(["--log-level", "debug"]), 2, &["a command is missing"]);
    refused(&mut Command::new(PROGRAM), 2, &["Usage"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for line in [vec!["--help"], vec!["serve", "--help"], vec!["info", "--help"], vec!["--version"]] {
        let (status, printed, _) = output(Command::new(PROGRAM).args(&line));
        assert_eq!(status, Some(0));
        assert!(printed.contains("strata"), "{printed}");
    }
}

#[test]
fn a_missing_image_is_named() {
    let bench = Bench::new();
    refused(
        &mut bench.serve("missing.qcow2"),
        1,
        &["missing.qcow2", "No such file", "hint", "qemu-img create"],
    );
    refused(Command::new(PROGRAM).arg("info").arg(bench.path("missing.qcow2")), 1, &["missing.qcow2"]);
}

#[test]
fn files_that_are_no_images_are_named() {
    let bench = Bench::new();
    std::fs::write(bench.path("text"), [b'x'; 2000]).expect("written");
    refused(&mut bench.serve("text"), 1, &["text", "not a qcow2 image", "--format raw", "magic"]);
    std::fs::write(bench.path("empty"), []).expect("written");
    let errors = refused(&mut bench.serve("empty"), 1, &["the file is empty", "qemu-img create"]);
    assert!(!errors.contains("--format raw"), "{errors}");
    std::fs::create_dir(bench.path("folder")).expect("made");
    refused(&mut bench.serve("folder"), 1, &["folder", "is a directory"]);
    let _listener = UnixListener::bind(bench.path("socket")).expect("bound");
    refused(&mut bench.serve("socket"), 1, &["is a socket"]);
    assert!(!bench.socket().exists(), "nothing may be left of a start that failed");
}

#[test]
fn a_missing_backing_file_is_told_from_the_image() {
    let bench = Bench::new();
    bench.image_over("top.qcow2", Some(("gone.raw", Some("raw"))));
    let words = ["gone.raw", "No such file", "backing chain of", "top.qcow2", "rebase"];
    refused(&mut bench.serve("top.qcow2"), 1, &words);
    bench.image_over("top.qcow2", Some(("gone.raw", None)));
    refused(&mut bench.serve("top.qcow2"), 1, &["--backing-format"]);
    std::fs::write(bench.path("gone.raw"), [b'x'; 4096]).expect("written");
    bench.image_over("top.qcow2", Some(("gone.raw", Some("qcow2"))));
    let words = ["gone.raw", "not a qcow2", "its overlay records", "-F raw", "top.qcow2 -> "];
    let errors = refused(&mut bench.serve("top.qcow2"), 1, &words);
    assert!(!errors.contains("--format raw"), "{errors}");
    bench.image_over("top.qcow2", Some(("gone.raw", None)));
    let words = ["gone.raw", "not a qcow2", "--backing-format raw"];
    refused(bench.serve("top.qcow2").args(["--backing-format", "qcow2"]), 1, &words);
}

#[test]
fn a_data_file_is_opened_only_if_it_is_named() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let data = bench.path("disk.data");
    refused(bench.serve("disk.qcow2").arg("--data-file").arg(&data), 1, &["keeps its data itself"]);
    let image = std::fs::OpenOptions::new().write(true).open(bench.path("disk.qcow2")).expect("the image");
    image.write_all_at(&[4], 79).expect("its data is elsewhere");
    refused(&mut bench.serve("disk.qcow2"), 1, &["disk.qcow2", "external file", "--data-file FILE"]);
    let errors =
        refused(bench.serve("disk.qcow2").arg("--data-file").arg(&data), 1, &["disk.data", "No such"]);
    assert!(!errors.contains("qemu-img create"), "{errors}");
    std::fs::write(&data, []).expect("written");
    let daemon = Daemon::start(bench.serve("disk.qcow2").arg("--data-file").arg(&data));
    assert!(daemon.log().contains("clusters of 64 KiB and its data in"), "{}", daemon.log());
    let mut second = Command::new(PROGRAM);
    second.args(["serve", "--format", "raw", "--image"]).arg(&data).arg("--socket").arg(bench.path("other"));
    refused(&mut second, 1, &["disk.data", "in use by another process"]);
    daemon.stop();
    assert_eq!(std::fs::metadata(&data).expect("the data file").len(), 1 << 20, "as long as the disk");
    let elsewhere = bench.path("elsewhere");
    std::fs::create_dir(&elsewhere).expect("made");
    let mut confined = bench.serve("disk.qcow2");
    confined.arg("--data-file").arg(&data).arg("--chain-root").arg(&elsewhere);
    refused(&mut confined, 1, &["--chain-root"]);
    let image = bench.path("disk.qcow2").display().to_string();
    bench.image_over("top.qcow2", Some(("disk.qcow2", Some("qcow2"))));
    let option = format!("--backing-data-file={image}=FILE");
    refused(&mut bench.serve("top.qcow2"), 1, &["external file", &option, "layer 2"]);
    let pair = format!("{image}={}", data.display());
    Daemon::start(bench.serve("top.qcow2").args(["--backing-data-file", &pair])).stop();
}

#[test]
fn a_second_daemon_on_an_image_is_refused() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let mut second = Command::new(PROGRAM);
    second.args(["serve", "--image"]).arg(bench.path("disk.qcow2")).arg("--socket").arg(bench.path("other"));
    refused(&mut second, 1, &["disk.qcow2", "in use by another process", "--read-only"]);
    let mut info = Command::new(PROGRAM);
    info.arg("info").arg(bench.path("disk.qcow2"));
    refused(&mut info, 1, &["in use by another process", "may change"]);
    daemon.stop();
    assert_eq!(output(&mut info).0, Some(0));
}

/// Sets the refcount of a cluster in one of the bench's images, and extends the file to that cluster.
fn set_refcount(path: &std::path::Path, cluster: usize, count: u64) {
    let mut bytes = std::fs::read(path).expect("read");
    let header = qcow2::Header::parse(&bytes, bytes.len() as u64).expect("a header");
    let refblock = qcow2::entry(&bytes[header.refcount_table_offset.0 as usize..], 0) as usize;
    qcow2::set_refcount(header.refcount_order, &mut bytes[refblock..], cluster, count);
    bytes.resize(bytes.len().max((cluster + 1) << 16), 0);
    std::fs::write(path, bytes).expect("written");
}

#[test]
fn check_has_the_exit_codes_of_qemu_img() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let path = bench.path("disk.qcow2");
    let check = |options: &[&str]| output(Command::new(PROGRAM).arg("check").args(options).arg(&path));
    let (code, text, errors) = check(&[]);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{text}");
    assert!(text.contains("disk.qcow2: clean, nothing is wrong\n"), "{text}");
    set_refcount(&path, 9, 1);
    let (code, text, _) = check(&[]);
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("leak ") && text.contains("1 leaked cluster:") && text.contains("-r leaks"),
        "{text}"
    );
    let (code, text, _) = check(&["-r", "leaks", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((code, &json["leaks"], &json["leaks-fixed"]), (Some(0), &0.into(), &1.into()), "{text}");
    set_refcount(&path, 0, 0);
    let (code, text, _) = check(&["-r", "leaks"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("refcount 0 is too low") && text.contains("-r all"), "{text}");
    let (code, text, _) = check(&["-r", "all"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("before the repair") && text.contains("clean after the repair"), "{text}");
    // An L1 entry that points to a table far away: no refcount repairs that.
    let mut bytes = std::fs::read(&path).expect("read");
    let header = qcow2::Header::parse(&bytes, bytes.len() as u64).expect("a header");
    qcow2::set_entry(&mut bytes[header.l1_offset.0 as usize..], 0, 1 << 40);
    std::fs::write(&path, &bytes).expect("written");
    let (code, text, _) = check(&["-r", "all"]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("not repaired: ") && text.contains("past the end"), "{text}");
    assert_eq!(std::fs::read(&path).expect("read"), bytes);
}

/// Each step follows the hint of the one before, and the last one succeeds.
#[test]
fn the_advice_for_snapshots_that_cannot_be_read_leads_to_a_sound_image() {
    let bench = Bench::new();
    bench.image("image");
    let path = bench.path("image");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[63] = 1;
    bytes[64..72].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    std::fs::write(&path, &bytes).expect("written");
    let run = |options: &[&str]| output(Command::new(PROGRAM).args(options).arg(&path));
    let (_, _, errors) = run(&["snapshot", "-c", "new"]);
    assert!(errors.contains("strata check -r all"), "{errors}");
    let (code, text, _) = run(&["check"]);
    assert!(code == Some(2) && text.contains("`strata check -r all` mends it"), "{text}");
    assert!(text.contains("drops the snapshots that cannot be read"), "{text}");
    let (code, text, _) = run(&["check", "-r", "all"]);
    assert!(code == Some(0) && text.contains("were dropped from the snapshot table"), "{text}");
    assert_eq!(run(&["check"]).0, Some(0));
    // A cluster that may belong to a snapshot.
    bytes.resize(bytes.len().next_multiple_of(65_536) + 65_536, 7);
    let last = bytes.len() / 65_536 - 1;
    std::fs::write(&path, &bytes).expect("written");
    set_refcount(&path, last, 1);
    let (_, text, _) = run(&["check"]);
    assert!(text.contains("`strata check -r all` would refuse it"), "{text}");
    for kind in ["leaks", "all"] {
        let (code, text, _) = run(&["check", "-r", kind]);
        assert!(code == Some(2) && text.contains("not repaired"), "{text}");
    }
    assert!(text.contains("serve --read-only") && text.contains("check -r drop-snapshots"), "{text}");
    assert_eq!(run(&["check", "-r", "drop-snapshots"]).0, Some(0));
    assert_eq!(run(&["check"]).0, Some(0));
}

#[test]
fn an_image_that_cannot_be_checked_is_exit_code_1() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let path = bench.path("disk.qcow2");
    let check = |options: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("check").args(options).arg(&path);
        command
    };
    refused(Command::new(PROGRAM).arg("check").arg(bench.path("gone")), 1, &["gone", "No such file"]);
    refused(&mut check(&["--format", "raw"]), 63, &["a raw image has no metadata"]);
    // Exit code 2 would mean that the image is corrupt.
    refused(&mut check(&["--no-such-option"]), 1, &["--no-such-option"]);
    refused(&mut check(&["-U", "-r", "all"]), 1, &["--force-share"]);
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    refused(&mut check(&[]), 1, &["in use by another process", "--force-share"]);
    refused(&mut check(&["-r", "all"]), 1, &["in use by another process"]);
    assert_eq!(output(&mut check(&["--force-share"])).0, Some(0));
    daemon.stop();
    assert_eq!(output(&mut check(&[])).0, Some(0));
}

#[test]
fn readers_share_an_image() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let first = Daemon::start(bench.serve("disk.qcow2").arg("--read-only"));
    let mut second = Command::new(PROGRAM);
    second.args(["serve", "--read-only", "--image"]).arg(bench.path("disk.qcow2"));
    let second = Daemon::start(second.arg("--socket").arg(bench.path("other")));
    first.stop();
    second.stop();
}

#[test]
fn a_bad_place_for_the_socket_is_named_before_the_image_is_opened() {
    let bench = Bench::new();
    let serve = |socket: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--blk-file", "/nowhere/x.qcow2", "--socket-path"]).arg(bench.path(socket));
        command
    };
    refused(&mut serve(&"x".repeat(120)), 1, &["107", "shorter"]);
    refused(&mut serve("no/such/socket"), 1, &["no/such", "No such file", "mkdir"]);
    std::fs::write(bench.path("file"), []).expect("written");
    refused(&mut serve("file/socket"), 1, &["file", "ot a directory"]);
    refused(serve("s").args(["--socket-group", "no-such-group"]), 1, &["no-such-group", "/etc/group"]);
}

#[test]
fn a_live_socket_and_other_files_are_left_alone() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let listener = UnixListener::bind(bench.socket()).expect("bound");
    refused(&mut bench.serve("disk.qcow2"), 1, &["another program is listening", "--socket-path"]);
    assert!(UnixStream::connect(bench.socket()).is_ok());
    drop(listener);
    std::fs::remove_file(bench.socket()).expect("removed");
    std::fs::write(bench.socket(), b"precious").expect("written");
    refused(&mut bench.serve("disk.qcow2"), 1, &["is not a socket"]);
    assert_eq!(std::fs::read(bench.socket()).expect("read"), b"precious");
}

#[test]
fn a_stale_socket_is_replaced_and_the_daemons_own_goes() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    drop(UnixListener::bind(bench.socket()).expect("bound"));
    for signal in [Signal::TERM, Signal::INT] {
        let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
        let metadata = std::fs::metadata(bench.socket()).expect("there");
        assert!(metadata.file_type().is_socket());
        let _frontend = UnixStream::connect(bench.socket()).expect("connected");
        daemon.signal(Signal::HUP);
        let log = daemon.stop_with(signal);
        assert!(log.contains("totals reads=0 writes=0"), "{log}");
        assert!(!bench.socket().exists());
    }
}

#[test]
fn a_daemon_whose_log_nobody_reads_ends_as_cleanly() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    Daemon::start(&mut bench.serve("disk.qcow2")).stop_unheard();
    assert!(!bench.socket().exists());
}

#[test]
fn the_sockets_mode_and_group_are_as_asked() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let group = rustix::process::getegid().as_raw();
    let mode = |options: &[&str]| {
        let daemon = Daemon::start(bench.serve("disk.qcow2").args(options));
        let metadata = std::fs::metadata(bench.socket()).expect("there");
        daemon.stop();
        assert_eq!(metadata.gid(), group);
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(&["--socket-mode", "0606"]), 0o606);
    assert_eq!(mode(&["--socket-group", &group.to_string()]), 0o660);
}

#[test]
fn an_inherited_listener_is_served() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let listener = UnixListener::bind(bench.socket()).expect("bound");
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("inheritable");
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
    let daemon = Daemon::start(command.args(["--fd", &listener.as_raw_fd().to_string()]));
    assert!(daemon.log().contains("on file descriptor"), "{}", daemon.log());
    // One descriptor, so that the listener is gone as soon as the daemon closes it at a stop.
    let inode = rustix::fs::fstat(&listener).expect("open").st_ino;
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("its descriptors");
    let targets = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    assert_eq!(targets.filter(|target| target.as_os_str() == &*format!("socket:[{inode}]")).count(), 1);
    daemon.stop();
    assert!(bench.socket().exists(), "a socket file of somebody else's stays");
}

#[test]
fn an_inherited_connection_is_served_until_it_ends() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let (ours, its) = UnixStream::pair().expect("a pair");
    rustix::io::fcntl_setfd(&its, rustix::io::FdFlags::empty()).expect("inheritable");
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
    let daemon = Daemon::start(command.args(["--fd", &its.as_raw_fd().to_string()]));
    drop((ours, its));
    let log = daemon.wait();
    assert!(log.contains("totals"), "{log}");
}

#[test]
fn a_service_managers_socket_is_served_and_stays() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let listener = UnixListener::bind(bench.socket()).expect("bound");
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("inheritable");
    let number = listener.as_raw_fd();
    let under_manager = |sockets: u32| {
        let script = format!("exec 3<&{number}; LISTEN_PID=$$ LISTEN_FDS={sockets} exec \"$0\" \"$@\"");
        let mut command = Command::new("bash");
        command.args(["-c", &script, PROGRAM, "serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
        command
    };
    let daemon = Daemon::start(&mut under_manager(1));
    assert!(daemon.log().contains("on the service manager's socket"), "{}", daemon.log());
    daemon.stop();
    assert!(bench.socket().exists(), "the socket file is the manager's");
    UnixStream::connect(bench.socket()).expect("and it still listens");
    refused(&mut under_manager(2), 1, &["passed 2 sockets"]);
    let mut of_another = Command::new(PROGRAM);
    of_another.args(["serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
    refused(of_another.env("LISTEN_PID", "1").env("LISTEN_FDS", "1"), 2, &["a socket is missing"]);
}

#[test]
fn logs_for_programs_and_for_the_journal() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let log = bench.path("log");
    let run = |options: &[&str], journal: bool| {
        let file = std::fs::File::create(&log).expect("made");
        let metadata = file.metadata().expect("there");
        let stream =
            if journal { format!("{}:{}", metadata.dev(), metadata.ino()) } else { "1:2".to_owned() };
        let mut command = Command::new(PROGRAM);
        command.args(["snapshot", "-c", "x", "--allow-unlocked"]).args(options).arg(bench.path("none.qcow2"));
        command.env("JOURNAL_STREAM", stream).env("RUST_LOG", "a=b=c").stderr(file);
        assert_eq!(command.status().expect("it runs").code(), Some(1));
        std::fs::read_to_string(&log).expect("text")
    };
    let text = run(&[], true);
    assert!(text.starts_with("<4>WARN RUST_LOG is no filter"), "{text}");
    assert!(text.lines().all(|line| line.starts_with("<3>") || line.starts_with("<4>")), "{text}");
    assert!(!run(&[], false).contains('<'), "the standard error is not the journal's");
    let lines = |options: &[&str]| -> Vec<serde_json::Value> {
        let text = run(options, false);
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let told = lines(&["--log-format", "json"]);
    assert_eq!(
        (&told[0]["level"], told[0]["message"].as_str().map(|text| &text[..8])),
        (&"WARN".into(), Some("RUST_LOG"))
    );
    // The error that ends the program is a line of the log, whatever the log's level.
    for told in [told, lines(&["--log-format", "json", "--log-level", "off"])] {
        let last = told.last().expect("a line");
        assert_eq!((&last["level"], &last["hint"].is_string()), (&"ERROR".into(), &true), "{last}");
        assert!(last["message"].as_str().is_some_and(|text| text.contains("none.qcow2")), "{last}");
        assert!(last["timestamp"].is_string(), "{last}");
    }
}

#[test]
fn a_descriptor_that_is_no_socket_is_refused() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
    refused(command.args(["--fd", "2"]), 1, &["descriptor", "--fd"]);
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "--blk-file"]).arg(bench.path("disk.qcow2"));
    refused(command.args(["--fd", "900"]), 1, &["descriptor", "--fd"]);
}

#[test]
fn the_service_manager_is_notified() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let manager = UnixDatagram::bind(bench.path("notify")).expect("bound");
    let daemon = Daemon::start(bench.serve("disk.qcow2").env("NOTIFY_SOCKET", bench.path("notify")));
    let mut buffer = [0; 64];
    let mut told = || {
        let length = manager.recv(&mut buffer).expect("received");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert_eq!(told(), "READY=1\nSTATUS=waiting for a frontend");
    let frontend = UnixStream::connect(bench.socket()).expect("it listens");
    assert_eq!(told(), "STATUS=attached to a frontend");
    drop(frontend);
    assert_eq!(told(), "STATUS=draining the requests in hand");
    assert_eq!(told(), "STATUS=waiting for a frontend");
    daemon.stop();
    assert_eq!(told(), "STOPPING=1\nSTATUS=draining the requests in hand");
}

#[test]
fn a_watchdog_is_pinged_if_it_is_ours() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let manager = UnixDatagram::bind(bench.path("notify")).expect("bound");
    let start = |pid: Option<&str>| {
        let mut command = bench.serve("disk.qcow2");
        command.env("NOTIFY_SOCKET", bench.path("notify")).env("WATCHDOG_USEC", "200000");
        if let Some(pid) = pid {
            command.env("WATCHDOG_PID", pid);
        }
        Daemon::start(&mut command)
    };
    let mut buffer = [0; 64];
    let mut told =
        || manager.recv(&mut buffer).map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned());
    let daemon = start(None);
    assert!(told().expect("received").starts_with("READY=1"));
    for _ in 0..3 {
        assert_eq!(told().expect("received"), "WATCHDOG=1");
    }
    daemon.stop();
    while told().is_ok_and(|told| !told.starts_with("STOPPING=1")) {}
    manager.set_nonblocking(true).expect("set");
    while told().is_ok() {}
    let daemon = start(Some("1"));
    manager.set_nonblocking(false).expect("set");
    manager.set_read_timeout(Some(std::time::Duration::from_millis(500))).expect("set");
    assert!(told().expect("received").starts_with("READY=1"));
    assert!(told().is_err(), "the watchdog of another process");
    daemon.stop();
}

#[test]
fn a_raw_image_is_served() {
    let bench = Bench::new();
    std::fs::write(bench.path("disk.img"), vec![0; 1 << 20]).expect("written");
    let daemon = Daemon::start(bench.serve("disk.img").args(["--format", "raw", "--cache", "writeback"]));
    assert!(daemon.log().contains("1 MiB, raw, up to 64 queues"), "{}", daemon.log());
    daemon.stop();
    assert_eq!(std::fs::read(bench.path("disk.img")).expect("read"), vec![0; 1 << 20]);
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_not_the_end() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    // The start fills the image's last block up, which grows the file past the limit.
    let mut image =
        std::fs::OpenOptions::new().append(true).open(bench.path("disk.qcow2")).expect("the image");
    image.write_all(&[0; 100]).expect("written");
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 0 && exec \"$0\" \"$@\"", PROGRAM, "serve"]);
    limited.arg("--blk-file").arg(bench.path("disk.qcow2")).arg("--socket-path").arg(bench.socket());
    refused(&mut limited, 1, &["disk.qcow2", "File too large"]);
}

#[test]
fn info_describes_a_chain() {
    let bench = Bench::new();
    std::fs::write(bench.path("base.raw"), vec![0; 1 << 16]).expect("written");
    bench.image_over("top.qcow2", Some(("base.raw", Some("raw"))));
    let before = std::fs::read(bench.path("top.qcow2")).expect("read");
    let (status, text, errors) =
        output(Command::new(PROGRAM).args(["info", "--backing-chain"]).arg(bench.path("top.qcow2")));
    assert_eq!(status, Some(0), "{errors}");
    for line in [
        "layer:            1 of 2, the image",
        "virtual size:     1 MiB (1048576 bytes)",
        "backing file:     base.raw",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is missing in:\n{text}");
    }
    let line = ["info", "--backing-chain", "--json"];
    let (_, json, _) = output(Command::new(PROGRAM).args(line).arg(bench.path("top.qcow2")));
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value.as_array().map(Vec::len), Some(2));
    assert_eq!(value[0]["full-backing-filename"], bench.path("base.raw").display().to_string());
    assert_eq!((&value[1]["format"], &value[1]["virtual-size"]), (&"raw".into(), &65536.into()));
    assert_eq!(std::fs::read(bench.path("top.qcow2")).expect("read"), before);
}

#[test]
fn snapshots_are_made_listed_applied_and_deleted() {
    let bench = Bench::new();
    bench.image("i");
    let snapshot = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("snapshot").args(arguments).arg(bench.path("i"));
        command
    };
    let done = |arguments: &[&str]| {
        let (status, printed, errors) = output(&mut snapshot(arguments));
        assert_eq!((status, errors.as_str()), (Some(0), ""), "{arguments:?}");
        printed
    };
    assert_eq!(done(&["-l"]), "ID  NAME  DATE (UTC)  DISK  VM STATE  VM CLOCK\n");
    done(&["-c", "before"]);
    done(&["--create", "after"]);
    let listed = done(&[]);
    assert!(listed.contains("1   before  20") && listed.contains("2   after   20"), "{listed}");
    let json: serde_json::Value = serde_json::from_str(&done(&["--json"])).expect("JSON");
    let names = [0, 1].map(|index| json[index]["name"].as_str());
    assert_eq!((names, json[0]["virtual-size"].as_u64()), ([Some("before"), Some("after")], Some(1 << 20)));
    done(&["-a", "before"]);
    done(&["-d", "2"]);
    refused(&mut snapshot(&["-d", "after"]), 1, &["no snapshot", "after"]);
    refused(&mut snapshot(&["-c", "before"]), 1, &["already"]);
    refused(&mut snapshot(&["-c", "x", "-d", "before"]), 2, &["cannot be used with"]);
    refused(&mut snapshot(&["-c", "x", "--json"]), 2, &["cannot be used with"]);
    let missing = bench.serve("i").args(["--snapshot", "none"]).output().expect("it runs");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("no internal snapshot \"none\""));
    let daemon = Daemon::start(bench.serve("i").args(["--snapshot", "before"]));
    assert_eq!(done(&["-l"]).lines().count(), 2, "a reader bothers no reader");
    refused(&mut snapshot(&["-d", "before"]), 1, &["in use by another process"]);
    drop(daemon);
}

#[test]
fn disks_get_another_size() {
    let bench = Bench::new();
    bench.image("i");
    let resize = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("resize").args(&arguments[..arguments.len() - 1]).arg(bench.path("i"));
        command.arg(arguments[arguments.len() - 1]);
        command
    };
    let done = |arguments: &[&str]| {
        let (status, printed, errors) = output(&mut resize(arguments));
        assert_eq!((status, errors.as_str()), (Some(0), ""), "{arguments:?}");
        printed
    };
    assert!(done(&["3M"]).contains("from 1 MiB") && done(&["+1M"]).contains("to 4 MiB"));
    assert!(done(&["4M"]).contains("already"));
    refused(&mut resize(&["-2M"]), 1, &["4194304 bytes", "--shrink"]);
    done(&["--shrink", "-2M"]);
    refused(&mut resize(&["100"]), 1, &["100 bytes", "512"]);
    refused(&mut resize(&["most"]), 2, &["K, M, G"]);
    let daemon = Daemon::start(&mut bench.serve("i"));
    refused(&mut resize(&["4M"]), 1, &["in use by another process"]);
    drop(daemon);
    let (_, json, _) = output(Command::new(PROGRAM).args(["info", "--json"]).arg(bench.path("i")));
    let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(value["virtual-size"], 2 << 20);
}

#[test]
fn a_disk_has_whole_logical_blocks() {
    let bench = Bench::new();
    let file = std::fs::File::create(bench.path("disk.raw")).expect("a file");
    file.set_len((1 << 20) + 512).expect("its length");
    let serve = |options: &[&str]| {
        let mut command = bench.serve("disk.raw");
        command.args(["--format", "raw"]).args(options);
        command
    };
    let blocks = ["--logical-block-size", "4096"];
    let words = ["1049088 bytes", "no multiple of a logical block of 4096 bytes", "--logical-block-size 512"];
    refused(&mut serve(&blocks), 1, &words);
    refused(&mut serve(&["--logical-block-size", "1024"]), 2, &["512 or 4096"]);
    let smaller = [&blocks[..], &["--physical-block-size", "512"]].concat();
    refused(&mut serve(&smaller), 2, &["cannot be less"]);
    Daemon::start(&mut serve(&[])).stop();
    file.set_len((1 << 20) + 4096).expect("its length");
    Daemon::start(&mut serve(&blocks)).stop();
}
