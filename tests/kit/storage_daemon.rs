//! qemu-storage-daemon as a vhost-user-blk backend: the peer for tests of the kit and for comparisons with Strata.
//!
//! Owns the child process. Starting returns once the export accepts connections; dropping kills the process.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use tempfile::TempDir;

use crate::images::Format;

/// A failure to start or stop the daemon.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// An operation of the host failed.
    #[error("{step}: {source}")]
    Host {
        /// The attempted step.
        step: &'static str,
        /// The reason for the failure.
        source: std::io::Error,
    },
    /// The daemon ended before its export was ready, or ended with a failure.
    #[error("qemu-storage-daemon: {status}: {text}")]
    Ended {
        /// Its exit status.
        status: ExitStatus,
        /// Its output.
        text: String,
    },
}

fn host(step: &'static str) -> impl FnOnce(std::io::Error) -> DaemonError {
    move |source| DaemonError::Host { step, source }
}

/// The options of an export.
#[derive(Clone, Debug)]
pub struct Export {
    /// The image.
    pub image: PathBuf,
    /// Its format.
    pub format: Format,
    /// Queues to offer.
    pub queues: usize,
    /// The guest may write.
    pub writable: bool,
    /// Uses O_DIRECT and io_uring; otherwise the page cache and threads.
    pub direct: bool,
    /// Passes discards on to the file.
    pub unmap: bool,
}

impl Export {
    /// A writable, direct export with discards and one queue.
    pub fn of(image: impl Into<PathBuf>, format: Format) -> Self {
        Self { image: image.into(), format, queues: 1, writable: true, direct: true, unmap: true }
    }
}

/// A running daemon with one export.
#[derive(Debug)]
pub struct StorageDaemon {
    child: Child,
    monitor: ChildStdin,
    answers: BufReader<ChildStdout>,
    socket: PathBuf,
    _directory: TempDir,
}

impl StorageDaemon {
    /// Starts the program and waits until its export is ready.
    ///
    /// # Errors
    /// If it cannot be run, or ends before that. The error has its messages.
    pub fn start(program: &Path, export: &Export) -> Result<Self, DaemonError> {
        let directory = TempDir::new().map_err(host("temporary directory"))?;
        let socket = directory.path().join("blk.sock");
        let mut child = Command::new(program)
            .args(arguments(export, &socket))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(host("run qemu-storage-daemon"))?;
        let monitor = child.stdin.take().expect("stdin was asked for");
        let answers = BufReader::new(child.stdout.take().expect("stdout was asked for"));
        let mut daemon = Self { child, monitor, answers, socket, _directory: directory };
        // The daemon handles its options in order, and the monitor is the last. So its greeting means all is ready.
        let mut greeting = String::new();
        daemon.answers.read_line(&mut greeting).map_err(host("read the monitor's greeting"))?;
        if greeting.is_empty() { Err(daemon.ended()?) } else { Ok(daemon) }
    }

    /// The socket to connect to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process id, for measurements.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops the daemon cleanly, so that it flushes and unlocks the image.
    ///
    /// # Errors
    /// If it does not exit with success.
    pub fn stop(mut self) -> Result<(), DaemonError> {
        self.monitor
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")
            .map_err(host("write to the monitor"))?;
        // The daemon closes its output when it ends.
        let mut rest = String::new();
        self.answers.read_to_string(&mut rest).map_err(host("read from the monitor"))?;
        let status = self.child.wait().map_err(host("wait for qemu-storage-daemon"))?;
        if status.success() { Ok(()) } else { Err(self.ended()?) }
    }

    /// Kills the daemon, as a crash would.
    ///
    /// # Errors
    /// If the host cannot kill it.
    pub fn kill(mut self) -> Result<(), DaemonError> {
        self.child.kill().map_err(host("kill qemu-storage-daemon"))?;
        self.child.wait().map_err(host("wait for qemu-storage-daemon"))?;
        Ok(())
    }

    fn ended(&mut self) -> Result<DaemonError, DaemonError> {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut text).map_err(host("read qemu-storage-daemon's messages"))?;
        }
        let status = self.child.wait().map_err(host("wait for qemu-storage-daemon"))?;
        Ok(DaemonError::Ended { status, text: text.trim().to_owned() })
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // After `stop` the process has already ended, so a failure does not matter.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(export: &Export, socket: &Path) -> Vec<OsString> {
    let with_path = |before: &str, path: &Path, after: &str| {
        let mut text = OsString::from(before);
        // In QEMU's option syntax a comma ends a value unless it is doubled.
        text.push(path.to_string_lossy().replace(',', ",,"));
        text.push(after);
        text
    };
    let aio = if export.direct { ",cache.direct=on,aio=io_uring" } else { "" };
    let unmap = if export.unmap { ",discard=unmap" } else { "" };
    let read_only = if export.writable { "" } else { ",read-only=on" };
    let writable = if export.writable { "on" } else { "off" };
    vec![
        "--blockdev".into(),
        with_path("driver=file,node-name=file,filename=", &export.image, &format!("{aio}{unmap}{read_only}")),
        "--blockdev".into(),
        format!("driver={},node-name=disk,file=file{unmap}{read_only}", export.format.name()).into(),
        "--export".into(),
        with_path(
            "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=",
            socket,
            &format!(",writable={writable},num-queues={}", export.queues),
        ),
        "--chardev".into(),
        "stdio,id=monitor".into(),
        "--monitor".into(),
        "chardev=monitor".into(),
    ]
}
