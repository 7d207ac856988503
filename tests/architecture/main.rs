//! The repository's own rules, as tests: which crate may import which, how files look, which files form circles. No
//! tuple and no parameters hold two bare numbers, and the walks in docs/architecture.md name functions that exist.
//!
//! Each rule is a function from its input to a list of complaints, tried first on input that must fail. What the
//! compiler or clippy can check is left to them. `unsafe_code` is forbidden or denied in each crate's root file.
//! `clippy.toml` in `src/engine` and `src/qcow2` disallows files, sockets and threads.

mod circles;
mod edges;
mod names;
mod pairs;
mod walks;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use circles::Modules;

/// The most lines of a file.
const LINES_MAX: usize = 700;

/// Crates under src that may hold unsafe code, in the files that their root allows it for.
const UNSAFE_CRATES: &[&str] = &["storage", "vhost_blk"];

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in tests");
    tests.parent().expect("tests lies in the repository").to_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}

fn assert_none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Every Rust source under the given folders of the repository, build products left out.
fn sources(folders: &[&str]) -> Vec<PathBuf> {
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository can be listed") {
            let path = entry.expect("a folder of the repository can be listed").path();
            let name = path.file_name().expect("a listed file has a name").to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                waiting.push(path);
            } else if path.is_file() && name.ends_with(".rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no sources under {folders:?}");
    found.sort();
    found
}

/// The root file of each crate under src.
fn crate_roots() -> Vec<(&'static str, PathBuf)> {
    let roots = edges::EDGES.iter().flat_map(|(name, _)| {
        let files = ["lib.rs", "main.rs"].map(|file| root().join("src").join(name).join(file));
        files.into_iter().filter(|path| path.is_file()).map(move |path| (*name, path))
    });
    roots.collect()
}

fn form_complaints(path: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        complaints.push(format!("{path}: {lines} lines, more than {LINES_MAX}"));
    }
    let opening = text.lines().next().and_then(|line| line.strip_prefix("//!"));
    if opening.is_none_or(|text| text.trim().is_empty()) {
        complaints.push(format!("{path}: does not open with //! and what it owns"));
    }
    if text.lines().any(|line| line.trim_start().starts_with("#[path")) {
        complaints.push(format!("{path}: takes a module from elsewhere by #[path]: share it in a package"));
    }
    complaints
}

#[test]
fn files_are_short_and_say_what_they_own() {
    let files = sources(&["src", "tests", "integration", "benches"]);
    assert_none(files.iter().flat_map(|path| form_complaints(&relative(path), &read(path))).collect());
}

#[test]
fn the_form_rule_can_fail() {
    let complain = |text: &str| form_complaints("x.rs", text).len();
    assert_eq!(complain(&format!("//! Owns x.\n{}", "\n".repeat(LINES_MAX - 1))), 0);
    assert_eq!(complain(&format!("//! Owns x.\n{}", "\n".repeat(LINES_MAX))), 1);
    assert_eq!(complain("//! Owns x.\n#[path = \"../y.rs\"]\nmod y;\n"), 1);
    assert_eq!(complain("// Owns x.\n") + complain("//!\n//! Late.\n") + complain(""), 3);
}

/// Whether a crate's root file forbids unsafe code, or denies it where single modules may allow it.
fn unsafe_complaint(name: &str, path: &str, text: &str) -> Option<String> {
    let level =
        if UNSAFE_CRATES.contains(&name) { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
    let is_there = text.lines().any(|line| line.trim() == level);
    (!is_there).then(|| format!("{path}: lacks {level}"))
}

#[test]
fn crates_refuse_unsafe_code() {
    let complain = |(name, path): &(&str, PathBuf)| unsafe_complaint(name, &relative(path), &read(path));
    assert_none(crate_roots().iter().filter_map(complain).collect());
    assert!(unsafe_complaint("disk", "x", "// #![forbid(unsafe_code)]").is_some());
}

/// Circles that no file of theirs justifies. A line `//! Circle: …` at the top of one of the files, which names all
/// others, does.
fn circle_complaints(modules: &Modules) -> Vec<String> {
    let is_justified = |circle: &BTreeSet<&Path>| {
        let stems: Vec<_> = circle.iter().map(|path| file_in_crate(path)).collect();
        circle.iter().any(|path| {
            let text = read(path);
            let mut lines = text.lines().take_while(|line| line.starts_with("//!"));
            lines.any(|line| {
                let others = stems.iter().filter(|stem| **stem != file_in_crate(path));
                line.starts_with("//! Circle:") && others.into_iter().all(|stem| line.contains(stem.as_str()))
            })
        })
    };
    let unjustified = modules.circles().into_iter().filter(|circle| !is_justified(circle));
    unjustified
        .map(|circle| {
            format!(
                "a circle of files: {}",
                circle.iter().map(|path| relative(path)).collect::<Vec<_>>().join(", ")
            )
        })
        .collect()
}

fn file_in_crate(path: &Path) -> String {
    path.file_name().expect("a source has a name").to_string_lossy().into_owned()
}

#[test]
fn files_form_no_circles_without_a_reason() {
    let crates = crate_roots();
    let complaints: Vec<_> =
        crates.iter().flat_map(|(_, path)| circle_complaints(&Modules::read(path))).collect();
    assert_none(complaints);
}

#[test]
fn the_circle_rule_can_fail() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("a file can be written");
    };
    write("lib.rs", "mod a;\nmod b;\nmod c;\npub use a::A;");
    write("a.rs", "pub struct A;\nfn f(_: crate::b::B) {}\nuse crate::c::C;");
    write("b.rs", "use crate::A;\npub struct B(A);");
    write("c.rs", "pub struct C;\n#[cfg(test)]\nmod tests { use crate::A; }");
    let modules = || Modules::read(&folder.path().join("lib.rs"));
    assert_eq!(modules().circles().len(), 1, "a.rs and b.rs, through the re-export");
    assert_eq!(circle_complaints(&modules()).len(), 1);
    write("b.rs", "//! Circle: with c.rs\nuse crate::A;\npub struct B(A);");
    assert_eq!(circle_complaints(&modules()).len(), 1, "another file is named");
    write("b.rs", "//! Circle: with a.rs, as each A holds a B\nuse crate::A;\npub struct B(A);");
    assert_none(circle_complaints(&modules()));
}
