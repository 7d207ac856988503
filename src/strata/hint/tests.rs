//! Tests every hint with every command: the command line accepts each option that a hint names, and each suggested
//! `strata` command is valid.

use std::path::PathBuf;

use clap::Parser as _;
use qcow2::{FormatError, HostOffset, Structure};
use storage::error::{LockConflict, Permission};

use super::*;

/// Each purpose with a command line for it.
const LINES: &[(Purpose, &[&str])] = &[
    (Purpose::Serve, &["serve", "i", "--socket-path", "s"]),
    (Purpose::ServeReadOnly, &["serve", "i", "--socket-path", "s"]),
    (Purpose::Info, &["info", "i"]),
    (Purpose::Check, &["check", "i"]),
    (Purpose::Repair, &["check", "-r", "all", "i"]),
    (Purpose::SnapshotList, &["snapshot", "-l", "i"]),
    (Purpose::SnapshotChange, &["snapshot", "-c", "n", "i"]),
    (Purpose::Resize, &["resize", "i", "1G"]),
];

const FOREIGN: &[Foreign] = &[
    Foreign::Empty,
    Foreign::Qcow2,
    Foreign::Qcow1,
    Foreign::Qed,
    Foreign::Vmdk,
    Foreign::Vhdx,
    Foreign::Vhd,
    Foreign::Vdi,
    Foreign::Parallels,
    Foreign::Dmg,
    Foreign::Luks,
    Foreign::Iso9660,
    Foreign::Gzip,
    Foreign::Xz,
    Foreign::Zstd,
    Foreign::Bzip2,
    Foreign::Lz4,
    Foreign::Zip,
    Foreign::Tar,
];

fn magic() -> FormatError {
    let kind = FormatErrorKind::BadMagic { magic: 0 };
    FormatError { kind, structure: Structure::Header, offset: HostOffset(0) }
}

/// Errors of every kind that has a hint.
fn errors(path: &Path) -> Vec<OpenError> {
    let path = || path.to_path_buf();
    let open = |kind: io::ErrorKind| {
        OpenError::Storage(StorageError::File { step: Step::Open, path: path(), source: kind.into() })
    };
    let mut errors = vec![
        open(io::ErrorKind::NotFound),
        open(io::ErrorKind::PermissionDenied),
        open(io::ErrorKind::ReadOnlyFilesystem),
        OpenError::Storage(StorageError::Locked {
            path: path(),
            conflict: LockConflict::Uses(Permission::Write),
            holder: None,
        }),
        OpenError::Storage(StorageError::Outside { path: path(), place: path() }),
        OpenError::Format { path: path(), source: magic() },
        OpenError::Unsupported { path: path(), source: Unsupported::Corrupt },
        OpenError::DataFileMissing { image: path(), recorded: Some(b"x\n".to_vec()), top: true },
        OpenError::DataFileOfNoLayer { layer: path() },
        OpenError::BackingFormatMissing { path: path(), backing: b"\xff".to_vec() },
        OpenError::WritableBlockDevice { path: path() },
    ];
    errors.extend(FOREIGN.iter().map(|foreign| OpenError::NotQcow2 {
        path: path(),
        source: magic(),
        foreign: *foreign,
    }));
    errors
}

/// The hints of every kind of error for a purpose, with the image and below it.
fn hints(path: &Path, purpose: Purpose) -> Vec<String> {
    let image = || path.to_path_buf();
    let mut all = errors(path);
    for recorded in [false, true] {
        let chain = || vec![image(), PathBuf::from("middle"), image()];
        let below = errors(path).into_iter();
        all.extend(below.map(|source| OpenError::Backing {
            chain: chain(),
            recorded,
            source: Box::new(source),
        }));
    }
    let hints =
        all.into_iter().filter_map(|source| of(&ProgramError::Open { image: image(), purpose, source }));
    hints.collect()
}

/// The text without its commands, and the commands.
fn taken_apart(hint: &str) -> (String, Vec<String>) {
    let mut parts = hint.split('`');
    let (mut prose, mut commands) = (String::new(), Vec::new());
    while let Some(text) = parts.next() {
        prose += text;
        commands.extend(parts.next().map(str::to_owned));
    }
    (prose, commands)
}

fn takes(line: &[&str], option: &str) -> bool {
    let long = option.split_once('=').map_or(option, |(name, _)| name);
    let values: &[&[&str]] = &[&[], &["raw"], &["a=b"], &["f"]];
    values.iter().any(|value| {
        let words = ["strata"].iter().chain(line).copied().chain([long]).chain(value.iter().copied());
        Cli::try_parse_from(words).is_ok()
    })
}

#[test]
fn hints_name_only_options_that_the_command_takes() {
    let mut named = 0;
    for (purpose, line) in LINES {
        for hint in hints(Path::new("i"), *purpose) {
            let (prose, commands) = taken_apart(&hint);
            let words = prose.split(|c: char| c.is_whitespace() || ",;:()".contains(c));
            for option in words.filter(|word| word.starts_with('-') && word.len() > 1) {
                named += 1;
                assert!(takes(line, option), "{line:?} does not take {option}: {hint}");
            }
            for command in commands.iter().filter(|command| command.starts_with("strata ")) {
                assert!(Cli::try_parse_from(command.split(' ')).is_ok(), "{command}");
            }
        }
    }
    assert!(named > 40, "only {named} options were named");
    assert!(!takes(&["snapshot", "-l", "i"], "--format") && takes(&["info", "i"], "--format"));
    assert!(
        !takes(&["check", "-r", "all", "i"], "--force-share"),
        "options that exclude each other are seen"
    );
}

#[test]
fn a_hint_is_one_line_and_its_commands_name_the_file() {
    for name in ["x;reboot", "a\nstrata: error: forged", "\x1b[2J'", "-rf", "a`b", "tail\n", "$(id)"] {
        let path = Path::new(name);
        for (purpose, _) in LINES {
            for hint in hints(path, *purpose) {
                assert!(!hint.chars().any(names::must_be_escaped), "{hint:?}");
                assert!(!hint.contains("`strata check -r all x;reboot"), "{hint}");
            }
        }
    }
}

#[test]
fn no_format_but_raw_is_called_raw() {
    for foreign in FOREIGN.iter().filter(|foreign| !matches!(foreign, Foreign::Qcow2 | Foreign::Iso9660)) {
        for (purpose, _) in LINES {
            let hint = foreign_hint(Path::new("i"), *purpose, *foreign);
            assert!(!hint.contains("--format raw"), "{foreign:?}: {hint}");
        }
    }
    let vmdk = foreign_hint(Path::new("a b"), Purpose::Serve, Foreign::Vmdk);
    assert_eq!(vmdk, "convert it with `qemu-img convert -O qcow2 -f vmdk 'a b' 'a b.qcow2'`");
    let luks = foreign_hint(Path::new("a,b"), Purpose::Serve, Foreign::Luks);
    assert!(luks.contains("file.filename=a,,b a,b.qcow2`"), "{luks}");
}

#[test]
fn a_backing_file_is_told_from_the_image() {
    let missing = |path: &str| {
        let source = io::ErrorKind::NotFound.into();
        OpenError::Storage(StorageError::File { step: Step::Open, path: path.into(), source })
    };
    let open = |source| ProgramError::Open { image: "top".into(), purpose: Purpose::Serve, source };
    assert!(of(&open(missing("top"))).expect("a hint").contains("qemu-img create"));
    let chain = ["top", "middle", "base"].map(PathBuf::from).to_vec();
    let source = Box::new(missing("base"));
    let below = open(OpenError::Backing { chain, recorded: true, source });
    assert!(below.to_string().ends_with("(layer 3 of the chain top -> middle -> base)"), "{below}");
    let hint = of(&below).expect("a hint");
    assert!(hint.contains("backing chain of top") && hint.contains("FORMAT middle`"), "{hint}");
}
