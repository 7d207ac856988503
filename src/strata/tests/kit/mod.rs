//! Images created without qemu-img, and the program as a process that is waited for.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use qcow2::{Geometry, NewImage, Version};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_strata");

/// How long a daemon may take to end.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A folder with images and a socket.
pub struct Bench {
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Bench { folder: TempDir::new().expect("a temporary folder") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("s")
    }

    /// An empty image of 1 MiB.
    pub fn image(&self, name: &str) {
        self.image_over(name, None);
    }

    /// An empty image of 1 MiB over a backing file, with or without its format.
    pub fn image_over(&self, name: &str, backing: Option<(&str, Option<&str>)>) {
        let file = backing.map(|(file, _)| file.as_bytes().to_vec());
        let format = backing.and_then(|(_, format)| format.map(str::to_owned));
        self.image_named(name, file, format);
    }

    /// As [`Bench::image_over`], with a name of any bytes.
    pub fn image_named(&self, name: &str, backing_file: Option<Vec<u8>>, backing_format: Option<String>) {
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            size: 1 << 20,
        };
        let mut image = NewImage::new(geometry);
        image.backing_file = backing_file;
        image.backing_format = backing_format;
        let pieces = image.layout().expect("a right geometry");
        let bytes: Vec<u8> = pieces.into_iter().flat_map(|(_, piece)| piece).collect();
        std::fs::write(self.path(name), bytes).expect("written");
    }

    /// `strata serve` of an image on the folder's socket.
    pub fn serve(&self, image: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--blk-file"]).arg(self.path(image)).arg("--socket-path").arg(self.socket());
        command
    }
}

/// Keeps the test's own environment from changing the output.
fn quiet(command: &mut Command) -> &mut Command {
    command.env_remove("RUST_LOG").env_remove("NO_COLOR").stdin(Stdio::null())
}

/// Runs a command to its end: exit code, output, errors.
pub fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let output = quiet(command).output().expect("the program was built");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A daemon that serves. Dropping it kills it.
pub struct Daemon {
    process: Child,
    /// None once the output is no longer read.
    errors: Option<BufReader<ChildStderr>>,
    log: String,
}

impl Daemon {
    /// Starts it, and returns once its log says that it serves.
    pub fn start(command: &mut Command) -> Self {
        let command = quiet(command);
        if !command.get_envs().any(|(name, _)| name == "NOTIFY_SOCKET") {
            command.env_remove("NOTIFY_SOCKET");
        }
        let mut process = command.stderr(Stdio::piped()).spawn().expect("the program was built");
        let errors = BufReader::new(process.stderr.take().expect("piped"));
        let mut daemon = Daemon { process, errors: Some(errors), log: String::new() };
        while !daemon.log.contains(" serving ") {
            let read = daemon.read_line();
            assert!(read > 0, "it ended before it served:\n{}", daemon.log);
        }
        daemon
    }

    /// Reads another line; returns its length in bytes, 0 at the end.
    fn read_line(&mut self) -> usize {
        self.errors.as_mut().map_or(0, |errors| errors.read_line(&mut self.log).expect("text"))
    }

    /// Waits until the log holds these words beyond what was read so far.
    pub fn wait_for(&mut self, words: &str) {
        let from = self.log.len();
        while !self.log[from..].contains(words) {
            assert!(self.read_line() > 0, "it ended before it said {words:?}:\n{}", self.log);
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The log up to the line that says it serves.
    pub fn log(&self) -> &str {
        &self.log
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("it runs");
    }

    /// Sends the signal, waits for exit code 0, and returns the whole log.
    pub fn stop_with(self, signal: Signal) -> String {
        self.signal(signal);
        self.wait()
    }

    pub fn stop(self) -> String {
        self.stop_with(Signal::TERM)
    }

    /// Stops it after its standard error has lost its reader.
    pub fn stop_unheard(mut self) {
        self.errors = None;
        self.signal(Signal::TERM);
        let ended = pidfd_open(Pid::from_child(&self.process), PidfdFlags::empty()).expect("it is ours");
        let ready = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&PATIENCE)).expect("polled");
        assert_eq!(ready, 1, "it does not end");
        assert_eq!(self.process.wait().expect("waited for").code(), Some(0));
    }

    /// Waits for its end, which must have exit code 0, and returns the whole log.
    pub fn wait(mut self) -> String {
        while self.read_line() > 0 {}
        let status = self.process.wait().expect("waited for");
        assert_eq!(status.code(), Some(0), "{}", self.log);
        std::mem::take(&mut self.log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already: a failure is ignored.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
