//! How an error of the program reaches people, on the standard error, and programs, as a [`Failure`].
//!
//! Owns which kind an error has for programs, and which file and place it is about.

use std::io::{self, Write as _};
use std::path::Path;

use control::client::ClientError;
use control::{Failure, Kind};
use disk::change::ChangeError;
use disk::resize::{InUseError, ResizeError};
use disk::{EngineError, OpenError, RequestError, SnapshotError};
use names::one_line;
use storage::{Errno, StorageError};
use vhost_blk::SessionError;

use crate::error::{ProgramError, with_causes};
use crate::hint;
use crate::log;
use crate::text::json_name;

/// Tells the error on the standard error, to people or as a line of the log, as the log's format is. A failure to
/// print is ignored.
pub fn show(error: &ProgramError) {
    let message = one_line(&with_causes(error)).to_string();
    let hint = hint::of(error).map(|hint| one_line(&hint).to_string());
    if log::tell_last_error(&message, hint.as_deref()) {
        return;
    }
    let prefix = log::error_prefix();
    let mut text = format!("{prefix}strata: error: {message}\n");
    if let Some(hint) = hint {
        text += &format!("{prefix}strata: hint: {hint}\n");
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// An error of the program in the form for programs.
pub fn failure(error: &ProgramError) -> Failure {
    let (kind, place) = of_program(error);
    Failure {
        kind,
        message: one_line(&with_causes(error)).to_string(),
        file: place.file,
        structure: place.structure,
        offset: place.offset,
        hint: hint::of(error),
    }
}

/// The location of an error.
#[derive(Default)]
struct Place {
    file: Option<String>,
    structure: Option<String>,
    offset: Option<u64>,
}

impl Place {
    fn file(path: &Path) -> Self {
        Place { file: Some(json_name(path)), ..Place::default() }
    }

    fn at(path: &Path, structure: impl ToString, offset: u64) -> Self {
        Place { structure: Some(structure.to_string()), offset: Some(offset), ..Place::file(path) }
    }
}

fn of_program(error: &ProgramError) -> (Kind, Place) {
    match error {
        ProgramError::Open { source, .. }
        | ProgramError::Close { source, .. }
        | ProgramError::Flush { source, .. } => of_open(source),
        ProgramError::ControlSocket(source) => of_program(source),
        ProgramError::Ctl { source, .. } => of_client(source),
        ProgramError::Check { source, .. } => of_open(source),
        ProgramError::ChainRoot(source) => of_storage(source),
        ProgramError::NothingToCheck { image } => (Kind::NothingToCheck, Place::file(image)),
        ProgramError::Snapshot(source) => of_change(source),
        ProgramError::Resize(source) => of_resize(source),
        ProgramError::LiveSnapshot(SnapshotError::Open(source)) => of_open(source),
        ProgramError::LiveSnapshot(SnapshotError::Refused { path, .. }) => (Kind::Refused, Place::file(path)),
        ProgramError::LiveSnapshot(SnapshotError::Name { path, source }) => {
            (of_io(source, Kind::Io), Place::file(path))
        }
        ProgramError::BlockSize { image, .. } => (Kind::Refused, Place::file(image)),
        ProgramError::InUse { image } => (Kind::InUse, Place::file(image)),
        ProgramError::Session(source) => of_session(source),
        ProgramError::SocketPathTooLong { path, .. } => (Kind::Socket, Place::file(path)),
        ProgramError::SocketFolder { folder, source, .. } => {
            (of_io(source, Kind::Socket), Place::file(folder))
        }
        ProgramError::SocketAccess { path, source, .. } => (of_io(source, Kind::Socket), Place::file(path)),
        ProgramError::Replace { path, source, .. } => (of_io(source, Kind::Socket), Place::file(path)),
        ProgramError::NoSuchGroup { .. } => (Kind::NotFound, Place::default()),
        _ => (Kind::Host, Place::default()),
    }
}

fn of_client(error: &ClientError) -> (Kind, Place) {
    match error {
        ClientError::Connect(source) => (of_io(source, Kind::Socket), Place::default()),
        ClientError::Refused(failure) => {
            let Failure { kind, file, structure, offset, .. } = failure.as_ref().clone();
            (kind, Place { file, structure, offset })
        }
        ClientError::Http(_) | ClientError::Answer(_) => (Kind::Socket, Place::default()),
    }
}

fn of_open(error: &OpenError) -> (Kind, Place) {
    match error {
        OpenError::Backing { source, .. } => of_open(source),
        OpenError::Storage(source) => of_storage(source),
        OpenError::Io { path, structure, offset, source } => {
            (of_errno(*source), Place::at(path, structure, *offset))
        }
        OpenError::NotQcow2 { path, source, .. } => {
            (Kind::WrongFormat, Place::at(path, source.structure, source.offset.0))
        }
        OpenError::Format { path, source } => {
            let wrong = matches!(source.kind, qcow2::FormatErrorKind::BadMagic { .. });
            let kind = if wrong { Kind::WrongFormat } else { Kind::Damaged };
            (kind, Place::at(path, source.structure, source.offset.0))
        }
        OpenError::SnapshotTable { path, offset, .. } => {
            (Kind::Damaged, Place::at(path, "snapshot table", offset.0))
        }
        OpenError::Bitmaps { path, .. } => (Kind::Damaged, Place::file(path)),
        OpenError::BadSnapshot { path, .. } => (Kind::Damaged, Place::file(path)),
        OpenError::Dirty(source) => of_open(source),
        OpenError::NotCheckable { path, .. } => (Kind::Unsupported, Place::file(path)),
        OpenError::NotRepairable { path, .. } => (Kind::Damaged, Place::file(path)),
        OpenError::Unsupported { path, source } => {
            let damaged = *source == qcow2::Unsupported::Corrupt;
            (if damaged { Kind::Damaged } else { Kind::Unsupported }, Place::file(path))
        }
        OpenError::NoSuchSnapshot { path, .. } => (Kind::NotFound, Place::file(path)),
        OpenError::DataFileMissing { image: path, .. } | OpenError::BackingFormatMissing { path, .. } => {
            (Kind::NotSpecified, Place::file(path))
        }
        OpenError::BackingFormatUnknown { path, .. } | OpenError::BackingName { path, .. } => {
            (Kind::Unsupported, Place::file(path))
        }
        OpenError::Request { path, source } => of_request(path, source),
        OpenError::SnapshotsTooLarge { path, .. }
        | OpenError::SnapshotOfRaw { path }
        | OpenError::WritableBlockDevice { path }
        | OpenError::NoZeroClusters { path }
        | OpenError::DataFileNotWanted { image: path, .. }
        | OpenError::DataFileTwice { image: path, .. }
        | OpenError::DataFileTooShort { path, .. }
        | OpenError::BackingLoop { path }
        | OpenError::ChainTooDeep { path, .. } => (Kind::Refused, Place::file(path)),
        OpenError::DataFileOfNoLayer { layer } => (Kind::Refused, Place::file(layer)),
        _ => (Kind::Host, Place::default()),
    }
}

fn of_resize(error: &ResizeError) -> (Kind, Place) {
    match error {
        ResizeError::Change(source) => of_change(source),
        ResizeError::InUse { path, source } => match source {
            InUseError::Step(source) => of_request(path, source),
            // Of the daemon, not of the disk: a daemon that serves it later takes the size.
            InUseError::Busy | InUseError::GivenUp => (Kind::Busy, Place::file(path)),
            InUseError::ReadOnly | InUseError::PartialBlock { .. } | InUseError::AwaitsJournal => {
                (Kind::Refused, Place::file(path))
            }
        },
        // No disk can have these sizes, whatever it is.
        ResizeError::Empty { path, .. }
        | ResizeError::TooLarge { path }
        | ResizeError::NoSectors { path, .. } => (Kind::Usage, Place::file(path)),
        ResizeError::NothingLeft { path, .. }
        | ResizeError::WouldShrink { path, .. }
        | ResizeError::BlockDevice { path } => (Kind::Refused, Place::file(path)),
    }
}

fn of_request(path: &Path, error: &RequestError) -> (Kind, Place) {
    match error {
        RequestError::Engine(source) => (of_engine(source), Place::file(path)),
        RequestError::Crowded | RequestError::PastEnd => (Kind::Io, Place::file(path)),
        RequestError::Io { source, .. } => (of_errno(*source), Place::file(path)),
        RequestError::GivenUp(source) => of_request(path, source),
        RequestError::Compressed { path, offset, .. } => {
            (Kind::Damaged, Place::at(path, "compressed cluster", *offset))
        }
    }
}

fn of_engine(error: &EngineError) -> Kind {
    match error {
        EngineError::BadEntry { .. } | EngineError::Corrupt(_) => Kind::Damaged,
        EngineError::Failed => Kind::Io,
        EngineError::RefcountTableFull
        | EngineError::L1TableFull { .. }
        | EngineError::FileTooLarge
        | EngineError::ReadOnly => Kind::Refused,
    }
}

fn of_change(error: &ChangeError) -> (Kind, Place) {
    match error {
        ChangeError::Open(source) | ChangeError::Repair(source) | ChangeError::Interrupted { source } => {
            of_open(source)
        }
        ChangeError::Refused { path, source: disk::change::ChangeRefusal::NotFound { .. } } => {
            (Kind::NotFound, Place::file(path))
        }
        ChangeError::Refused { path, .. } => (Kind::Refused, Place::file(path)),
    }
}

fn of_storage(error: &StorageError) -> (Kind, Place) {
    match error {
        StorageError::File { path, source, .. } => (of_io(source, Kind::Io), Place::file(path)),
        StorageError::NotAnImage { path, .. } => (Kind::WrongFormat, Place::file(path)),
        StorageError::Outside { path, .. } => (Kind::Outside, Place::file(path)),
        StorageError::Locked { path, .. } | StorageError::AlreadyOpen { path, .. } => {
            (Kind::InUse, Place::file(path))
        }
        _ => (Kind::Host, Place::default()),
    }
}

fn of_session(error: &SessionError) -> (Kind, Place) {
    match error {
        SessionError::SocketInUse { path } => (Kind::InUse, Place::file(path)),
        SessionError::NotASocket { path } => (Kind::Socket, Place::file(path)),
        SessionError::Socket { path, source, .. } => (of_io(source, Kind::Socket), Place::file(path)),
        _ => (Kind::Socket, Place::default()),
    }
}

fn of_io(error: &io::Error, other: Kind) -> Kind {
    match error.kind() {
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::AlreadyExists => Kind::Refused,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Kind::PermissionDenied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Kind::NoSpace
        }
        _ => other,
    }
}

fn of_errno(errno: Errno) -> Kind {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => Kind::NoSpace,
        _ => Kind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_its_kind_and_its_place() {
        let path = Path::new("a\n\u{9b}");
        let source = OpenError::Io { path: path.into(), structure: "header", offset: 7, source: Errno::EIO };
        let purpose = crate::error::Purpose::Info;
        let text = failure(&ProgramError::Open { image: path.into(), purpose, source }).json();
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&value["error"]["offset"], &value["error"]["kind"]), (&7.into(), &"io".into()));
        assert_eq!(value["error"]["file"], "a\n\u{9b}");
        assert!(!text.contains('\u{9b}'), "{text}");
    }
    #[test]
    fn a_disk_in_use_that_cannot_have_a_size_says_why() {
        let kind = |source| {
            let path = "a".into();
            failure(&ProgramError::Resize(ResizeError::InUse { path, source })).kind
        };
        let no_space = RequestError::Io { action: "writing", source: Errno::ENOSPC };
        for (source, expected) in [
            (InUseError::ReadOnly, Kind::Refused),
            (InUseError::PartialBlock { block: 4096 }, Kind::Refused),
            (InUseError::AwaitsJournal, Kind::Refused),
            (InUseError::Busy, Kind::Busy),
            (InUseError::GivenUp, Kind::Busy),
            (InUseError::Step(no_space), Kind::NoSpace),
            (InUseError::Step(EngineError::Failed.into()), Kind::Io),
            (InUseError::Step(EngineError::L1TableFull { entries: 2, room: 1 }.into()), Kind::Refused),
        ] {
            assert_eq!(kind(source), expected);
        }
    }

    #[test]
    fn a_flush_of_a_disk_that_has_failed_is_no_damage() {
        let failed = RequestError::from(EngineError::Failed);
        let source = OpenError::Request { path: "a".into(), source: failed };
        assert_eq!(failure(&ProgramError::Flush { image: "a".into(), source }).kind, Kind::Io);
    }
}
