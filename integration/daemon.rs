//! A block daemon as a process: Strata, or QEMU's storage daemon for comparison.
//!
//! Owns building or finding the program, its command line, waiting for its socket, its log and its end. It never reads
//! an image and does not use vhost-user.

use crate::command;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, kill_process, pidfd_open, prlimit};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The daemons that can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `strata serve`
    Strata,
    /// `qemu-storage-daemon` with a vhost-user-blk export
    QemuStorageDaemon,
}

impl FromStr for Backend {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "strata" => Ok(Self::Strata),
            "qemu-storage-daemon" => Ok(Self::QemuStorageDaemon),
            other => bail!("unknown backend {other}: use strata or qemu-storage-daemon"),
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Strata => "strata",
            Self::QemuStorageDaemon => "qemu-storage-daemon",
        })
    }
}

impl Backend {
    /// The backend that `STRATA_TEST_BACKEND` names, by default Strata.
    pub fn from_environment() -> Result<Self> {
        std::env::var("STRATA_TEST_BACKEND").map_or(Ok(Self::Strata), |name| name.parse())
    }

    /// True if the daemon's VIRTIO_BLK_F_CONFIG_WCE must be hidden from the guest. QEMU's export (at least 10.0) offers
    /// that switch between writeback and writethrough, leaves it on writethrough, but uses writeback. A Linux guest
    /// then never flushes, and a killed daemon loses synced data. Without the switch the guest follows
    /// VIRTIO_BLK_F_FLUSH, and flushes.
    pub fn offers_a_wrong_cache_switch(self) -> bool {
        self == Self::QemuStorageDaemon
    }

    /// The program; Strata is built first.
    pub fn program(self, profile: Profile) -> Result<Program> {
        let path = match self {
            Self::Strata => build_strata(profile)?,
            Self::QemuStorageDaemon => command::find("qemu-storage-daemon")
                .context("qemu-storage-daemon is not installed (Debian: qemu-utils or qemu-system-common)")?,
        };
        Ok(Program { backend: self, path })
    }
}

/// The build profile of Strata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For tests: some optimisation, all checks.
    Dev,
    /// The release build, as users run it.
    Release,
}

/// Strata's program for everything but measurements: one that is built already, else a build for tests.
pub fn strata() -> Result<PathBuf> {
    BUILT.get().map_or_else(|| build_strata(Profile::Dev), |path| Ok(path.clone()))
}

/// The first program that is built already.
static BUILT: OnceLock<PathBuf> = OnceLock::new();

fn build_strata(profile: Profile) -> Result<PathBuf> {
    let path = ask_cargo(profile)?;
    BUILT.get_or_init(|| path.clone());
    Ok(path)
}

/// Builds Strata with cargo, which is quick if nothing changed and names the program. `STRATA_BIN` overrides it.
fn ask_cargo(profile: Profile) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("STRATA_BIN") {
        return Ok(PathBuf::from(path));
    }
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--quiet", "--package", "strata", "--bin", "strata"]);
    cargo.arg("--message-format=json-render-diagnostics").current_dir(workspace());
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    let messages = command::output(&mut cargo)?;
    command::built_program(&messages, "bin", "strata").context("cargo built strata but named no executable")
}

/// The root of the repository that this crate was built from.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A daemon's executable.
#[derive(Clone, Debug)]
pub struct Program {
    /// The daemon.
    pub backend: Backend,
    /// The path of its executable.
    pub path: PathBuf,
}

/// The image to serve and the options.
#[derive(Clone, Debug)]
pub struct ServeSpec {
    /// The image.
    pub image: PathBuf,
    /// Its format, `qcow2` or `raw`.
    pub format: String,
    /// The path of the socket.
    pub socket: PathBuf,
    /// Number of queues on offer.
    pub queues: u16,
    /// The disk's serial number for the guest; QEMU's daemon sets its own.
    pub serial: String,
    /// QEMU's daemon only: give the export an I/O thread, for speed. Version 7.2 with an I/O thread can hang on SIGTERM
    /// (seen once: its threads wait for each other), so tests run without it.
    pub io_thread: bool,
}

impl Program {
    /// The command line that serves `spec`. The demo prints it too.
    pub fn command(&self, spec: &ServeSpec) -> Command {
        let mut command = Command::new(&self.path);
        match self.backend {
            Backend::Strata => {
                command
                    .arg("serve")
                    .arg("--blk-file")
                    .arg(&spec.image)
                    .arg("--socket-path")
                    .arg(&spec.socket);
                command.args(["--format", &spec.format, "--serial", &spec.serial]);
                command.args(["--num-queues", &spec.queues.to_string()]);
            }
            Backend::QemuStorageDaemon => {
                let file = serde_json::json!({
                    "driver": "file", "node-name": "file", "filename": spec.image, "aio": "io_uring",
                    "cache": {"direct": true}, "discard": "unmap",
                });
                // The backing files take their cache mode from here and not from the file's node. Only the top
                // image bypasses the page cache, as with Strata's defaults.
                let disk = serde_json::json!({
                    "driver": spec.format, "node-name": "disk", "file": "file", "discard": "unmap",
                });
                let mut export = serde_json::json!({
                    "type": "vhost-user-blk", "id": "export", "node-name": "disk", "writable": true,
                    "num-queues": spec.queues, "addr": {"type": "unix", "path": spec.socket},
                });
                if spec.io_thread {
                    command.args(["--object", "iothread,id=worker"]);
                    export["iothread"] = "worker".into();
                }
                command.args(["--blockdev", &file.to_string(), "--blockdev", &disk.to_string()]);
                command.args(["--export", &export.to_string()]);
            }
        }
        command
    }
}

/// A listening daemon, which is killed on drop.
pub struct Daemon {
    process: Child,
    log: PathBuf,
    /// Where its own part of the log begins: before it others may have used the same.
    log_start: usize,
    program: String,
}

/// Timeout until a daemon listens: it may wait some seconds for the image lock of a killed daemon.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Timeout until a daemon has ended: its shutdown drains and flushes.
const STOP_PATIENCE: Duration = Duration::from_secs(40);
/// Interval between two checks for the socket; the end of the daemon is noticed at once.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

impl Daemon {
    /// Starts `program` on `spec` and returns when it listens. Its output is appended to `log`.
    pub fn start(program: &Program, spec: &ServeSpec, log: &Path) -> Result<Self> {
        Self::start_with(program, spec, &[], log)
    }

    /// As [`Daemon::start`], with additional options on the command line.
    pub fn start_with(program: &Program, spec: &ServeSpec, more: &[&str], log: &Path) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        let log_start = output.metadata()?.len() as usize;
        let mut command = program.command(spec);
        command.args(more);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let process =
            command.spawn().with_context(|| format!("cannot start {}", command::shown(&command)))?;
        let mut daemon = Self { process, log: log.to_owned(), log_start, program: command::shown(&command) };
        daemon.wait_until_listening(&spec.socket)?;
        Ok(daemon)
    }

    fn wait_until_listening(&mut self, socket: &Path) -> Result<()> {
        let deadline = Instant::now() + START_PATIENCE;
        while !is_listening(socket)? {
            if let Some(status) = self.wait(LOOK_AGAIN)? {
                bail!("{} ended with {status} before it listened\n{}", self.program, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{} did not listen within {START_PATIENCE:?}\n{}", self.program, self.log_tail());
            }
        }
        Ok(())
    }

    /// Stops the daemon with SIGTERM; anything but exit code 0 within the timeout is an error.
    pub fn stop(mut self) -> Result<()> {
        kill_process(self.pid(), Signal::TERM)?;
        match self.wait(STOP_PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended with {status} on SIGTERM\n{}", self.program, self.log_tail()),
            None => {
                bail!("{} did not end within {STOP_PATIENCE:?} of SIGTERM\n{}", self.program, self.log_tail())
            }
        }
    }

    /// True if the daemon has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.process.try_wait()?.is_some())
    }

    /// Waits for the end of a daemon that another one replaces; anything but exit code 0 within the timeout is an error.
    pub fn expect_end(mut self) -> Result<()> {
        match self.wait(STOP_PATIENCE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => {
                bail!("{} ended with {status} when it was replaced\n{}", self.program, self.log_tail())
            }
            None => bail!("{} did not end when it was replaced\n{}", self.program, self.log_tail()),
        }
    }

    /// Sends SIGKILL: data that the daemon had not written is lost.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Sends SIGHUP: the daemon resizes its disk.
    pub fn hang_up(&self) -> Result<()> {
        Ok(kill_process(self.pid(), Signal::HUP)?)
    }

    /// Limits the daemon's file sizes from now on: it cannot write past `bytes` of any file. `None` removes the limit.
    pub fn limit_file_sizes(&self, bytes: Option<u64>) -> Result<()> {
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(self.pid()), Resource::Fsize, limit).context("prlimit")?;
        Ok(())
    }

    /// Waits at most `patience` until it has said something.
    pub fn wait_for_log(&self, text: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let log = std::fs::read(&self.log)?;
            if String::from_utf8_lossy(&log[self.log_start..]).contains(text) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} does not say \"{text}\" after {patience:?}\n{}", self.program, self.log_tail());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        format!("--- log of the daemon ---\n{}", command::tail(&String::from_utf8_lossy(&bytes), 30))
    }

    /// Waits at most `patience` for the daemon's end.
    fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        if let Some(status) = self.process.try_wait()? {
            return Ok(Some(status));
        }
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).context("pidfd_open")?;
        let timeout = patience.try_into().context("a patience that poll can count")?;
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))?;
        if ended == 0 { Ok(None) } else { Ok(Some(self.process.wait()?)) }
    }

    /// The process id. The process is our child and not yet waited for, so no other process can have this id.
    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The process may have ended already, and a drop cannot return an error.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// True if a process listens at `path`, by the kernel's table: a connection would already start a session.
fn is_listening(path: &Path) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/net/unix").context("/proc/net/unix")?;
    Ok(listens(&table, &path.display().to_string()))
}

/// Columns: number, references, protocol, flags, type, state, inode, path. Flag 0x10000 is "accepts connections".
fn listens(table: &str, path: &str) -> bool {
    table.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(3) == Some("00010000") && columns.nth(3) == Some(path)
    })
}

/// The totals that a daemon logged at its end, by name; empty if it logs none.
///
/// A line of totals has the word `totals`, then `name=number` pairs as `tracing` writes them.
pub fn totals(log: &str) -> BTreeMap<String, u64> {
    let Some(line) = log.lines().rev().find(|line| line.contains("totals")) else { return BTreeMap::new() };
    let line = without_colours(line);
    let pairs = line.split_whitespace().filter_map(|word| word.split_once('='));
    pairs.filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?))).collect()
}

/// The numbers of a field in all lines of a log.
pub fn numbers(log: &str, field: &str) -> Vec<u64> {
    let wanted = format!("{field}=");
    let plain = without_colours(log);
    plain.split_whitespace().filter_map(|word| word.strip_prefix(&wanted)?.parse().ok()).collect()
}

fn without_colours(line: &str) -> String {
    let mut plain = String::new();
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == '\x1b' {
            // An escape sequence: ESC [ numbers letter.
            characters.by_ref().find(char::is_ascii_alphabetic);
        } else {
            plain.push(character);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_parsed() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
                     0000: 00000002 00000000 00010000 0001 01 1234 /run/a.sock\n\
                     0000: 00000003 00000000 00000000 0001 03 1235 /run/b.sock\n";
        assert!(listens(table, "/run/a.sock"));
        assert!(!listens(table, "/run/b.sock"));
        assert!(!listens(table, "/run/c.sock"));
    }

    #[test]
    fn a_listening_socket_is_found() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("s");
        assert!(!is_listening(&path).expect("the table"));
        let _listener = std::os::unix::net::UnixListener::bind(&path).expect("bound");
        assert!(is_listening(&path).expect("the table"));
    }

    #[test]
    fn totals_are_read_from_the_last_line_of_totals() {
        let log =
            "INFO totals reads=1\nINFO \x1b[2mtotals\x1b[0m \x1b[3mreads\x1b[0m=7 writes=9 image=a\nbye\n";
        let found = totals(log);
        assert_eq!(found.get("reads"), Some(&7));
        assert_eq!(found.get("writes"), Some(&9));
        assert_eq!(found.len(), 2);
        assert!(totals("nothing here").is_empty());
    }

    #[test]
    fn numbers_are_read_from_every_line() {
        let log = "INFO started queue=0 in_flight=3\nWARN in_flight is odd\nINFO \x1b[3min_flight\x1b[0m\x1b[2m=\x1b[0m12 x=1";
        assert_eq!(numbers(log, "in_flight"), [3, 12]);
    }

    #[test]
    fn a_program_that_ends_at_once_is_an_error_with_its_log() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = Program { backend: Backend::Strata, path: PathBuf::from("false") };
        let spec = ServeSpec {
            image: folder.path().join("i"),
            format: "raw".to_owned(),
            socket: folder.path().join("s"),
            queues: 1,
            serial: "x".to_owned(),
            io_thread: false,
        };
        let error =
            Daemon::start(&program, &spec, &folder.path().join("log")).err().expect("it cannot listen");
        assert!(error.to_string().contains("before it listened"), "{error}");
    }
}
