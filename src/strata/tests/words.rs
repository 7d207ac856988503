//! The built program's messages about hostile or broken input: names that control a terminal, files in other formats,
//! truncated copies; and errors as JSON.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::process::Command;

use kit::{Bench, Daemon, PROGRAM, output};

/// Names that forge lines, control terminals, or run commands where they are pasted.
const HOSTILE: &[&[u8]] = &[
    b"a\nstrata: error: forged",
    b"x;reboot",
    b"\x1b]0;title\x07\x1b[2J",
    b"it's $(id) `id`",
    b"-rf",
    b"\xff\xc3\x9b\xc2\x9b31m",
    "\u{202e}gnp.exe".as_bytes(),
    b"end\n",
];

fn fit_for_a_terminal(text: &str) -> bool {
    text.chars().all(|character| {
        character == '\n' || !(character.is_control() || ('\u{202a}'..='\u{202e}').contains(&character))
    })
}

/// Everything that a command printed; all lines must be the program's own.
#[track_caller]
fn said(command: &mut Command) -> (Option<i32>, String, String) {
    let (status, printed, errors) = output(command);
    assert!(fit_for_a_terminal(&printed) && fit_for_a_terminal(&errors), "{printed:?}\n{errors:?}");
    assert!(!errors.lines().any(|line| line.starts_with("strata: error: forged")), "{errors}");
    (status, printed, errors)
}

/// The arguments that a POSIX shell passes on when the command in backticks is pasted.
fn pasted(hint: &str) -> Vec<u8> {
    // The last backtick of a line ends its last command: names may contain backticks too.
    let start = hint.find('`').expect("a command");
    let end = hint[..hint.rfind('`').expect("it ends")].to_owned();
    // Not every shell allows a hyphen in a function name.
    let command = end[start + 1..].replacen("qemu-img create -f qcow2", "show", 1);
    let script = format!("show() {{ for word; do printf '%s\\000' \"$word\"; done; }}\n{command}\n");
    let output = Command::new("sh").arg("-c").arg(script).output().expect("there is a shell");
    assert!(output.status.success(), "{hint}: {output:?}");
    output.stdout
}

#[test]
fn hostile_names_of_files_stay_names() {
    let bench = Bench::new();
    for name in HOSTILE {
        let name = OsStr::from_bytes(name);
        for arguments in [
            vec!["info"],
            vec!["info", "--json"],
            vec!["check"],
            vec!["check", "-r", "all", "--json"],
            vec!["snapshot", "-l"],
            vec!["resize", "--shrink"],
        ] {
            let mut command = Command::new(PROGRAM);
            command.args(&arguments).current_dir(bench.path("")).arg("--").arg(name);
            if arguments[0] == "resize" {
                command.arg("1G");
            }
            let (status, _, errors) = said(&mut command);
            assert_eq!(status, Some(1), "{errors}");
            let hint = errors.lines().last().expect("a hint");
            let words = pasted(hint);
            let lead: &[u8] = if name.as_bytes().starts_with(b"-") { b"./" } else { b"" };
            assert_eq!(words, [lead, name.as_bytes(), b"\0", b"10G\0"].concat(), "{hint}");
        }
    }
}

#[test]
fn hostile_names_in_images_stay_names() {
    let bench = Bench::new();
    for name in HOSTILE {
        // A format name has at most 15 bytes.
        let format: String = String::from_utf8_lossy(name).chars().take(5).collect();
        bench.image_named("top", Some(name.to_vec()), Some(format));
        for arguments in [
            vec!["info", "top"],
            vec!["info", "--json", "top"],
            vec!["info", "--backing-chain", "top"],
            vec!["info", "--backing-chain", "--json", "top"],
            vec!["serve", "top", "--socket-path", "s"],
        ] {
            let (status, printed, errors) =
                said(Command::new(PROGRAM).args(&arguments).current_dir(bench.path("")));
            if arguments.contains(&"--json") {
                serde_json::from_str::<serde_json::Value>(&printed).expect("JSON");
            }
            assert_eq!(status == Some(0), !arguments.contains(&"--backing-chain") && arguments[0] == "info");
            assert!(
                status == Some(0) || errors.contains("names the backing file") || errors.contains("format")
            );
        }
    }
}

#[test]
fn files_in_other_formats_are_called_by_name() {
    let bench = Bench::new();
    let files: &[(&str, usize, &[u8], &str)] = &[
        ("vmdk", 0, b"KDMV", "qemu-img convert -O qcow2 -f vmdk"),
        ("vhdx", 0, b"vhdxfile", "-f vhdx"),
        ("vdi", 0x40, b"\x7f\x10\xda\xbe", "-f vdi"),
        ("vhd", 65024, b"conectix", "-f vpc"),
        ("luks", 0, b"LUKS\xba\xbe", "driver=luks"),
        ("gz", 0, b"\x1f\x8b\x08", "gzip -dc"),
        ("xz", 0, b"\xfd7zXZ\x00", "xz -dc"),
        ("zst", 0, b"\x28\xb5\x2f\xfd", "zstd -dc"),
        ("iso", 0x8001, b"CD001", "raw --read-only"),
    ];
    for (name, at, mark, advice) in files {
        let mut bytes = vec![0; 65536];
        bytes[*at..at + mark.len()].copy_from_slice(mark);
        std::fs::write(bench.path(name), bytes).expect("written");
        let (status, _, errors) = said(&mut bench.serve(name));
        assert_eq!(status, Some(1));
        assert!(errors.contains(advice), "{name}: {errors}");
        assert!(*name == "iso" || !errors.contains("say --format raw"), "{name}: {errors}");
        let (status, _, errors) = said(Command::new(PROGRAM).arg("check").arg(bench.path(name)));
        assert_eq!(status, Some(63), "{name}: {errors}");
        let daemon = Daemon::start(bench.serve(name).args(["-f", "raw"]));
        let log = daemon.stop();
        assert!(log.contains("WARN") && log.contains("as a raw image, but the file is"), "{name}: {log}");
    }
    let daemon = Daemon::start(bench.serve("iso").args(["-f", "raw", "--read-only"]));
    assert!(!daemon.stop().contains("WARN"), "an ISO is raw");
}

#[test]
fn an_image_that_was_cut_short_is_reported() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let path = bench.path("disk.qcow2");
    let bytes = std::fs::read(&path).expect("read");
    let header = qcow2::Header::parse(&bytes, bytes.len() as u64).expect("a header");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    assert!(!daemon.stop().contains("cut short"));
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the image");
    let entry = (7u64 << 20 | 1 << 63).to_be_bytes();
    file.write_all_at(&entry, header.l1_offset.0).expect("an L2 table past the end");
    for options in [&["--read-only"][..], &[]] {
        let log = Daemon::start(bench.serve("disk.qcow2").args(options)).stop();
        for word in ["WARN", "cut short", "1 of its tables", "L2 table at offset 0x700000"] {
            assert!(log.contains(word), "{word} is missing in:\n{log}");
        }
    }
}

#[test]
fn errors_are_json_where_json_was_asked_for() {
    let bench = Bench::new();
    let gone = bench.path("gone");
    std::fs::write(bench.path("other"), [b'x'; 4096]).expect("written");
    let cases: &[(&[&str], &str, &str, i32)] = &[
        (&["info", "--json"], "gone", "not-found", 1),
        (&["info", "--output=json"], "other", "wrong-format", 1),
        (&["check", "--json"], "gone", "not-found", 1),
        (&["check", "--json", "-f", "raw"], "other", "nothing-to-check", 63),
        (&["snapshot", "-l", "--output", "json"], "gone", "not-found", 1),
        (&["info", "--json", "--odd"], "gone", "usage", 2),
        (&["check", "--json", "--odd"], "gone", "usage", 1),
    ];
    for (arguments, image, kind, code) in cases {
        let (status, printed, errors) = said(Command::new(PROGRAM).args(*arguments).arg(bench.path(image)));
        assert_eq!(status, Some(*code), "{arguments:?}: {errors}");
        let value: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        let error = &value["error"];
        assert_eq!(error["kind"], *kind, "{printed}");
        assert!(error["message"].is_string() && errors.starts_with("strata: error: ") || *kind == "usage");
        if *kind == "not-found" {
            assert_eq!(error["file"], gone.to_str().expect("a plain name"));
            assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("qemu-img create")));
        }
        if *kind == "wrong-format" {
            assert_eq!((&error["structure"], &error["offset"]), (&"header".into(), &0.into()));
        }
    }
    let (_, printed, _) = said(Command::new(PROGRAM).arg("info").arg(&gone));
    assert_eq!(printed, "", "nobody asked for JSON");
}

#[test]
fn snapshots_of_an_image_in_use_are_listed_only_if_asked_for() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let snapshot = |options: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("snapshot").args(options).arg(bench.path("disk.qcow2"));
        command
    };
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    let (status, _, errors) = said(&mut snapshot(&["-l"]));
    assert!(status == Some(1) && errors.contains("--force-share"), "{errors}");
    assert_eq!(said(&mut snapshot(&["-l", "-U"])).0, Some(0));
    let (status, _, errors) = said(&mut snapshot(&["-c", "x"]));
    assert!(status == Some(1) && !errors.contains("--force-share"), "{errors}");
    daemon.stop();
    std::fs::create_dir(bench.path("elsewhere")).expect("made");
    let root = bench.path("elsewhere").display().to_string();
    let (status, _, errors) = said(&mut snapshot(&["-l", "--chain-root", &root]));
    assert!(status == Some(1) && errors.contains("lies at"), "{errors}");
    let (status, _, errors) = said(&mut snapshot(&["-l", "--data-file", "d"]));
    assert!(status == Some(1) && errors.contains("keeps its data itself"), "{errors}");
}
