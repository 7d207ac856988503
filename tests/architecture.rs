//! The repository's own rules, as tests: which crate may import which, how long a file may be, where unsafe code and
//! I/O may be. See docs/architecture.md.
//!
//! Each rule is a function from text to a list of complaints, tried first on made-up text that must fail: a rule that
//! cannot fail proves nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// Which of our crates each crate under src may import, dev-dependencies included. A new edge here is a change to the
/// architecture and is to be argued for as one.
const EDGES: &[(&str, &[&str])] = &[
    ("qcow2", &[]),
    ("engine", &["qcow2"]),
    ("storage", &[]),
    ("disk", &["engine", "qcow2", "storage"]),
    ("vhost_blk", &[]),
    ("strata", &["disk", "engine", "qcow2", "storage", "vhost_blk"]),
];

/// Our packages outside src. They may import anything, and no crate under src may import them.
/// `strata-fuzz` (tests/fuzz) is in no workspace but its own, as it needs nightly.
const OUTSIDE: &[&str] =
    &["strata-tests", "strata-kit", "strata-integration", "strata-benches", "strata-fuzz"];

/// Crates under src that may hold unsafe code.
const UNSAFE_CRATES: &[&str] = &["storage", "vhost_blk"];

/// Crates under src that do no I/O and start no threads.
const PURE_CRATES: &[&str] = &["engine", "qcow2"];

/// The most lines of a file.
const LINES_MAX: usize = 800;

/// A file of the repository: its path from the root, and its text.
struct Source {
    path: String,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the repository").to_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust source under the given folders of the repository, build products left out.
fn sources(folders: &[&str]) -> Vec<Source> {
    let root = root();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = waiting.pop() {
        let entries =
            std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let entry = entry.expect("a folder of the repository can be listed");
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let kind = entry.file_type().expect("a file of the repository has a type");
            if kind.is_dir() && name != "target" && !name.starts_with('.') {
                waiting.push(path);
            } else if kind.is_file() && name.ends_with(".rs") {
                let relative = path.strip_prefix(&root).expect("the walk began at the root");
                found.push(Source { path: relative.to_string_lossy().into_owned(), text: read(&path) });
            }
        }
    }
    assert!(!found.is_empty(), "no sources under {folders:?}");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The crates under src: name of the folder, and manifest.
fn manifests() -> Vec<(String, String)> {
    let folder = root().join("src");
    let entries = std::fs::read_dir(&folder).expect("src can be listed");
    let folders = entries.map(|entry| entry.expect("src can be listed").path()).filter(|path| path.is_dir());
    let name =
        |path: &Path| path.file_name().expect("a listed folder has a name").to_string_lossy().into_owned();
    folders.map(|path| (name(&path), read(&path.join("Cargo.toml")))).collect()
}

fn assert_none(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

// Rule 1: crate edges.

/// What the workspace's dependency names stand for, where that is not the name itself.
fn aliases(workspace: &str) -> BTreeMap<String, String> {
    let manifest: Table = workspace.parse().expect("the root manifest is TOML");
    let dependencies = manifest.get("workspace").and_then(|table| table.get("dependencies"));
    let table = dependencies.and_then(Value::as_table).cloned().unwrap_or_default();
    table.iter().map(|(name, value)| (name.clone(), package_of(name, value))).collect()
}

/// The package that a dependency entry names: by `package`, else by the last part of `path`, else by its key.
fn package_of(name: &str, entry: &Value) -> String {
    let text = |key: &str| entry.get(key).and_then(Value::as_str);
    let by_path = || text("path").and_then(|path| Path::new(path).file_name()?.to_str());
    let known = |package: &&str| EDGES.iter().any(|(name, _)| name == package);
    text("package").or_else(|| by_path().filter(known)).unwrap_or(name).to_owned()
}

/// Every package that a manifest depends on, in whatever kind of table.
fn dependencies(manifest: &Table, aliases: &BTreeMap<String, String>) -> Vec<String> {
    let mut tables: Vec<&Table> = vec![manifest];
    if let Some(targets) = manifest.get("target").and_then(Value::as_table) {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    tables
        .iter()
        .flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind).and_then(Value::as_table)))
        .flatten()
        .map(|(name, entry)| {
            let inherited = entry.get("workspace").and_then(Value::as_bool) == Some(true);
            let alias = inherited.then(|| aliases.get(name).cloned()).flatten();
            alias.unwrap_or_else(|| package_of(name, entry))
        })
        .collect()
}

fn edge_complaints(folder: &str, manifest: &str, aliases: &BTreeMap<String, String>) -> Vec<String> {
    let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == folder) else {
        return vec![format!("src/{folder}: a crate that EDGES does not know")];
    };
    let manifest: Table = match manifest.parse() {
        Ok(table) => table,
        Err(error) => return vec![format!("src/{folder}/Cargo.toml: {error}")],
    };
    let mut complaints = Vec::new();
    let name = manifest.get("package").and_then(|package| package.get("name")).and_then(Value::as_str);
    if name != Some(folder) {
        complaints.push(format!("src/{folder}: the package is called {name:?}, not as its folder"));
    }
    for package in dependencies(&manifest, aliases) {
        let ours = EDGES.iter().any(|(name, _)| *name == package) || OUTSIDE.contains(&package.as_str());
        if ours && !allowed.contains(&package.as_str()) {
            complaints.push(format!("src/{folder}/Cargo.toml: {folder} must not import {package}"));
        }
    }
    complaints
}

#[test]
fn crates_import_only_whom_they_may() {
    let aliases = aliases(&read(&root().join("Cargo.toml")));
    let manifests = manifests();
    assert_eq!(manifests.len(), EDGES.len(), "a crate in EDGES is not under src, or the other way round");
    assert_none(manifests.iter().flat_map(|(name, text)| edge_complaints(name, text, &aliases)).collect());
}

#[test]
fn the_edge_rule_can_fail() {
    let aliases =
        aliases("[workspace.dependencies]\nfiles = { path = 'src/storage', package = 'storage' }\n");
    let complain = |folder: &str, rest: &str| {
        edge_complaints(folder, &format!("[package]\nname = '{folder}'\n{rest}"), &aliases)
    };
    assert_none(complain("engine", "[dependencies]\nqcow2.workspace = true\nlibc = '1'"));
    let forbidden = [
        "[dependencies]\nstorage.workspace = true",
        "[dependencies]\nstorage = { path = '../storage' }",
        "[dependencies]\nfiles.workspace = true",
        "[dependencies]\nx = { path = '../storage', package = 'storage' }",
        "[dependencies]\nx = { path = '../storage' }",
        "[dev-dependencies]\ndisk.workspace = true",
        "[build-dependencies]\nstrata.workspace = true",
        "[dev-dependencies]\nstrata-tests.workspace = true",
        "[dev-dependencies]\nstrata-fuzz = { path = '../../tests/fuzz' }",
        "[target.'cfg(unix)'.dependencies]\nvhost_blk.workspace = true",
    ];
    for text in forbidden {
        assert_eq!(complain("engine", text).len(), 1, "{text}");
    }
    assert_eq!(complain("disk", "[dependencies]\nvhost_blk.workspace = true").len(), 1);
    assert_eq!(complain("vhost_blk", "[dev-dependencies]\ndisk.workspace = true").len(), 1);
    assert_eq!(complain("novelty", "").len(), 1);
    assert_eq!(edge_complaints("engine", "[package]\nname = 'motor'", &aliases).len(), 1);
    assert_eq!(edge_complaints("engine", "not TOML", &aliases).len(), 1);
}

// Rule 2: the size and the opening of files.

fn form_complaints(source: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = source.text.lines().count();
    if lines > LINES_MAX {
        complaints.push(format!("{}: {lines} lines, more than {LINES_MAX}", source.path));
    }
    // An empty `//!` says nothing.
    let opening = source.text.lines().next().and_then(|line| line.strip_prefix("//!"));
    if opening.is_none_or(|text| text.trim().is_empty()) {
        complaints.push(format!("{}: does not open with //! and what it owns", source.path));
    }
    complaints
}

#[test]
fn files_are_short_and_say_what_they_own() {
    assert_none(
        sources(&["src", "tests", "integration", "benches"]).iter().flat_map(form_complaints).collect(),
    );
}

#[test]
fn the_form_rule_can_fail() {
    let complain = |text: String| form_complaints(&Source { path: "x.rs".into(), text }).len();
    assert_eq!(complain(format!("//! Owns x.\n{}", "\n".repeat(799))), 0);
    assert_eq!(complain(format!("//! Owns x.\n{}", "\n".repeat(800))), 1);
    assert_eq!(complain("// Owns x.\n".into()), 1);
    assert_eq!(complain("//!\n//! Late.\n".into()), 1);
    assert_eq!(complain("\n//! Late.\n".into()), 1);
    assert_eq!(complain(String::new()), 1);
}

// What the following rules look at: code, without comments and without the contents of literals.

/// Blanks comments and the contents of string and character literals. Newlines stay, so that lines can be counted.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match literal_end(bytes, at) {
            Some(end) => end,
            None => {
                at += 1;
                continue;
            }
        };
        code[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        at = end;
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// If a comment or a literal begins at `at`, where it ends.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let inside_word = at > 0 && is_word(bytes[at - 1]);
    let to = |length: Option<usize>| Some(length.map_or(bytes.len(), |length| at + length));
    match rest {
        [b'/', b'/', ..] => to(rest.iter().position(|byte| *byte == b'\n')),
        [b'/', b'*', ..] => to(block_comment_length(rest)),
        [b'"', ..] => to(quoted_length(rest, b'"')),
        [b'b', b'"', ..] if !inside_word => to(quoted_length(&rest[1..], b'"').map(|length| length + 1)),
        [b'r', b'"' | b'#', ..] if !inside_word => raw_length(&rest[1..]).map(|length| at + 1 + length),
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !inside_word => {
            raw_length(&rest[2..]).map(|length| at + 2 + length)
        }
        // A character, not a lifetime: escaped, or closed within one character of at most four bytes.
        [b'\'', b'\\', ..] => to(quoted_length(rest, b'\'')),
        [b'\'', ..] => (2..=5).find(|end| rest.get(*end) == Some(&b'\'')).and_then(|end| {
            let one = std::str::from_utf8(&rest[1..end]).is_ok_and(|text| text.chars().count() == 1);
            one.then_some(at + end + 1)
        }),
        _ => None,
    }
}

fn block_comment_length(rest: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    while at + 1 < rest.len() {
        match &rest[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" if depth == 1 => return Some(at + 2),
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    None
}

fn quoted_length(rest: &[u8], quote: u8) -> Option<usize> {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
    None
}

/// The length of `#…"…"#…`; none if it is no raw string but a raw identifier.
fn raw_length(rest: &[u8]) -> Option<usize> {
    let hashes = rest.iter().take_while(|byte| **byte == b'#').count();
    if rest.get(hashes) != Some(&b'"') {
        return None;
    }
    let closing = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let body = &rest[hashes + 1..];
    let end = body.windows(closing.len()).position(|window| window == closing);
    Some(end.map_or(rest.len(), |end| hashes + 1 + end + closing.len()))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Lines, counted from 1, on which the code has the word or path by itself.
fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let bytes = code.as_bytes();
    let alone = |at: usize| {
        let before = at == 0 || !is_word(bytes[at - 1]);
        before && bytes.get(at + word.len()).is_none_or(|byte| !is_word(*byte))
    };
    let found = code.match_indices(word).filter(|(at, _)| alone(*at));
    found.map(|(at, _)| line_of(code, at)).collect()
}

/// The line, counted from 1, on which the byte at `at` lies.
fn line_of(code: &str, at: usize) -> usize {
    1 + code[..at].bytes().filter(|byte| *byte == b'\n').count()
}

#[test]
fn comments_and_literals_are_no_code() {
    let text = "unsafe // unsafe\n/* unsafe /* unsafe */ unsafe */ \"unsafe \\\" unsafe\" r#\"unsafe \" unsafe\"# \
                b\"unsafe\" br\"unsafe\" 'u' '\\'' '\"' unsafe\nfn f<'a>(x: &'a str) { unsafe {} }\nunsafe_code";
    assert_eq!(lines_with(&code_of(text), "unsafe"), [1, 2, 3]);
    assert_eq!(lines_with(&code_of("x\n'é' unsafe '\n"), "unsafe"), [2]);
    assert_eq!(lines_with(&code_of("r#unsafe \"open"), "unsafe"), [1]);
}

// Rule 3: crates that forbid unsafe code say so.

fn forbid_complaints(path: &str, text: &str) -> Option<String> {
    let said = code_of(text).lines().any(|line| line.trim() == "#![forbid(unsafe_code)]");
    (!said).then(|| format!("{path}: lacks #![forbid(unsafe_code)]"))
}

#[test]
fn crates_without_unsafe_code_forbid_it() {
    let mut complaints = Vec::new();
    for (name, _) in EDGES.iter().filter(|(name, _)| !UNSAFE_CRATES.contains(name)) {
        let files = ["lib.rs", "main.rs"].map(|file| format!("src/{name}/{file}"));
        let present: Vec<_> = files.iter().filter(|path| root().join(path).is_file()).collect();
        assert!(!present.is_empty(), "src/{name} has neither lib.rs nor main.rs");
        complaints
            .extend(present.iter().filter_map(|path| forbid_complaints(path, &read(&root().join(path)))));
    }
    assert_none(complaints);
}

#[test]
fn the_forbid_rule_can_fail() {
    assert_eq!(forbid_complaints("x", "//! X.\n#![forbid(unsafe_code)]\n"), None);
    assert!(forbid_complaints("x", "//! X.\n// #![forbid(unsafe_code)]\n").is_some());
    assert!(forbid_complaints("x", "//! X.\n/*\n#![forbid(unsafe_code)]\n*/\n").is_some());
    assert!(forbid_complaints("x", "//! X.\n#![deny(unsafe_code)]\n").is_some());
}

// Rule 4: unsafe code of vhost_blk is in memory.rs (guest memory), loss.rs (what is done when a page of it is gone) and
// fd.rs (who owns a received descriptor, interrupted writes). Its tests have some in tests/kit/host.rs (system calls).

/// The files of vhost_blk that may hold unsafe code.
const UNSAFE_FILES: &[&str] = &[
    "src/vhost_blk/memory.rs",
    "src/vhost_blk/loss.rs",
    "src/vhost_blk/fd.rs",
    "src/vhost_blk/tests/kit/host.rs",
];

fn unsafe_complaints(source: &Source) -> Vec<String> {
    if UNSAFE_FILES.contains(&source.path.as_str()) {
        return Vec::new();
    }
    let lines = lines_with(&code_of(&source.text), "unsafe");
    lines.iter().map(|line| format!("{}:{line}: unsafe outside UNSAFE_FILES", source.path)).collect()
}

#[test]
fn unsafe_code_of_vhost_blk_is_in_its_memory() {
    assert_none(sources(&["src/vhost_blk"]).iter().flat_map(unsafe_complaints).collect());
}

#[test]
fn the_unsafe_rule_can_fail() {
    let complain = |path: &str| {
        let text = "//! X: no unsafe.\n#![deny(unsafe_code)]\nfn f() {\n    unsafe { g() }\n}\n".into();
        unsafe_complaints(&Source { path: path.into(), text })
    };
    assert_none(complain("src/vhost_blk/memory.rs"));
    assert_eq!(complain("src/vhost_blk/ring.rs"), ["src/vhost_blk/ring.rs:4: unsafe outside UNSAFE_FILES"]);
    assert_eq!(complain("src/vhost_blk/ring/memory.rs").len(), 1);
}

// Rule 5: engine and qcow2 do no I/O.

/// Paths that must not be named, nor imported in a group.
const STD_MODULES: &[&str] = &["fs", "net", "thread"];
/// Words that must not be used at all.
const WORDS: &[&str] = &["storage", "io_uring"];

/// The crate's own test targets (src/qcow2/tests) may read files and run tools: they are not part of the crate.
fn is_test_target(source: &Source) -> bool {
    PURE_CRATES.iter().any(|name| source.path.starts_with(&format!("src/{name}/tests/")))
}

fn purity_complaints(source: &Source) -> Vec<String> {
    if is_test_target(source) {
        return Vec::new();
    }
    let code = code_of(&source.text);
    // Inline tests stand last in a file and may start threads.
    let code = code.split("#[cfg(test)]").next().unwrap_or_default();
    let complain = |line: usize, what: &str| format!("{}:{line}: {what} in a crate without I/O", source.path);
    let mut complaints = Vec::new();
    for word in WORDS {
        complaints.extend(lines_with(code, word).iter().map(|line| complain(*line, word)));
    }
    for (at, _) in code.match_indices("std").filter(|(at, _)| *at == 0 || !is_word(code.as_bytes()[*at - 1]))
    {
        let line = line_of(code, at);
        for module in named_by(&code[at + 3..]) {
            if STD_MODULES.contains(&module.as_str()) {
                complaints.push(complain(line, &format!("std::{module}")));
            }
        }
    }
    complaints
}

/// The modules that a path names right after its first word: `::x`, or each of `::{x::y, z::{…}}`.
fn named_by(rest: &str) -> Vec<String> {
    let compact: String = rest.chars().take(4000).filter(|character| !character.is_whitespace()).collect();
    let Some(path) = compact.strip_prefix("::") else { return Vec::new() };
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let (mut depth, mut start, mut names) = (0, 0, Vec::new());
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            ',' if depth == 0 => {
                names.push(word(&group[start..at]));
                start = at + 1;
            }
            '}' if depth == 0 => {
                names.push(word(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

#[test]
fn engine_and_qcow2_do_no_io() {
    let folders: Vec<String> = PURE_CRATES.iter().map(|name| format!("src/{name}")).collect();
    let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
    assert_none(sources(&folders).iter().flat_map(purity_complaints).collect());
}

#[test]
fn the_purity_rule_can_fail() {
    let complain =
        |text: &str| purity_complaints(&Source { path: "x.rs".into(), text: format!("//! X.\n{text}\n") });
    let pure = "use std::{fmt, sync::{Arc, thread}};\nuse std::collections::BTreeMap;\n// storage, std::fs\n\
                let storage_size = fs::x; let s = \"io_uring\"; mystd::fs";
    assert_none(complain(pure));
    let impure = [
        "use std::fs::File;",
        "use std::{fmt, fs};",
        "use std::{\n    fmt::{self, Debug},\n    thread,\n};",
        "let x = std::net::TcpStream::connect(y);",
        "use storage::IoQueue;",
        "use ::io_uring;",
    ];
    for text in impure {
        assert_eq!(complain(text).len(), 1, "{text}");
    }
    assert_eq!(complain("\nuse std::{net, fs};").len(), 2);
    let beside =
        |path: &str| purity_complaints(&Source { path: path.into(), text: "//! X.\nstd::fs".into() });
    assert_none(beside("src/qcow2/tests/x.rs"));
    assert_eq!(beside("src/qcow2/x.rs").len() + beside("src/engine/map/tests.rs").len(), 2);
    assert_eq!(complain("\nstd::fs")[0], "x.rs:3: std::fs in a crate without I/O");
}
