//! The control socket of a daemon: its answers, who may use it, and clients that are hostile or slow.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use kit::{Bench, Daemon, PROGRAM, output};

/// How long an answer may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// As in `control`: from the start of the wait for a request to the end of its headers.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// A daemon with a control socket.
fn start(bench: &Bench) -> (Daemon, PathBuf) {
    bench.image("disk.qcow2");
    let socket = bench.path("c");
    let daemon = Daemon::start(bench.serve("disk.qcow2").arg("--control-socket").arg(&socket));
    (daemon, socket)
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Sends bytes, and returns whatever comes until the daemon hangs up.
fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = connect(socket);
    // The daemon may hang up before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("no end of the answer: {error}"),
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// A request: the status, and the body.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    let answer = raw(socket, format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
    (status(&answer), answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned())
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn is_alive(socket: &Path) {
    assert_eq!(ask(socket, "GET", "/v1/ping", "").0, 200);
}

#[test]
fn only_its_user_may_use_the_socket() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let mode = |path: &Path| std::fs::metadata(path).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    let mut second = bench.serve("other.qcow2");
    bench.image("other.qcow2");
    let (code, _, errors) = output(second.arg("--control-socket").arg(&socket));
    assert!(code == Some(1) && errors.contains("another --control-socket"), "{errors}");
    daemon.stop();
    assert!(!socket.exists() && !bench.socket().exists());
    let group = rustix::process::getgid().as_raw().to_string();
    let mut serve = bench.serve("disk.qcow2");
    let daemon = Daemon::start(serve.arg("--control-socket").arg(&socket).args(["--control-group", &group]));
    assert_eq!(mode(&socket), 0o660);
    daemon.stop();
    for wrong in [&["--control-group", "0"][..], &["--control-fd", "3", "--control-socket", "x"]] {
        let (code, _, errors) = output(bench.serve("disk.qcow2").args(wrong));
        assert_eq!(code, Some(2), "{errors}");
    }
    let (code, _, errors) = output(bench.serve("disk.qcow2").args(["--control-fd", "77"]));
    assert!(code == Some(1) && errors.contains("--control-fd"), "{errors}");
}

#[test]
fn every_described_route_answers() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let document = json(&ask(&socket, "GET", "/v1/openapi.json", "").1);
    assert_eq!(document["openapi"], "3.1.0");
    let mut routes = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        routes.extend(methods.as_object().expect("methods").keys().map(|method| (path, method)));
    }
    assert!(routes.len() >= 11, "{routes:?}");
    for (path, method) in
        routes.into_iter().filter(|(path, _)| !["/v1/shutdown", "/v1/events"].contains(&path.as_str()))
    {
        let overlay = format!("{{\"overlay\": \"{}\"}}", bench.path("overlay").display());
        let body = match path.as_str() {
            "/v1/disk/snapshots" => overlay.as_str(),
            "/v1/disk/log-level" => "{\"level\": \"info\"}",
            "/v1/disk/size" => "{\"size\": 1048576}",
            _ => "",
        };
        let (status, body) = ask(&socket, &method.to_uppercase(), path, body);
        assert!(status == 200 || status == 204, "{method} {path}: {status} {body}");
        assert!(
            document["paths"][path][method]["responses"][status.to_string()].is_object(),
            "{path} {status}"
        );
    }
    let disk = json(&ask(&socket, "GET", "/v1/disk", "").1);
    assert_eq!((&disk["virtual-size"], &disk["frontend"]), (&(1 << 20).into(), &"waiting".into()));
    assert!(ask(&socket, "GET", "/v1/metrics", "").1.contains("strata_disk_size_bytes"));
    let begun = ask(&socket, "POST", "/v1/shutdown", "");
    assert_eq!(begun.0, 202);
    let log = daemon.wait();
    assert!(
        log.contains("control: shut down (pid ") && log.contains("the control socket: finishing"),
        "{log}"
    );
}

#[test]
fn refusals_have_a_status_and_the_form_of_errors() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let long = format!("{{\"level\": \"{}\"}}", "x".repeat(100 << 10));
    for (method, path, body, code, kind) in [
        ("GET", "/v2/%1b", "", 404, "not-found"),
        ("DELETE", "/v1/disk", "", 405, "usage"),
        ("PUT", "/v1/disk/log-level", "{\"level\": \"loud\"}", 400, "usage"),
        ("PUT", "/v1/disk/log-level", "{\"level\": \"info\", \"more\": 1}", 400, "usage"),
        ("PUT", "/v1/disk/log-level", "{", 400, "usage"),
        ("PUT", "/v1/disk/log-level", long.as_str(), 413, "too-large"),
    ] {
        let (status, text) = ask(&socket, method, path, body);
        let error = json(&text)["error"].clone();
        assert_eq!((status, &error["kind"]), (code, &kind.into()), "{method} {path}: {text}");
        let keys: Vec<&String> = error.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["file", "hint", "kind", "message", "offset", "structure"]);
    }
    is_alive(&socket);
    daemon.stop();
}

#[test]
fn the_level_of_the_log_changes() {
    let bench = Bench::new();
    let (mut daemon, socket) = start(&bench);
    assert_eq!(ask(&socket, "PUT", "/v1/disk/log-level", "{\"level\": \"debug\"}").0, 204);
    daemon.wait_for("DEBUG");
    assert_eq!(ask(&socket, "PUT", "/v1/disk/log-level", "{\"level\": \"error\"}").0, 204);
    ask(&socket, "POST", "/v1/disk/flush", "");
    let log = daemon.stop();
    assert!(!log.contains("control: flush"), "{log}");
}

#[test]
fn the_disk_gets_another_size() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let size = |text: &str| {
        let (status, body) = ask(&socket, "PUT", "/v1/disk/size", text);
        (status, json(&body))
    };
    let (status, grown) = size("{\"size\": 4194304}");
    assert_eq!(
        (status, &grown["previous-size"], &grown["virtual-size"]),
        (200, &(1 << 20).into(), &(4 << 20).into())
    );
    let (status, refused) = size("{\"size\": 2097152}");
    assert_eq!((status, &refused["error"]["kind"]), (409, &"refused".into()));
    assert!(refused["error"]["hint"].as_str().is_some_and(|hint| hint.contains("force")), "{refused}");
    for none in ["7", "0", "9223372036854775808"] {
        let (status, refused) = size(&format!("{{\"size\": {none}}}"));
        assert_eq!((status, &refused["error"]["kind"]), (400, &"usage".into()), "{none}");
    }
    assert_eq!(size("{\"size\": 2097152, \"force\": true}").0, 200);
    let mut ctl = Command::new(PROGRAM);
    let (code, text, _) = output(ctl.arg("ctl").arg(&socket).args(["resize", "3M"]));
    assert!(code == Some(0) && text.contains("3 MiB (3145728 bytes) now, 2 MiB"), "{text}");
    assert_eq!(json(&ask(&socket, "GET", "/v1/disk", "").1)["virtual-size"], 3 << 20);
    daemon.stop();
    let (code, text, _) = output(Command::new(PROGRAM).arg("info").arg(bench.path("disk.qcow2")));
    assert!(code == Some(0) && text.contains("3 MiB"), "{text}");
}

#[test]
fn commands_leave_the_journal_of_a_killed_daemon_alone() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let number = qcow2::JournalNumber::of_bits(0x1234_5678_9abc);
    let autoclear = qcow2::feature::autoclear_with_journal(0, Some(number)).to_be_bytes();
    let image = std::fs::File::options().read(true).write(true).open(bench.path("disk.qcow2"));
    let image = image.expect("the image");
    let at = qcow2::position::AUTOCLEAR as u64;
    image.write_all_at(&autoclear, at).expect("written");
    let socket = bench.path("c");
    let daemon = Daemon::start(bench.serve("disk.qcow2").arg("--control-socket").arg(&socket));
    for (method, path, body) in
        [("POST", "/v1/disk/flush", ""), ("PUT", "/v1/disk/size", "{\"size\": 4194304}")]
    {
        let (status, text) = ask(&socket, method, path, body);
        assert_eq!((status, &json(&text)["error"]["kind"]), (409, &"refused".into()), "{text}");
    }
    let mut kept = [0; 8];
    image.read_exact_at(&mut kept, at).expect("read");
    assert_eq!(kept, autoclear, "the frontend still has what that daemon had answered");
    daemon.stop();
}

#[test]
fn a_snapshot_makes_an_overlay_the_top_for_this_daemon_and_the_next() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let (image, overlay, pointer) =
        (bench.path("disk.qcow2"), bench.path("o v\u{e9}"), bench.path("disk.qcow2.strata-top"));
    let take = |overlay: &Path| {
        let body = serde_json::json!({ "overlay": overlay }).to_string();
        let (status, text) = ask(&socket, "POST", "/v1/disk/snapshots", &body);
        (status, json(&text))
    };
    for (wrong, code) in
        [(Path::new("relative"), 400), (&image, 409), (&pointer, 409), (Path::new("/no/x"), 404)]
    {
        let (status, refused) = take(wrong);
        assert_eq!(status, code, "{refused}");
    }
    assert!(!pointer.exists());
    let (status, taken) = take(&overlay);
    assert_eq!((status, taken["backing-filename"].as_str()), (200, image.to_str()), "{taken}");
    let chain = json(&ask(&socket, "GET", "/v1/chain", "").1);
    let names: Vec<_> =
        chain["layers"].as_array().expect("layers").iter().map(|layer| &layer["filename"]).collect();
    assert_eq!(names, [overlay.to_str().expect("text"), image.to_str().expect("text")]);
    // The next daemon, also after a kill, serves the overlay; both are as sound as they were.
    drop(daemon);
    let daemon = Daemon::start(bench.serve("disk.qcow2").arg("--control-socket").arg(&socket));
    assert!(
        daemon.log().contains("since a snapshot") && daemon.log().contains("a chain of 2 layers"),
        "{}",
        daemon.log()
    );
    let second = bench.path("second");
    assert_eq!(take(&second).0, 200);
    daemon.stop();
    for (words, said) in [
        (&["--top-pointer", "refuse"][..], "as the top image"),
        (&["--read-only", "--top-pointer", "refuse"], "strata-top"),
    ] {
        let (code, _, errors) = output(bench.serve("disk.qcow2").args(words));
        assert!(code == Some(1) && errors.contains(said), "{errors}");
    }
    let daemon = Daemon::start(bench.serve("disk.qcow2").args(["--top-pointer", "ignore", "--read-only"]));
    assert!(!daemon.log().contains("a chain of"), "{}", daemon.log());
    daemon.stop();
    // A pointer to another disk, to nothing, and of another form.
    bench.image("other.qcow2");
    let text = |top: &Path| serde_json::json!({ "top": top }).to_string();
    for (text, said) in [
        (text(&bench.path("other.qcow2")), "does not contain this image"),
        (text(&bench.path("none")), "none"),
        ("{}".to_owned(), "no pointer"),
    ] {
        std::fs::write(&pointer, text).expect("written");
        let (code, _, errors) = output(&mut bench.serve("disk.qcow2"));
        assert!(code == Some(1) && errors.contains(said) && errors.contains("strata-top"), "{errors}");
    }
}

/// Asks for events, and returns the lines of the answer's body.
fn listen(socket: &Path, accept: &str) -> impl Iterator<Item = String> {
    let mut stream = connect(socket);
    write!(stream, "GET /v1/events HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n").expect("sent");
    let mut lines = BufReader::new(stream).lines().map(|line| line.expect("a line"));
    assert_eq!(status(&lines.next().expect("a status")), 200);
    while !lines.next().expect("headers").is_empty() {}
    lines
}

#[test]
fn frontends_that_come_and_go_are_events() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let streams = [("*/*", "{"), ("text/event-stream", "data: {")];
    let mut streams = streams.map(|(accept, start)| (listen(&socket, accept), start));
    drop(UnixStream::connect(bench.socket()).expect("it listens"));
    for (lines, start) in &mut streams {
        for name in ["FRONTEND_CONNECTED", "FRONTEND_LEFT"] {
            let line = lines.find(|line| line.contains("event\"")).expect("an event");
            assert!(line.starts_with(*start) && line.contains(name), "{line}");
        }
    }
    // Streams that nobody reads do not keep the daemon.
    daemon.stop();
}

#[test]
fn hostile_requests_are_cut_off() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let long = format!("GET /v1/ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let many = format!("GET /v1/ping HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000));
    let uri = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    for bytes in [
        long.as_bytes(),
        many.as_bytes(),
        uri.as_bytes(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        &[0xff; 4096],
        b"GET /v1/ping HTTP/9.9\r\n\r\n",
        b"PUT /v1/disk/log-level HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /v1/disk/log-level HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ] {
        let answer = raw(&socket, bytes);
        assert!(!answer.contains("HTTP/1.1 2"), "{answer}");
        is_alive(&socket);
    }
    for half in [&b"GET /v1/pi"[..], b"PUT /v1/disk/log-level HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"] {
        let mut stream = connect(&socket);
        stream.write_all(half).expect("sent");
        drop(stream);
        is_alive(&socket);
    }
    daemon.stop();
}

#[test]
fn slow_clients_are_cut_off() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let began = Instant::now();
    // Idle after a request, idle from the beginning, in the middle of headers, and in the middle of a body.
    let starts = [
        "GET /v1/ping HTTP/1.1\r\nHost: x\r\n\r\n",
        "",
        "GET /v1/ping HTTP/1.1\r\n",
        "PUT /v1/disk/log-level HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
    ];
    let ended = starts.map(|start| {
        let socket = socket.clone();
        std::thread::spawn(move || {
            let stream = connect(&socket);
            (&stream).write_all(start.as_bytes()).expect("sent");
            let drips = stream.try_clone().expect("a copy");
            // A byte at a time never ends a request, and does not keep the connection.
            std::thread::spawn(move || {
                while !start.is_empty() && !start.ends_with("x\r\n\r\n") && (&drips).write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(200));
                }
            });
            let mut answer = Vec::new();
            let ended = (&stream).read_to_end(&mut answer);
            assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
            String::from_utf8_lossy(&answer).into_owned()
        })
    });
    is_alive(&socket);
    let answers = ended.map(|thread| thread.join().expect("it ends"));
    assert!(began.elapsed() < 5 * HEAD_TIMEOUT, "{:?}", began.elapsed());
    assert_eq!(status(&answers[0]), 200);
    assert!(!answers[1].contains(" 200 ") && !answers[2].contains(" 200 "), "{answers:?}");
    assert_eq!(status(&answers[3]), 408);
    daemon.stop();
}

#[test]
fn a_thousand_connections_are_bounded() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let files = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("it runs").count();
    let before = files();
    let mut held = Vec::new();
    for _ in 0..1000 {
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .map(|made| (made, rustix::net::SocketAddrUnix::new(&socket).expect("a path")));
        let (made, address) = socket.expect("a socket");
        // The backlog is full at some time: that is one way of being bounded.
        let _ = rustix::net::connect(&made, &address);
        held.push(made);
        assert!(files() <= before + 80, "{} descriptors", files());
    }
    // They are cut off in turn, so a client that waits is served while all are still held.
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
    };
    drop(stream);
    drop(held);
    is_alive(&socket);
    daemon.stop();
}

#[test]
fn the_client_shows_tables_and_json_and_says_what_is_wrong() {
    let bench = Bench::new();
    let (daemon, socket) = start(&bench);
    let ctl = |words: &[&str]| output(Command::new(PROGRAM).arg("ctl").arg(&socket).args(words));
    for (words, said) in [
        (&["disk"][..], "1 MiB (1048576 bytes)"),
        (&["chain"], "qcow2   1 MiB"),
        (&["stats"], "waiting for space  0 now"),
        (&["ping", "--json"], "\"pid\""),
        (&["chain", "--json"], "\"cluster-size\": 65536"),
        (&["metrics"], "# EOF"),
        (&["api"], "\"openapi\": \"3.1.0\""),
        (&["flush"], ""),
        (&["pause"], ""),
        (&["disk"], "paused: requests wait"),
        (&["resume"], ""),
        (&["disk"], "in order"),
        (&["log-level", "warn"], ""),
    ] {
        let (code, text, errors) = ctl(words);
        assert!(code == Some(0) && text.contains(said) && errors.is_empty(), "{words:?}: {text}{errors}");
    }
    assert_eq!(ctl(&["log-level", "loud"]).0, Some(2));
    assert_eq!(ctl(&["shutdown"]).0, Some(0));
    daemon.wait();
    let (code, text, errors) = ctl(&["disk", "--json"]);
    assert_eq!((code, &json(&text)["error"]["kind"]), (Some(1), &"not-found".into()), "{text}");
    assert!(errors.contains("hint") && errors.contains("--control-socket"), "{errors}");
}
