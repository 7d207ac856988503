//! A server under measurement: its process, from listening to its end.
//!
//! Owns the child, its socket and its log. It is told to end by its process id and never by name.

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
use strata_tests::{Client, Options};
use tempfile::TempDir;

use super::case::Case;

/// How long a server may take to listen.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to end: it drains and flushes.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// The longest wait for a completion, when a flush or a discard has much to do.
const REQUEST_PATIENCE: Duration = Duration::from_secs(60);
/// How long a client polls before it sleeps, where nobody says anything else.
pub const CLIENT_POLLS: Duration = Duration::from_micros(50);
/// Ring entries of each queue, as Linux guests commonly have.
const RING: u16 = 256;

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pidfd: OwnedFd,
    folder: TempDir,
    /// It ends by SIGTERM with exit code 0; else by SIGKILL.
    orderly: bool,
    /// The longest polling of its clients.
    client_polls: Duration,
}

impl Server {
    /// Serves an image with as many queues as the case has.
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

    /// Serves the null device of this very program.
    pub fn of_null(bytes: u64, case: &Case) -> Result<Self> {
        let program = std::env::current_exe().context("this program's path")?;
        Self::start(false, |socket| {
            let mut command = Command::new(program);
            command.arg("null-device").arg(socket);
            command.args([case.queues.to_string(), bytes.to_string()]);
            command
        })
    }

    /// Serves a raw file by the stock rust-vmm backend of this very program.
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
                // Not yet a Server, whose drop would do this.
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
            self.pause(Duration::from_millis(2)).context("it ended before it listened")?;
            if Instant::now() > deadline {
                bail!("it does not listen after {START_PATIENCE:?}{}", self.log_tail());
            }
        }
        Ok(())
    }

    /// Lets clients poll for at most so long before they sleep, from the next one on.
    pub fn set_client_polls(&mut self, time: Duration) {
        self.client_polls = time;
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects with the queues, the depth and the buffers of a case.
    pub fn connect(&self, case: &Case) -> Result<Client> {
        self.connect_with(case.queues, case.depth, case.block())
    }

    /// Connects with so many queues of so many requests in flight, of so many bytes.
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
            .with_context(|| format!("connecting failed{}", self.log_tail()))
    }

    /// Lets time pass; an error if the server ends meanwhile.
    pub fn pause(&mut self, time: Duration) -> Result<()> {
        match self.wait(time)? {
            None => Ok(()),
            Some(status) => bail!("the server ended with {status}{}", self.log_tail()),
        }
    }

    /// Ends it in good order, so that its image is complete.
    pub fn stop(mut self) -> Result<()> {
        if !self.orderly {
            return Ok(());
        }
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        match self.wait(STOP_PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("it ended with {status} on SIGTERM{}", self.log_tail()),
            None => bail!("it still runs {STOP_PATIENCE:?} after SIGTERM{}", self.log_tail()),
        }
    }

    /// Lines of its log that tell of trouble.
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
        format!("; its last words:\n{}", command::tail(&self.log(), 12))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After an orderly end there is nothing to kill, and nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same command, but a run that is killed leaves no server behind. `setpriv` becomes the program that it starts, so
/// the process id is the server's; where it is not installed, the command stays as it is.
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

/// Whether somebody listens there: asked of the kernel, as connecting would already be a session. Columns: number,
/// references, protocol, flags (0x10000 for one that accepts), type, state, inode, path.
fn is_listening(path: &Path) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/net/unix").context("/proc/net/unix")?;
    let path = path.to_string_lossy();
    Ok(table.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some("00010000") && columns.nth(3) == Some(&*path)
    }))
}
