//! Where frontends and control clients come from: the sockets of the command line, and who may use them.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use storage::host::Owner;
use vhost_blk::{Server, Sockets};

use crate::cli::{ControlArgs, ServeArgs};
use crate::error::ProgramError;
use crate::limits::SOCKET_PATH_MAX;
use crate::notify::passed_sockets;

/// The socket file's mode if a group was given without a mode.
const GROUP_MODE: u32 = 0o660;
/// The control socket's mode without a group.
const OWNER_MODE: u32 = 0o600;

/// The requested socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket file that this program creates.
    File {
        /// Its path.
        path: PathBuf,
        /// Its permissions.
        mode: Option<u32>,
        /// Its group's number.
        group: Option<u32>,
    },
    /// An inherited descriptor.
    Descriptor(i32),
    /// The listening socket of a service manager.
    Passed,
}

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const PASSED_FIRST: i32 = 3;

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::File { path, .. } => names::shown(path).fmt(f),
            Place::Descriptor(number) => write!(f, "file descriptor {number}"),
            Place::Passed => write!(f, "the service manager's socket"),
        }
    }
}

impl Place {
    /// Chooses the socket from the options, and reports what is wrong with it before the image is touched.
    ///
    /// # Errors
    /// When a path is too long, a folder does not exist, or a group is unknown.
    pub fn choose(options: &ServeArgs) -> Result<Self, ProgramError> {
        if let Some(number) = options.fd {
            return Ok(Place::Descriptor(number));
        }
        let Some(path) = options.socket_path.clone() else {
            return match passed_sockets() {
                1 => Ok(Place::Passed),
                count => Err(ProgramError::PassedSockets { count }),
            };
        };
        let mode = options.socket_mode.or(options.socket_group.as_ref().map(|_| GROUP_MODE));
        Self::of_file(path, mode, options.socket_group.as_deref())
    }

    /// Chooses the control socket, if there is to be one. Only this user may use it, and the group that is given.
    ///
    /// # Errors
    /// As [`Place::choose`].
    pub fn of_control(options: &ControlArgs) -> Result<Option<Self>, ProgramError> {
        if let Some(number) = options.control_fd {
            return Ok(Some(Place::Descriptor(number)));
        }
        let Some(path) = options.control_socket.clone() else { return Ok(None) };
        let default_mode = if options.control_group.is_some() { GROUP_MODE } else { OWNER_MODE };
        Self::of_file(path, Some(default_mode), options.control_group.as_deref()).map(Some)
    }

    fn of_file(path: PathBuf, mode: Option<u32>, group: Option<&str>) -> Result<Self, ProgramError> {
        let length = path.as_os_str().as_bytes().len();
        if length > SOCKET_PATH_MAX {
            return Err(ProgramError::SocketPathTooLong { path, length });
        }
        check_folder(&path)?;
        let group = group.map(group_number).transpose()?;
        Ok(Place::File { path, mode, group })
    }

    /// The owner of the files that a daemon on this socket uses: the next daemon on the same socket waits for their I/O.
    /// None where the socket cannot be told apart.
    pub fn owner(&self) -> Option<Owner> {
        let name = match self {
            Place::File { path, .. } => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
                folder.join(path.file_name()?)
            }
            // The kernel's name of the socket, the same for all daemons that get it from one manager.
            Place::Descriptor(number) => std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?,
            Place::Passed => std::fs::read_link(format!("/proc/self/fd/{PASSED_FIRST}")).ok()?,
        };
        Some(Owner::of(name.as_os_str().as_bytes()))
    }

    /// Takes over the sockets that another daemon has passed; without them, as [`Place::listen`].
    ///
    /// # Errors
    /// As for [`Place::listen`].
    pub fn listen_on(&self, passed: Option<Sockets>) -> Result<Server, ProgramError> {
        match (self, passed) {
            (Place::File { path, .. }, Some(passed)) => Ok(Server::taken_over(passed, path)?),
            _ => self.listen(),
        }
    }

    /// Starts to listen, or takes over the descriptor.
    ///
    /// # Errors
    /// When another program listens on the socket already, or the host refuses.
    pub fn listen(&self) -> Result<Server, ProgramError> {
        let (path, mode, group) = match self {
            Place::Descriptor(number) => return Ok(Server::from_inherited(*number)?),
            Place::Passed => return Ok(Server::from_inherited(PASSED_FIRST)?),
            Place::File { path, mode, group } => (path, *mode, *group),
        };
        // No other user can connect before group and mode are set. No other thread creates files now.
        let narrowed = mode.map(|_| rustix::process::umask(Mode::RWXG | Mode::RWXO));
        let bound = Server::bind(path);
        if let Some(before) = narrowed {
            rustix::process::umask(before);
        }
        let server = bound?;
        let failed =
            |step| move |source: io::Error| ProgramError::SocketAccess { path: path.clone(), step, source };
        if let Some(group) = group {
            lchown(path, None, Some(group)).map_err(failed("giving it to the group"))?;
        }
        if let Some(mode) = mode {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, permissions).map_err(failed("setting its mode"))?;
        }
        Ok(server)
    }
}

fn check_folder(path: &Path) -> Result<(), ProgramError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let is_folder = std::fs::metadata(folder).and_then(|metadata| {
        if metadata.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
    });
    is_folder.map_err(|source| ProgramError::SocketFolder {
        path: path.to_owned(),
        folder: folder.to_owned(),
        source,
    })
}

/// The number of a group that is given by number or by its name in /etc/group.
fn group_number(group: &str) -> Result<u32, ProgramError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    number_in(&groups, group).ok_or_else(|| ProgramError::NoSuchGroup { group: group.to_owned() })
}

/// Lines of `name:password:number:members` (group(5)).
fn number_in(groups: &str, wanted: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let number = fields.nth(1)?;
        if name == wanted { number.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_socket_has_one_owner_however_it_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |path: PathBuf| Place::File { path, mode: None, group: None }.owner();
        let socket = folder.path().join("s");
        let owner = at(socket.clone());
        assert!(owner.is_some() && owner == at(folder.path().join("./s")));
        std::os::unix::fs::symlink(folder.path(), folder.path().join("link")).expect("a link");
        assert_eq!(owner, at(folder.path().join("link/s")));
        assert_ne!(owner, at(folder.path().join("t")));
        assert_eq!(at(folder.path().join("none/s")), None);
        let (one, other) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let of = |fd: &std::os::unix::net::UnixStream| {
            Place::Descriptor(std::os::fd::AsRawFd::as_raw_fd(fd)).owner()
        };
        assert!(of(&one).is_some() && of(&one) == of(&one.try_clone().expect("a copy")));
        assert_ne!(of(&one), of(&other));
    }

    #[test]
    fn groups_are_found_by_name() {
        let groups = "root:x:0:\n# kvm\nbroken\nkvm:x:104:alice,bob\nkvm2:x:nine:\n";
        assert_eq!(number_in(groups, "root"), Some(0));
        assert_eq!(number_in(groups, "kvm"), Some(104));
        assert_eq!(number_in(groups, "kvm2"), None);
        assert_eq!(number_in(groups, "alice"), None);
        assert_eq!(number_in(groups, ""), None);
        assert_eq!(group_number("77").ok(), Some(77));
    }
}
