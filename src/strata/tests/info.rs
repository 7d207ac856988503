//! Tests `strata info` and the folders of `--chain-root` with the built program; compares its JSON with that of
//! `qemu-img info`.

#[allow(dead_code, reason = "each test target uses its own part of the kit")]
mod kit;

use std::io::Write as _;
use std::os::unix::fs::{FileExt, symlink};
use std::process::Command;

use kit::{Bench, Daemon, PROGRAM, output};
use serde_json::Value;

/// False, and a visible skip, if QEMU's tools are not installed.
fn has_qemu(test: &str) -> bool {
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        return true;
    }
    let required = std::env::var_os("STRATA_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "STRATA_REQUIRE_TOOLS=1, but qemu-img is not installed");
    // Not by eprintln, because the test harness hides its output when a test passes.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: qemu-img is not installed");
    false
}

/// Runs qemu-img in the folder and returns its output.
#[track_caller]
fn qemu_img(bench: &Bench, arguments: &[&str]) -> String {
    let (status, text, errors) = output(Command::new("qemu-img").args(arguments).current_dir(bench.path("")));
    assert_eq!(status, Some(0), "{arguments:?}: {text}{errors}");
    text
}

/// `strata info` in the folder.
fn info(bench: &Bench, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("info").args(arguments).current_dir(bench.path(""));
    command
}

#[track_caller]
fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Asserts that names present in both have equal values; collects the names compared.
fn compare(ours: &Value, theirs: &Value, at: &str, compared: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, ours) in ours {
                if let Some(theirs) = theirs.get(key) {
                    compare(ours, theirs, &format!("{at}/{key}"), compared);
                }
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{at}");
            for (number, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                compare(ours, theirs, &format!("{at}/{number}"), compared);
            }
            compared.push(at.to_owned());
        }
        _ => {
            assert_eq!(ours, theirs, "{at}");
            compared.push(at.to_owned());
        }
    }
}

/// Compares both programs' JSON about an image; ours must have these of QEMU's names.
#[track_caller]
fn agrees(bench: &Bench, image: &str, names: &[&str]) {
    let theirs = json(&qemu_img(bench, &["info", "--output=json", "-f", "qcow2", image]));
    let (status, ours, errors) = output(&mut info(bench, &["--json", image]));
    assert_eq!(status, Some(0), "{image}: {errors}");
    let mut compared = Vec::new();
    compare(&json(&ours), &theirs, "", &mut compared);
    let always = ["/filename", "/format", "/virtual-size", "/actual-size", "/dirty-flag", "/cluster-size"];
    let specific =
        ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt", "extended-l2"];
    let specific = specific.iter().map(|name| format!("/format-specific/data/{name}"));
    // Version 2 has no further facts.
    let specific =
        specific.filter(|name| image != "v2" || name.ends_with("/compat") || name.ends_with("-bits"));
    for name in always.iter().map(|name| (*name).to_owned()).chain(specific) {
        assert!(compared.contains(&name), "{image}: {name} was not compared: {compared:?}");
    }
    for name in names {
        assert!(compared.iter().any(|found| found == name), "{image}: {name} was not compared");
    }
}

#[test]
fn json_agrees_with_qemu_img() {
    if !has_qemu("json_agrees_with_qemu_img") {
        return;
    }
    let bench = Bench::new();
    let create = |name: &str, options: &str| {
        qemu_img(&bench, &["create", "-q", "-f", "qcow2", "-o", options, name, "64M"]);
    };
    create("v2", "compat=0.10");
    agrees(&bench, "v2", &[]);
    create("lazy", "lazy_refcounts=on,refcount_bits=64,cluster_size=4k");
    agrees(&bench, "lazy", &[]);
    create("new", "extended_l2=on,compression_type=zstd");
    qemu_img(&bench, &["snapshot", "-c", "one", "new"]);
    qemu_img(&bench, &["snapshot", "-c", "two", "new"]);
    let of_each = ["id", "name", "vm-state-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"];
    let names = of_each.map(|name| format!("/snapshots/1/{name}"));
    agrees(&bench, "new", &names.each_ref().map(String::as_str));
    let (_, text, _) = output(&mut info(&bench, &["new"]));
    for line in ["snapshots:        2", "snapshot:         1 one, 20", "UTC, disk of 64 MiB"] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
    let file = std::fs::OpenOptions::new().write(true).open(bench.path("new")).expect("the image");
    file.write_all_at(&(1u64 << 40).to_be_bytes(), 64).expect("no snapshot table any more");
    let (status, text, errors) = output(&mut info(&bench, &["new"]));
    assert_eq!(status, Some(0), "{errors}");
    assert!(text.contains("snapshot table") && !text.contains("snapshot: "), "{text}");
    create("dirty", "refcount_bits=1");
    let file = std::fs::OpenOptions::new().write(true).open(bench.path("dirty")).expect("the image");
    file.write_all_at(&[3], 79).expect("dirty and corrupt");
    agrees(&bench, "dirty", &[]);
    create("bitmaps", "compat=1.1");
    for (name, granularity) in [("a", "512"), ("b", "65536"), ("c", "2M")] {
        qemu_img(&bench, &["bitmap", "--add", "-g", granularity, "bitmaps", name]);
    }
    qemu_img(&bench, &["bitmap", "--disable", "bitmaps", "b"]);
    agrees(&bench, "bitmaps", &["/format-specific/data/bitmaps"]);
    Daemon::start(&mut bench.serve("bitmaps")).stop();
    agrees(&bench, "bitmaps", &["/format-specific/data/bitmaps"]);
    let (_, text, _) = output(&mut info(&bench, &["bitmaps"]));
    for line in ["a, granularity 512 bytes, inconsistent", "b, granularity 64 KiB, disabled"] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
    create("data", "data_file=data.raw,data_file_raw=on");
    let names = ["/format-specific/data/data-file", "/format-specific/data/data-file-raw"];
    agrees(&bench, "data", &names);
    qemu_img(&bench, &["create", "-q", "-f", "qcow2", "-b", "v2", "-F", "qcow2", "top"]);
    let names = ["/backing-filename", "/backing-filename-format", "/full-backing-filename"];
    agrees(&bench, "top", &names);
}

#[test]
fn an_image_that_cannot_be_served_is_described() {
    let bench = Bench::new();
    bench.image_over("top.qcow2", Some(("gone.qcow2", Some("qcow2"))));
    let file = std::fs::OpenOptions::new().write(true).open(bench.path("top.qcow2")).expect("the image");
    file.write_all_at(&[1], 73).expect("an unknown incompatible feature");
    let (status, text, errors) = output(&mut info(&bench, &["top.qcow2"]));
    assert_eq!(status, Some(0), "{errors}");
    for line in ["not served:       incompatible feature bit 48", "backing file:     gone.qcow2"] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
    let (_, text, _) = output(&mut info(&bench, &["--json", "top.qcow2"]));
    let told = json(&text);
    assert!(told["not-served"].as_str().is_some_and(|reason| reason.contains("bit 48")), "{told}");
    assert_eq!(told["full-backing-filename"], "gone.qcow2");
    let (status, _, errors) = output(&mut info(&bench, &["--backing-chain", "top.qcow2"]));
    assert_eq!(status, Some(1));
    assert!(errors.contains("(layer 2 of the chain top.qcow2 -> gone.qcow2)"), "{errors}");
    // An image that is its own backing file.
    bench.image_over("gone.qcow2", Some(("top.qcow2", Some("qcow2"))));
    let (status, _, errors) = output(&mut info(&bench, &["--backing-chain", "top.qcow2"]));
    assert_eq!(status, Some(1));
    assert!(errors.contains("loop") && errors.contains("top.qcow2 -> gone.qcow2 -> top.qcow2"), "{errors}");
}

#[test]
fn an_image_in_use_is_described_only_if_asked_for() {
    let bench = Bench::new();
    bench.image("disk.qcow2");
    let daemon = Daemon::start(&mut bench.serve("disk.qcow2"));
    assert_eq!(output(&mut info(&bench, &["disk.qcow2"])).0, Some(1));
    let (status, text, errors) = output(&mut info(&bench, &["-U", "disk.qcow2"]));
    assert_eq!(status, Some(0), "{errors}");
    assert!(text.contains("1 MiB"), "{text}");
    daemon.stop();
}

#[test]
fn layers_outside_of_the_roots_are_refused() {
    let bench = Bench::new();
    for folder in ["tenant", "bases", "secret"] {
        std::fs::create_dir(bench.path(folder)).expect("a folder");
    }
    std::fs::write(bench.path("bases/base.raw"), [1; 4096]).expect("a base");
    std::fs::write(bench.path("secret/key.raw"), [2; 4096]).expect("a secret");
    symlink(bench.path("secret/key.raw"), bench.path("bases/link.raw")).expect("a link");
    let (tenant, bases) = (bench.path("tenant"), bench.path("bases"));
    let serve = |backing: &str, roots: &[&std::path::Path]| {
        bench.image_over("tenant/top.qcow2", Some((backing, Some("raw"))));
        let mut command = bench.serve("tenant/top.qcow2");
        for root in roots {
            command.arg("--chain-root").arg(root);
        }
        command
    };
    Daemon::start(&mut serve("../bases/base.raw", &[&tenant, &bases])).stop();
    let secret = bench.path("secret/key.raw").display().to_string();
    let json_name = format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}"#);
    for backing in [secret.as_str(), "../secret/key.raw", "../bases/link.raw", &json_name] {
        let (status, _, errors) = output(&mut serve(backing, &[&tenant, &bases]));
        assert_eq!(status, Some(1), "{backing}");
        for word in ["lies at", "secret/key.raw", "layer 2 of the chain", "hint", "--chain-root"] {
            assert!(errors.contains(word), "{backing}: {word} is missing in:\n{errors}");
        }
        let root = tenant.display().to_string();
        let mut described = info(&bench, &["--backing-chain", "--chain-root", &root, "tenant/top.qcow2"]);
        assert_eq!(output(&mut described).0, Some(1), "{backing}");
    }
    let check = |root: &std::path::Path| {
        let mut command = Command::new(PROGRAM);
        command.arg("check").arg("--chain-root").arg(root).arg(bench.path("tenant/top.qcow2"));
        output(&mut command)
    };
    assert_eq!(check(&tenant).0, Some(0));
    let (status, _, errors) = check(&bases);
    assert!(status == Some(1) && errors.contains("top.qcow2: lies at"), "{errors}");
    let (status, _, errors) = output(&mut serve("../bases/base.raw", &[&bases]));
    assert_eq!(status, Some(1), "the image itself is outside");
    assert!(errors.contains("top.qcow2: lies at"), "{errors}");
    let (status, _, errors) = output(&mut serve("../bases/base.raw", &[&bench.path("none")]));
    assert_eq!(status, Some(1));
    assert!(errors.contains("--chain-root") && errors.contains("none"), "{errors}");
}

#[test]
fn a_deep_chain_opens() {
    let bench = Bench::new();
    bench.image("0.qcow2");
    for layer in 1..1000 {
        let below = format!("{}.qcow2", layer - 1);
        bench.image_over(&format!("{layer}.qcow2"), Some((&below, Some("qcow2"))));
    }
    let daemon = Daemon::start(&mut bench.serve("999.qcow2"));
    assert!(daemon.log().contains("a chain of 1000 layers"), "{}", daemon.log());
    daemon.stop();
    bench.image_over("1000.qcow2", Some(("999.qcow2", Some("qcow2"))));
    let (status, _, errors) = output(&mut bench.serve("1000.qcow2"));
    assert_eq!(status, Some(1));
    for word in ["more than 1000 layers", "(995 more)", "999.qcow2 ->"] {
        assert!(errors.contains(word), "{word} is missing in:\n{errors}");
    }
}
