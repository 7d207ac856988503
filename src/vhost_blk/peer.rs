//! The process at the other end of a socket: its name for the log, and whether it has left.

use std::fs;
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt;

/// The longest name of a program in bytes (`TASK_COMM_LEN`).
const PROGRAM_MAX: usize = 16;

/// The process that connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// None: it is in another process namespace, or the host does not report it.
    process: Option<(i32, String)>,
}

impl Peer {
    /// Reads the process from the host.
    pub fn of(socket: impl AsFd) -> Self {
        let pid = sockopt::socket_peercred(socket).map(|found| found.pid.as_raw_nonzero().get());
        Peer { process: pid.ok().filter(|pid| *pid > 0).map(|pid| (pid, program(pid))) }
    }

    /// True if both are known and the same.
    pub fn is(&self, other: &Peer) -> bool {
        matches!((&self.process, &other.process), (Some((one, _)), Some((two, _))) if one == two)
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.process {
            Some((pid, program)) if program.is_empty() => write!(f, "pid {pid}"),
            Some((pid, program)) => write!(f, "pid {pid}, {program}"),
            None => f.write_str("an unknown process"),
        }
    }
}

/// True if the process at the other end has closed its socket, or at least sends no more.
pub(crate) fn has_hung_up(socket: impl AsFd) -> bool {
    let gone = PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR;
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    let polled = rustix::event::poll(&mut fds, Some(&Timespec::default()));
    polled.is_ok() && fds[0].revents().intersects(gone)
}

/// The program's name. The process chooses it, so unusual characters are replaced.
fn program(pid: i32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    let plain = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '_' };
    name.iter().take(PROGRAM_MAX).map(plain).collect()
}
