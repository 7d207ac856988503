//! What to do about an error. A hint names an option only if the command has it and accepts it with the other
//! arguments.
//!
//! Owns the texts of the hints. Each is for one [`Purpose`]; `hint/tests.rs` tries every option they name on the
//! command line itself.

use std::io;
use std::path::Path;

use clap::CommandFactory as _;
use control::client::ClientError;
use disk::{Foreign, OpenError};
use names::{ShellCommand, shown};
use qcow2::{FormatError, FormatErrorKind, Structure, Unsupported};
use storage::StorageError;
use storage::error::Step;
use vhost_blk::SessionError;

use crate::cli::Cli;
use crate::error::{ProgramError, Purpose};
use crate::limits;

impl Purpose {
    /// The option, as people type it, if the command has it and the purpose allows it.
    fn option(self, long: &'static str) -> Option<String> {
        // An image is never written without its lock.
        if long == "force-share" && self.writes() {
            return None;
        }
        let program = Cli::command();
        let command = program.find_subcommand(self.command())?;
        let has = command.get_arguments().any(|argument| argument.get_long() == Some(long));
        has.then(|| format!("--{long}"))
    }
}

/// What to do about an error, where its message does not say.
pub fn of(error: &ProgramError) -> Option<String> {
    limits::hint(error).or_else(|| own(error))
}

fn own(error: &ProgramError) -> Option<String> {
    match error {
        ProgramError::Open { image, purpose, source } => open_hint(image, *purpose, source),
        ProgramError::Check { image, purpose, source } => open_hint(image, *purpose, source),
        ProgramError::Close { image, .. } => {
            Some(format!("look at the image with `{}`", ShellCommand::new("strata check").path(image)))
        }
        ProgramError::Session(error) => session_hint(error, "--socket-path", "--fd"),
        ProgramError::ControlSocket(error) => match error.as_ref() {
            ProgramError::Session(error) => session_hint(error, "--control-socket", "--control-fd"),
            error => own(error),
        },
        ProgramError::Ctl { source, .. } => client_hint(source),
        ProgramError::SocketPathTooLong { .. } => Some(
            "choose a shorter path, for example under /run, or one relative to the current folder".into(),
        ),
        ProgramError::SocketFolder { folder, source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Some(format!("make the folder first: `{}`", ShellCommand::new("mkdir -p").path(folder)))
        }
        ProgramError::SocketAccess { .. } => {
            Some("only root may give a file to any group; others only to a group they are in".into())
        }
        ProgramError::BlockSize { image, .. } => {
            let resize = ShellCommand::new("strata resize").path(image).words("SIZE");
            Some(format!("serve it with --logical-block-size 512, or make it larger with `{resize}`"))
        }
        ProgramError::NoSuchGroup { .. } => Some("groups from elsewhere can be given by number".into()),
        _ => None,
    }
}

fn open_hint(image: &Path, purpose: Purpose, error: &OpenError) -> Option<String> {
    match error {
        OpenError::Backing { chain, recorded, source } => {
            Some(backing_hint(chain, *recorded, purpose, source))
        }
        OpenError::Storage(error) => storage_hint(image, purpose, error),
        OpenError::NotQcow2 { foreign, .. } => Some(foreign_hint(image, purpose, *foreign)),
        OpenError::Format { source, .. } => format_hint(image, purpose, source),
        OpenError::DataFileMissing { .. } => Some(match purpose.option("data-file") {
            Some(option) => format!("name the file: {option} FILE"),
            None => "this command cannot use external data files".into(),
        }),
        OpenError::DataFileOfNoLayer { .. } => {
            Some("backing files are called by the paths under which messages name them".into())
        }
        OpenError::BackingFormatMissing { path, .. } => {
            let record = ShellCommand::new("qemu-img rebase -u -b FILE -F FORMAT").path(path);
            let say =
                purpose.option("backing-format").map(|option| format!("say {option} qcow2 or raw, or "));
            Some(format!("{}record the format with `{record}`", say.unwrap_or_default()))
        }
        OpenError::WritableBlockDevice { .. } => {
            let raw = purpose.option("format").filter(|_| purpose != Purpose::Repair);
            raw.map(|option| format!("if the device holds a raw image, say {option} raw"))
        }
        OpenError::NoZeroClusters { path } => {
            let amend = ShellCommand::new("qemu-img amend -o compat=1.1").path(path);
            Some(format!("leave out --discard-no-unref, or make the image one of version 3 with `{amend}`"))
        }
        OpenError::Unsupported { path, source: Unsupported::Corrupt } => {
            let check = ShellCommand::new("strata check -r all").path(path);
            let read = purpose.option("read-only").map(|option| format!("; {option} serves it as it is"));
            Some(format!(
                "make a copy of the image, then repair it with `{check}`{}",
                read.unwrap_or_default()
            ))
        }
        _ => None,
    }
}

fn storage_hint(image: &Path, purpose: Purpose, error: &StorageError) -> Option<String> {
    match error {
        StorageError::File { step: Step::Open, path, source } => match source.kind() {
            io::ErrorKind::NotFound if path != image => Some("is the path right?".into()),
            io::ErrorKind::NotFound => Some(format!(
                "is the path right? `{}` makes a new image",
                ShellCommand::new("qemu-img create -f qcow2").path(image).words("10G")
            )),
            _ if purpose.writes() && storage::host::is_readable(path) => {
                let read = purpose.option("read-only").map(|option| format!("give {option}, or "));
                let read = read.unwrap_or_default();
                Some(format!("it can be read but not written: {read}make it writable for this user"))
            }
            io::ErrorKind::PermissionDenied => Some("this user must be able to open it".into()),
            _ => None,
        },
        StorageError::Locked { .. } => Some(locked_hint(purpose)),
        StorageError::Outside { .. } => outside_hint(purpose),
        _ => None,
    }
}

fn outside_hint(purpose: Purpose) -> Option<String> {
    let option = purpose.option("chain-root")?;
    Some(format!("if it is meant to be used, allow its folder too: {option} may be given several times"))
}

fn locked_hint(purpose: Purpose) -> String {
    if let Some(option) = purpose.option("force-share") {
        return format!("{option} looks at it all the same; what it finds may change meanwhile");
    }
    match purpose {
        Purpose::Serve => "two may use one image at a time only if both do with --read-only".into(),
        Purpose::ServeReadOnly => {
            "an image that is being written cannot be read by others, not even with --read-only".into()
        }
        Purpose::Resize => {
            "if strata serves the image, SIGHUP resizes it in use: see size-file in its help".into()
        }
        _ => "stop what uses the image: this command changes it, and needs it alone".into(),
    }
}

fn format_hint(image: &Path, purpose: Purpose, error: &FormatError) -> Option<String> {
    match error.kind {
        FormatErrorKind::UnknownVersion { version: 1 } => Some(foreign_hint(image, purpose, Foreign::Qcow1)),
        FormatErrorKind::BadMagic { .. } => Some(unknown_hint(purpose)),
        _ if matches!(error.structure, Structure::RefcountTable | Structure::SnapshotTable) => {
            let check = ShellCommand::new("strata check").path(image);
            Some(format!("`{check}` tells whether that can be mended"))
        }
        _ => None,
    }
}

/// For a file that matches no known format.
fn unknown_hint(purpose: Purpose) -> String {
    match (purpose, purpose.option("format")) {
        (Purpose::Check | Purpose::Repair, _) => {
            "only qcow2 images can be checked; a raw image has nothing to check".into()
        }
        (_, Some(option)) => format!("if it is a raw image, say {option} raw"),
        (_, None) => "only qcow2 images have snapshots".into(),
    }
}

/// How to convert a file in another format into one that can be served.
fn foreign_hint(path: &Path, purpose: Purpose, foreign: Foreign) -> String {
    let convert = |format| {
        let command = ShellCommand::new("qemu-img convert -O qcow2 -f").words(format).path(path);
        format!("convert it with `{}`", command.path_and(path, ".qcow2"))
    };
    let unpack = |program| {
        let command = ShellCommand::new(program).path(path).words(">").path_and(path, ".unpacked");
        format!("unpack it first: `{command}`, and look at what comes out with `qemu-img info`")
    };
    match foreign {
        Foreign::Empty => {
            let command = ShellCommand::new("qemu-img create -f qcow2").path(path).words("10G");
            format!("was the copy broken off? `{command}` makes it a new, empty image")
        }
        Foreign::Vmdk => convert("vmdk"),
        Foreign::Vhdx => convert("vhdx"),
        Foreign::Vhd => convert("vpc"),
        Foreign::Vdi => convert("vdi"),
        Foreign::Qed => convert("qed"),
        Foreign::Qcow1 => convert("qcow"),
        Foreign::Parallels => convert("parallels"),
        Foreign::Dmg => convert("dmg"),
        Foreign::Gzip => unpack("gzip -dc"),
        Foreign::Xz => unpack("xz -dc"),
        Foreign::Zstd => unpack("zstd -dc"),
        Foreign::Bzip2 => unpack("bzip2 -dc"),
        Foreign::Lz4 => unpack("lz4 -dc"),
        Foreign::Zip => unpack("unzip -p"),
        Foreign::Tar => format!("unpack it first: `{}`", ShellCommand::new("tar -xf").path(path)),
        Foreign::Luks => luks_hint(path),
        Foreign::Iso9660 => match (purpose.option("format"), purpose.option("read-only")) {
            (Some(format), Some(read_only)) => {
                format!("it is raw data and only for reading: say {format} raw {read_only}")
            }
            _ => "it is raw data, in which there is nothing of qcow2".into(),
        },
        _ => unknown_hint(purpose),
    }
}

fn luks_hint(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    // In QEMU's image options a comma is escaped by doubling it.
    let bytes: Vec<u8> = path.as_os_str().as_bytes().iter().fold(Vec::new(), |mut bytes, byte| {
        bytes.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
        bytes
    });
    let command = ShellCommand::new(
        "qemu-img convert -O qcow2 --object secret,id=key,file=PASSPHRASE_FILE --image-opts",
    );
    let command = command.joined("driver=luks,key-secret=key,file.filename=", &bytes, "");
    format!("decrypt it with `{}`", command.path_and(path, ".qcow2"))
}

/// What to do about a layer below the image; the last name in the chain is that layer's own.
fn backing_hint(chain: &[std::path::PathBuf], recorded: bool, purpose: Purpose, error: &OpenError) -> String {
    let (image, overlay, own) = match chain {
        [image, .., overlay, own] => (image, overlay, own),
        [image, own] => (image, image, own),
        _ => return "the image cannot be used without it".into(),
    };
    let rebase =
        |format| ShellCommand::new("qemu-img rebase -u -b FILE -F").words(format).path(overlay).to_string();
    let unusable = || "the image cannot be used without it".to_owned();
    let what = match error {
        OpenError::Storage(StorageError::File { step: Step::Open, source, .. })
            if source.kind() == io::ErrorKind::NotFound =>
        {
            format!("bring it back, or name another with `{}`", rebase("FORMAT"))
        }
        OpenError::Storage(StorageError::File { step: Step::Open, .. }) => {
            "this user must be able to read it".into()
        }
        OpenError::Storage(StorageError::Locked { .. }) => {
            "a backing file may be read by many, but written by nobody".into()
        }
        OpenError::Storage(StorageError::Outside { .. }) => outside_hint(purpose).unwrap_or_else(unusable),
        OpenError::NotQcow2 { foreign, .. } => foreign_hint(own, purpose, *foreign),
        OpenError::Format { source, .. } if is_bad_magic(source) && recorded => {
            format!("its overlay records that it is qcow2; if it is raw, say so with `{}`", rebase("raw"))
        }
        OpenError::Format { source, .. } if is_bad_magic(source) => {
            let option = purpose.option("backing-format").map(|option| format!(", say {option} raw"));
            let record = || format!(", record it with `{}`", rebase("raw"));
            format!("its overlay records no format; if it is raw{}", option.unwrap_or_else(record))
        }
        OpenError::DataFileMissing { image, .. } => match purpose.option("backing-data-file") {
            Some(_) => format!(
                "name the file:{}",
                ShellCommand::new("").joined("--backing-data-file=", image, "=FILE")
            ),
            None => unusable(),
        },
        OpenError::BackingFormatMissing { .. } | OpenError::DataFileOfNoLayer { .. } => {
            open_hint(own, purpose, error).unwrap_or_else(unusable)
        }
        _ => unusable(),
    };
    format!("it is in the backing chain of {}: {what}", shown(image))
}

fn is_bad_magic(error: &FormatError) -> bool {
    matches!(error.kind, FormatErrorKind::BadMagic { .. })
}

fn client_hint(error: &ClientError) -> Option<String> {
    match error {
        ClientError::Refused(failure) => failure.hint.clone(),
        ClientError::Connect(source) if source.kind() == io::ErrorKind::PermissionDenied => Some(
            "the socket is for the daemon's user: `strata serve --control-group` allows a group, too".into(),
        ),
        ClientError::Connect(_) => {
            Some("does a daemon run that was started with --control-socket and this path?".into())
        }
        ClientError::Http(_) | ClientError::Answer(_) => {
            Some("is it the control socket? --socket-path names another one, for virtual machines".into())
        }
    }
}

fn session_hint(error: &SessionError, path: &str, fd: &str) -> Option<String> {
    let hint = match error {
        SessionError::SocketInUse { .. } => format!("stop that program, or choose another {path}"),
        SessionError::NotASocket { .. } => format!("choose another {path}, or remove that file yourself"),
        SessionError::Socket { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            "this user must be able to make files in the folder".to_owned()
        }
        SessionError::InheritedFd { .. } | SessionError::NotListening => {
            let which = if fd == "--fd" { "listening or connected" } else { "listening" };
            format!("{fd} is for a parent that leaves a {which} unix socket open at that number")
        }
        _ => return None,
    };
    Some(hint)
}

#[cfg(test)]
mod tests;
