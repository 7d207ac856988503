//! Planned restarts: one daemon takes the place of another, or fails to.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;

use kit::{Bench, Daemon, PROGRAM, output};

fn replacing(bench: &Bench, image: &str) -> Command {
    let mut command = bench.serve(image);
    command.arg("--replace");
    command
}

/// The socket on which a daemon waits for its successor.
fn handover_path(bench: &Bench) -> PathBuf {
    bench.path("s.handover")
}

/// Asks for the place on the terms of a daemon with default options.
fn ask(bench: &Bench, successor: &mut UnixStream) {
    let image = std::fs::metadata(bench.path("disk.qcow2")).expect("the image");
    let mut message = vec![b'A'];
    message.extend(image.dev().to_ne_bytes());
    message.extend(image.ino().to_ne_bytes());
    message.extend(64u16.to_ne_bytes());
    message.extend(1024u16.to_ne_bytes());
    message.extend(512u32.to_ne_bytes());
    message.push(0);
    successor.write_all(&message).expect("asked");
}

#[test]
fn a_daemon_that_the_guest_cannot_go_on_with_is_refused() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    bench.image("other.qcow2");
    let mut daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let cases: [(&str, &[&str], &str); 3] = [
        ("other.qcow2", &[], "another image"),
        ("disk.qcow2", &["--num-queues", "4"], "--num-queues"),
        ("disk.qcow2", &["--read-only"], "another kind of disk"),
    ];
    for (image, more, reason) in cases {
        let (code, _, errors) = output(replacing(&bench, image).args(more));
        assert_eq!(code, Some(1), "{errors}");
        assert!(errors.contains(reason), "{errors}");
        daemon.wait_for("the guest could not go on with it");
    }
    // It serves all the while.
    let waiting = UnixStream::connect(bench.socket()).expect("it listens");
    daemon.wait_for("a frontend connected");
    drop(waiting);
    daemon.stop();
}

#[test]
fn a_daemon_takes_the_place_of_another() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let first = Daemon::start(&mut replacing(&bench, "disk.qcow2"));
    assert!(first.log().contains("no daemon serves"), "{}", first.log());
    let mode = std::fs::metadata(handover_path(&bench)).expect("it waits").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut last = first;
    for _ in 0..3 {
        let next = Daemon::start(&mut replacing(&bench, "disk.qcow2"));
        let log = last.wait();
        assert!(log.contains("a new daemon takes over") && log.contains("the new daemon serves"), "{log}");
        assert!(bench.socket().exists(), "the socket file goes on");
        last = next;
    }
    UnixStream::connect(bench.socket()).expect("it listens");
    last.stop();
    assert!(!bench.socket().exists() && !handover_path(&bench).exists(), "nothing is left");
    let (code, text, _) = output(Command::new(PROGRAM).arg("check").arg(bench.path("disk.qcow2")));
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn one_that_cannot_serve_replaces_nobody() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    std::fs::write(bench.path("bad.qcow2"), [0; 4096]).expect("written");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    for (image, more) in [("none.qcow2", &[][..]), ("bad.qcow2", &[]), ("disk.qcow2", &["--queue-size", "3"])]
    {
        let (code, _, errors) = output(replacing(&bench, image).args(more));
        assert_ne!(code, Some(0), "{image}: {errors}");
        UnixStream::connect(bench.socket()).expect("the other still listens");
    }
    let log = daemon.stop();
    assert!(!log.contains("takes over"), "{log}");
}

#[test]
fn the_old_daemon_serves_again_where_the_new_one_ends() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    for _ in 0..2 {
        let mut successor = UnixStream::connect(handover_path(&bench)).expect("it waits");
        ask(&bench, &mut successor);
        let mut given = [0];
        successor.read_exact(&mut given).expect("the image is closed");
        assert_eq!(&given, b"G");
        // It connects before anybody serves.
        let waiting = UnixStream::connect(bench.socket()).expect("the listener is open");
        drop(successor);
        daemon.wait_for("the new daemon has ended before it served");
        daemon.wait_for(" serving ");
        daemon.wait_for("a frontend connected");
        drop(waiting);
    }
    daemon.stop();
    assert!(!bench.socket().exists() && !handover_path(&bench).exists(), "nothing is left");
}

/// The disk is worth more than a socket beside it.
#[test]
fn the_old_daemon_serves_again_where_its_control_socket_is_gone() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let control = bench.path("c");
    let mut daemon = Daemon::start(bench.serve("disk.qcow2").arg("--control-socket").arg(&control));
    let mut successor = UnixStream::connect(handover_path(&bench)).expect("it waits");
    ask(&bench, &mut successor);
    successor.read_exact(&mut [0]).expect("the image is closed");
    let _other = UnixListener::bind(&control).expect("the path is free");
    drop(successor);
    daemon.wait_for("serving again without a control socket");
    daemon.wait_for(" serving ");
    let waiting = UnixStream::connect(bench.socket()).expect("it listens");
    daemon.wait_for("a frontend connected");
    drop(waiting);
    daemon.stop();
}

#[test]
fn a_signal_ends_a_daemon_that_is_being_replaced() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let mut successor = UnixStream::connect(handover_path(&bench)).expect("it waits");
    ask(&bench, &mut successor);
    successor.read_exact(&mut [0]).expect("the image is closed");
    daemon.signal(rustix::process::Signal::TERM);
    daemon.wait_for("stopping already");
    drop(successor);
    let log = daemon.wait();
    assert_eq!(log.matches(" serving ").count(), 1, "{log}");
}

/// The successor has taken the image's lock and not served; the daemon that is to serve again waits for it.
#[test]
fn a_signal_ends_a_daemon_that_opens_its_image_again() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut daemon = Daemon::start(bench.serve("disk.qcow2").args(["--lock-timeout", "600"]));
    let mut successor = UnixStream::connect(handover_path(&bench)).expect("it waits");
    ask(&bench, &mut successor);
    successor.read_exact(&mut [0]).expect("the image is closed");
    let mut holder = Command::new(PROGRAM);
    holder.arg("serve").arg(bench.path("disk.qcow2")).arg("--socket-path").arg(bench.path("other"));
    let holder = Daemon::start(&mut holder);
    drop(successor);
    daemon.wait_for("waiting up to 600 s");
    let log = daemon.stop();
    assert!(log.contains("stopped before the image was open again"), "{log}");
    assert!(!bench.socket().exists() && !handover_path(&bench).exists(), "nothing is left");
    holder.stop();
}

#[test]
fn a_silent_process_beside_the_socket_does_not_delay_a_stop() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let silent = UnixStream::connect(handover_path(&bench)).expect("it waits");
    let began = std::time::Instant::now();
    daemon.stop();
    assert!(began.elapsed() < std::time::Duration::from_secs(4), "{:?}", began.elapsed());
    drop(silent);
}

#[test]
fn replacing_needs_a_socket_file() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let mut command = Command::new(PROGRAM);
    let (code, _, errors) =
        output(command.args(["serve", "--replace", "--fd", "0"]).arg(bench.path("disk.qcow2")));
    assert_eq!(code, Some(2), "{errors}");
}
