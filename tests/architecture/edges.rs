//! Which of our crates may import which: the manifests decide, and this table is held against them.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use crate::{assert_none, read, root};

/// Which of our crates each crate under src may import, dev-dependencies included. A new edge here is a change to the
/// architecture and is to be argued for as one. `storage_sim` is for tests alone: see [`TESTS_ONLY`].
pub const EDGES: &[(&str, &[&str])] = &[
    ("names", &[]),
    ("block", &[]),
    ("qcow2", &["names"]),
    ("engine", &["names", "qcow2"]),
    ("storage", &["names"]),
    ("storage_sim", &["storage", "strata-random"]),
    ("disk", &["block", "engine", "names", "qcow2", "storage", "storage_sim"]),
    ("vhost_blk", &["block", "names"]),
    ("control", &["names"]),
    ("strata", &["block", "control", "disk", "engine", "names", "qcow2", "storage", "vhost_blk"]),
];
/// Crates under src that only dev-dependencies may name, so that the program never contains them.
const TESTS_ONLY: &[&str] = &["storage_sim"];
/// Our packages outside src. They may import anything, and no crate under src may import them, but for `strata-random`.
/// `strata-fuzz` (tests/fuzz) is in no workspace but its own, as it needs nightly.
const OUTSIDE: &[&str] = &[
    "strata-architecture",
    "strata-benches",
    "strata-crash",
    "strata-fuzz",
    "strata-fuzz-targets",
    "strata-integration",
    "strata-kit",
    "strata-random",
    "strata-rig",
    "strata-tests",
];
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

/// Every package that a manifest depends on, in whatever kind of table; true where the table is for tests alone.
fn dependencies(manifest: &Table, aliases: &BTreeMap<String, String>) -> Vec<(String, bool)> {
    let mut tables: Vec<&Table> = vec![manifest];
    if let Some(targets) = manifest.get("target").and_then(Value::as_table) {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    tables
        .iter()
        .flat_map(|table| kinds.iter().filter_map(|kind| Some((*kind, table.get(*kind)?.as_table()?))))
        .flat_map(|(kind, table)| table.iter().map(move |entry| (kind == "dev-dependencies", entry)))
        .map(|(for_tests, (name, entry))| {
            let inherited = entry.get("workspace").and_then(Value::as_bool) == Some(true);
            let alias = inherited.then(|| aliases.get(name).cloned()).flatten();
            (alias.unwrap_or_else(|| package_of(name, entry)), for_tests)
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
    for (package, for_tests) in dependencies(&manifest, aliases) {
        let ours = EDGES.iter().any(|(name, _)| *name == package) || OUTSIDE.contains(&package.as_str());
        if ours && !allowed.contains(&package.as_str()) {
            complaints.push(format!("src/{folder}/Cargo.toml: {folder} must not import {package}"));
        }
        if TESTS_ONLY.contains(&package.as_str()) && !for_tests {
            complaints.push(format!("src/{folder}/Cargo.toml: {package} is a dev-dependency or none"));
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
    assert_none(complain("disk", "[dev-dependencies]\nstorage_sim.workspace = true"));
    assert_eq!(complain("disk", "[dependencies]\nstorage_sim.workspace = true").len(), 1);
    assert_eq!(complain("disk", "[dependencies]\nvhost_blk.workspace = true").len(), 1);
    assert_eq!(complain("vhost_blk", "[dev-dependencies]\ndisk.workspace = true").len(), 1);
    assert_eq!(complain("novelty", "").len(), 1);
    assert_eq!(edge_complaints("engine", "[package]\nname = 'motor'", &aliases).len(), 1);
    assert_eq!(edge_complaints("engine", "not TOML", &aliases).len(), 1);
}

fn manifests() -> Vec<(String, String)> {
    let folder = root().join("src");
    let entries = std::fs::read_dir(&folder).expect("src can be listed");
    let folders = entries.map(|entry| entry.expect("src can be listed").path()).filter(|path| path.is_dir());
    let name =
        |path: &Path| path.file_name().expect("a listed folder has a name").to_string_lossy().into_owned();
    folders.map(|path| (name(&path), read(&path.join("Cargo.toml")))).collect()
}
