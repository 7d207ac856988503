//! Signals, limits and locks of the host, as the built program meets them.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use kit::{Bench, Daemon, PROGRAM, output};

/// A command under a limit of the shell, such as `-f 0`.
fn limited(limit: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit {limit} && exec \"$0\" \"$@\""), PROGRAM]).args(arguments);
    command
}

#[test]
fn a_limit_of_file_sizes_is_an_error_of_every_command() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let image = bench.path("disk.qcow2").display().to_string();
    for arguments in [vec!["resize", &image, "1G"], vec!["snapshot", "-c", "x", &image]] {
        let (code, _, errors) = output(&mut limited("-f 0", &arguments));
        assert_eq!(code, Some(1), "{arguments:?}\n{errors}");
        assert!(errors.contains("File too large"), "{arguments:?}\n{errors}");
    }
    let (code, text, _) = output(Command::new(PROGRAM).args(["check", &image]));
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn the_limit_of_open_files_is_named() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let (socket, image) =
        (bench.socket().display().to_string(), bench.path("disk.qcow2").display().to_string());
    let arguments = ["serve", "--blk-file", &image, "--socket-path", &socket];
    // The shell itself needs some descriptors.
    let (code, _, errors) = output(&mut limited("-n 8", &arguments));
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.contains("may have 8 files open") && errors.contains("LimitNOFILE"), "{errors}");
}

#[test]
fn signals_for_progress_end_no_daemon() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    daemon.signal(Signal::USR2);
    daemon.signal(Signal::USR1);
    daemon.wait_for("totals reads=0 writes=0");
    let log = daemon.stop();
    assert_eq!(log.matches("totals reads=0").count(), 2, "{log}");
}

#[test]
fn a_change_outlives_a_signal() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let holder = Daemon::start(&mut bench.serve("disk.qcow2"));
    let mut resize = Command::new(PROGRAM);
    resize.args(["resize", "--lock-timeout", "60"]).arg(bench.path("disk.qcow2")).arg("2M");
    let mut resize = resize.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    let mut errors = std::io::BufReader::new(resize.stderr.take().expect("piped"));
    let mut wait_for = |word: &str| {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            let length = std::io::BufRead::read_line(&mut errors, &mut line).expect("text");
            assert!(length > 0, "it ended before it said {word:?}");
        }
        line
    };
    let line = wait_for("waiting up to 60 s");
    assert!(line.contains("in use by pid ") && line.contains(", strata"), "{line}");
    kill_process(Pid::from_child(&resize), Signal::TERM).expect("it runs");
    wait_for("SIGTERM: the change goes on");
    holder.stop();
    let ended = resize.wait_with_output().expect("waited for");
    assert_eq!((ended.status.code(), ended.status.signal()), (Some(0), None));
    assert!(String::from_utf8_lossy(&ended.stdout).contains("to 2 MiB"));
}

#[test]
fn a_locked_image_names_its_holder_at_once() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let (code, _, errors) =
        output(Command::new(PROGRAM).args(["check", "--lock-timeout", "0"]).arg(bench.path("disk.qcow2")));
    assert_eq!(code, Some(1), "{errors}");
    let holder = format!("in use by another process (pid {}, strata)", daemon.pid());
    assert!(errors.contains(&holder) && !errors.contains("waiting"), "{errors}");
    daemon.stop();
}

#[test]
fn a_disk_in_use_gets_the_size_in_its_file() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let size = bench.path("size");
    let mut daemon = Daemon::start(bench.serve("disk.qcow2").arg("--size-file").arg(&size));
    for (text, said) in [
        (None, "the disk keeps its size"),
        (Some("2M\n"), "the disk has 2 MiB (2097152 bytes) now, 1 MiB (1048576 bytes) before"),
        (Some("2M"), "the disk has 2 MiB (2097152 bytes) already"),
        (Some("1M"), "the disk keeps its 2 MiB"),
        (Some("1M shrink"), "the disk has 1 MiB (1048576 bytes) now"),
        (Some("7777"), "no multiple of a block of 512 bytes"),
        (Some("9T"), "the table can be moved only while the image is not in use"),
        (Some("3M"), "the disk has 3 MiB"),
    ] {
        if let Some(text) = text {
            std::fs::write(&size, text).expect("written");
        }
        daemon.signal(Signal::HUP);
        daemon.wait_for(said);
    }
    daemon.stop();
    let (code, text, _) = output(Command::new(PROGRAM).arg("info").arg(bench.path("disk.qcow2")));
    assert!(code == Some(0) && text.contains("3 MiB"), "{text}");
    let (code, text, _) = output(Command::new(PROGRAM).arg("check").arg(bench.path("disk.qcow2")));
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn a_raw_disk_in_use_gets_the_size_of_its_file() {
    let bench = Bench::new();
    let file = std::fs::File::create(bench.path("disk.raw")).expect("a file");
    file.set_len(1 << 20).expect("its length");
    let mut daemon = Daemon::start(bench.serve("disk.raw").args(["--format", "raw"]));
    file.set_len(4 << 20).expect("its length");
    daemon.signal(Signal::HUP);
    daemon.wait_for("the disk has 4 MiB (4194304 bytes) now");
    file.set_len(2 << 20).expect("its length");
    daemon.signal(Signal::HUP);
    daemon.wait_for("although its file now has only 2 MiB");
    daemon.stop();
}

#[test]
fn a_resize_of_an_image_in_use_says_how() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let mut resize = Command::new(PROGRAM);
    let (code, _, errors) =
        output(resize.args(["resize", "--lock-timeout", "0"]).arg(bench.path("disk.qcow2")).arg("2M"));
    assert!(code == Some(1) && errors.contains("size-file") && errors.contains("SIGHUP"), "{errors}");
    daemon.stop();
}
