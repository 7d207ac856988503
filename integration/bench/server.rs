//! A server under measurement: its process, from start to end.
//!
//! Owns the child process, its socket and its log. It signals the process by its id, never by name.

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use strata_integration::command;
use strata_integration::daemon::{Program, ServeSpec};
use strata_kit::{Client, Options};
use tempfile::TempDir;

use super::case::Case;

/// Timeout until a server listens.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Timeout until a server has ended: it drains and flushes.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// The longest wait for a completion, for a large flush or discard.
const REQUEST_PATIENCE: Duration = Duration::from_secs(60);
/// Default time for which a client busy-polls before it sleeps.
pub const CLIENT_POLLS: Duration = Duration::from_micros(50);
/// Ring entries per queue, as is common in Linux guests.
const RING: u16 = 256;

/// A running server, which is killed on drop.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pidfd: OwnedFd,
    folder: TempDir,
    /// True if it stops on SIGTERM with exit code 0; otherwise it is killed with SIGKILL.
    orderly: bool,
    /// How long its clients busy-poll before they sleep.
    client_polls: Duration,
}

impl Server {
    /// Serves an image with the case's number of queues.
    pub fn of_image(program: &Program, image: &Path, case: &Case) -> Result<Self> {
        let queues = u16::try_from(case.queues).context("a number of queues")?;
        Self::start(true, |socket| {
            program.command(&ServeSpec {
                image: image.to_owned(),
                format: "qcow2".to_owned(),
                socket: socket.to_owned(),
                queues,
                serial: "bench".to_owned(),
                io_thread: true,
            })
        })
    }

    /// Serves the null device with this program itself.
    pub fn of_null(bytes: u64, case: &Case) -> Result<Self> {
        let program = std::env::current_exe().context("this program's path")?;
        Self::start(false, |socket| {
            let mut command = Command::new(program);
            command.arg("null-device").arg(socket);
            command.args([case.queues.to_string(), bytes.to_string()]);
            command
        })
    }

    /// Serves a raw file with the stock rust-vmm backend in this program itself.
    pub fn of_stock(file: &Path, case: &Case) -> Result<Self> {
        let program = std::env::current_exe().context("this program's path")?;
        Self::start(false, |socket| {
            let mut command = Command::new(program);
            command.arg("stock-backend").args([socket, file]).arg(case.queues.to_string());
            command
        })
    }

    fn start(orderly: bool, command_for: impl FnOnce(&Path) -> Command) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for a socket")?;
        let mut command = dies_with_us(&command_for(&socket_in(&folder)));
        let log = File::create(log_in(&folder))?;
        command.env("RUST_LOG", "info").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", command::shown(&command)))?;
        let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // There is no Server yet, whose drop would kill the process.
                child.kill()?;
                child.wait()?;
                return Err(error).context("pidfd_open");
            }
        };
        let mut server = Self { child, pidfd, folder, orderly, client_polls: CLIENT_POLLS };
        server.await_listening()?;
        Ok(server)
    }

    fn await_listening(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_PATIENCE;
        while !is_listening(&socket_in(&self.folder))? {
            self.pause(Duration::from_millis(2)).context("the server ended before it listened")?;
            if Instant::now() > deadline {
                bail!("the server did not listen within {START_PATIENCE:?}{}", self.log_tail());
            }
        }
        Ok(())
    }

    /// Sets how long clients busy-poll before they sleep, from the next connection on.
    pub fn set_client_polls(&mut self, time: Duration) {
        self.client_polls = time;
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects with a case's queues, depth and buffers.
    pub fn connect(&self, case: &Case) -> Result<Client> {
        self.connect_with(case.queues, case.depth, case.block())
    }

    /// Connects with `queues` queues of `depth` requests in flight with `buffer` bytes each.
    pub fn connect_with(&self, queues: usize, depth: usize, block: u32) -> Result<Client> {
        let options = Options {
            queue_size: RING,
            data_capacity: block as usize,
            slots_max: u16::try_from(depth).context("a depth")?,
            timeout: REQUEST_PATIENCE,
            spin_max: self.client_polls,
            ..Options::with_queues(queues)
        };
        Client::connect(socket_in(&self.folder), &options)
            .with_context(|| format!("cannot connect{}", self.log_tail()))
    }

    /// Waits; an error if the server ends meanwhile.
    pub fn pause(&mut self, time: Duration) -> Result<()> {
        match self.wait(time)? {
            None => Ok(()),
            Some(status) => bail!("the server ended with {status}{}", self.log_tail()),
        }
    }

    /// Stops the server with SIGTERM, so that its image is complete.
    pub fn stop(mut self) -> Result<()> {
        if !self.orderly {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        match self.wait(STOP_PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the server ended with {status} on SIGTERM{}", self.log_tail()),
            None => bail!("the server did not end within {STOP_PATIENCE:?} of SIGTERM{}", self.log_tail()),
        }
    }

    /// Lines of its log with errors or panics.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.log();
        let bad = |line: &&str| line.contains(" ERROR ") || line.contains("panicked");
        log.lines().filter(bad).take(3).map(str::to_owned).collect()
    }

    fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        let timeout = time.try_into().context("a time that poll can count")?;
        let ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout))?;
        if ended == 0 { Ok(None) } else { Ok(Some(self.child.wait()?)) }
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(log_in(&self.folder)).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self) -> String {
        format!("; the end of its log:\n{}", command::tail(&self.log(), 12))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended already, and a drop cannot return an error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Wraps a command with `setpriv`, so that the kernel kills the server if this program is killed. `setpriv` executes
/// the server in its own process, so the process id is the server's. Without `setpriv` the command is unchanged.
fn dies_with_us(command: &Command) -> Command {
    let Some(setpriv) = command::find("setpriv") else {
        let mut plain = Command::new(command.get_program());
        plain.args(command.get_args());
        return plain;
    };
    let mut wrapped = Command::new(setpriv);
    wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    wrapped
}

fn socket_in(folder: &TempDir) -> PathBuf {
    folder.path().join("blk.sock")
}

fn log_in(folder: &TempDir) -> PathBuf {
    folder.path().join("log")
}

/// True if a process listens at the path, by the kernel's table: a connection would already start a session. Columns:
/// number, references, protocol, flags (0x10000 if it accepts connections), type, state, inode, path.
fn is_listening(path: &Path) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/net/unix").context("/proc/net/unix")?;
    let path = path.to_string_lossy();
    Ok(table.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some("00010000") && columns.nth(3) == Some(&*path)
    }))
}
