//! QEMU's image tools as a second opinion: they make, check and read images.
//!
//! Everything runs `qemu-img` and `qemu-io` as child processes. Formats are always named, never probed. Without the
//! tools, tests are skipped visibly ([`Qemu::find`]).

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

/// A folder in memory, where the host has it: for images whose file system does not matter to the test. Tools and disks sync
/// an image often, and a file system on a disk makes each wait.
///
/// # Errors
/// If no folder can be made.
pub fn memory_folder() -> std::io::Result<TempDir> {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new())
}

/// The failure of a tool.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The program could not be run.
    #[error("run {program}: {source}")]
    Run {
        /// The program.
        program: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The program failed.
    #[error("{command}: {text}")]
    Failed {
        /// The whole command line.
        command: String,
        /// Its output.
        text: String,
    },
    /// The program's JSON has an unexpected form.
    #[error("{command}: unexpected output: {text}")]
    Output {
        /// The whole command line.
        command: String,
        /// Its output.
        text: String,
    },
    /// I/O on a temporary file failed.
    #[error("temporary file: {0}")]
    Temporary(std::io::Error),
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Raw bytes.
    Raw,
    /// qcow2, either version.
    Qcow2,
}

impl Format {
    /// QEMU's name of the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// The space that is allocated when an image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Only the minimum of metadata.
    Off,
    /// Every guest cluster has a host cluster, without space on the host.
    Metadata,
    /// The host's space is reserved, too.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Preallocation {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// An operation of qemu-io on a new image. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Write `length` times the same byte.
    Pattern {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The value of each byte.
        byte: u8,
    },
    /// As `Pattern`, compressed. Only whole clusters.
    Compressed {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// The value of each byte.
        byte: u8,
    },
    /// Write zeroes. With `unmap` the clusters may be freed.
    Zeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Give the space back.
        unmap: bool,
    },
    /// Discard.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
}

impl Content {
    fn command(self) -> String {
        match self {
            Self::Pattern { offset, length, byte } => format!("write -P {byte} {offset} {length}"),
            Self::Compressed { offset, length, byte } => format!("write -c -P {byte} {offset} {length}"),
            Self::Zeroes { offset, length, unmap: false } => format!("write -z {offset} {length}"),
            Self::Zeroes { offset, length, unmap: true } => format!("write -z -u {offset} {length}"),
            Self::Discard { offset, length } => format!("discard {offset} {length}"),
        }
    }
}

/// An image to be made.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// Its format.
    pub format: Format,
    /// Virtual size in bytes. None takes the size of the backing file.
    pub size: Option<u64>,
    /// qcow2 version, 2 or 3.
    pub version: u8,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Width of a refcount in bits. Version 2 supports only 16.
    pub refcount_bits: u8,
    /// Extended L2 entries, with subclusters.
    pub extended_l2: bool,
    /// Compressed clusters use zstd; otherwise deflate.
    pub zstd: bool,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// The absolute path of the external data file made with the image, and whether it is also a raw image.
    pub data_file: Option<(PathBuf, bool)>,
    /// The space that is allocated at creation.
    pub preallocation: Preallocation,
    /// The backing file, with its name in the header (relative to the image), and its format.
    pub backing: Option<(PathBuf, Format)>,
    /// The contents that are written after creation, in order.
    pub contents: Vec<Content>,
}

impl ImageSpec {
    /// An empty qcow2 image of version 3 with 64 KiB clusters. `size` is in bytes.
    pub fn qcow2(size: u64) -> Self {
        Self {
            format: Format::Qcow2,
            size: Some(size),
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            zstd: false,
            lazy_refcounts: false,
            data_file: None,
            preallocation: Preallocation::Off,
            backing: None,
            contents: Vec::new(),
        }
    }

    /// A sparse raw image. `size` is in bytes.
    pub fn raw(size: u64) -> Self {
        Self { format: Format::Raw, ..Self::qcow2(size) }
    }

    /// Sets the version, 2 or 3.
    #[must_use]
    pub fn version(mut self, version: u8) -> Self {
        self.version = version;
        self
    }

    /// Sets the cluster size in bytes.
    #[must_use]
    pub fn cluster_size(mut self, cluster_size: u64) -> Self {
        self.cluster_size = cluster_size;
        self
    }

    /// Gives it extended L2 entries, with subclusters.
    #[must_use]
    pub fn extended(mut self) -> Self {
        self.extended_l2 = true;
        self
    }

    /// Compresses with zstd.
    #[must_use]
    pub fn zstd(mut self) -> Self {
        self.zstd = true;
        self
    }

    /// Sets the space that is allocated at creation.
    #[must_use]
    pub fn preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }

    /// Sets the backing file.
    #[must_use]
    pub fn backing(mut self, path: impl Into<PathBuf>, format: Format) -> Self {
        self.backing = Some((path.into(), format));
        self
    }

    /// Adds contents to be written.
    #[must_use]
    pub fn with(mut self, content: Content) -> Self {
        self.contents.push(content);
        self
    }

    /// Bytes of the smallest allocation: a subcluster or a cluster.
    pub fn granule_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size / 32 } else { self.cluster_size }
    }

    fn options(&self) -> String {
        if self.format == Format::Raw {
            return format!("preallocation={}", self.preallocation.name());
        }
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!(
            "compat={compat},cluster_size={},preallocation={}",
            self.cluster_size,
            self.preallocation.name()
        );
        if self.version != 2 {
            options += &format!(",refcount_bits={}", self.refcount_bits);
        }
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        if self.zstd {
            options += ",compression_type=zstd";
        }
        if self.lazy_refcounts {
            options += ",lazy_refcounts=on";
        }
        if let Some((path, is_raw)) = &self.data_file {
            let raw = if *is_raw { "on" } else { "off" };
            options += &format!(",data_file={},data_file_raw={raw}", path.display());
        }
        options
    }
}

/// The result of `qemu-img check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// No errors.
    Clean,
    /// This many clusters are allocated but not used. No data is at risk.
    Leaks(u64),
    /// Errors, as qemu-img prints them.
    Corrupt(String),
}

/// One extent of `qemu-img map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The layer that holds it. The top layer is 0.
    pub depth: u64,
    /// True if it certainly reads as zero.
    pub zero: bool,
    /// True if data is allocated for it.
    pub data: bool,
    /// The offset in its file, if it is stored there uncompressed.
    pub offset: Option<u64>,
}

/// The paths of the tools.
#[derive(Clone, Debug)]
pub struct Qemu {
    img: PathBuf,
    io: PathBuf,
}

/// Reports a skipped test directly to stderr: the test harness discards the output of a passing test.
///
/// # Panics
/// If STRATA_REQUIRE_TOOLS=1 forbids skipping.
pub fn skip(reason: &str) {
    let required = std::env::var_os("STRATA_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "STRATA_REQUIRE_TOOLS=1, but {reason}");
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("?");
    // A failed write to stderr cannot be reported.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
}

/// Finds a program in PATH, or skips the test visibly.
///
/// # Panics
/// If it is missing and STRATA_REQUIRE_TOOLS=1.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

impl Qemu {
    /// Finds `qemu-img` and `qemu-io`, or skips the test visibly: the caller then returns.
    ///
    /// # Panics
    /// If one is missing and STRATA_REQUIRE_TOOLS=1.
    pub fn find() -> Option<Self> {
        Some(Self { img: find_tool("qemu-img")?, io: find_tool("qemu-io")? })
    }

    /// Makes an image and writes its contents.
    ///
    /// # Errors
    /// If a tool fails.
    pub fn create(&self, path: &Path, spec: &ImageSpec) -> Result<(), ImageError> {
        let mut command = Command::new(&self.img);
        command.args(["create", "-q", "-f", spec.format.name(), "-o", &spec.options()]);
        if let Some((backing, format)) = &spec.backing {
            command.arg("-b").arg(backing).args(["-F", format.name()]);
        }
        command.arg(path).args(spec.size.map(|size| size.to_string()));
        run(&mut command)?;
        self.write(path, spec.format, &spec.contents)
    }

    /// Makes a chain in a folder. The first spec is the base, and each image is backed by the one before. Returns the
    /// paths in the same order.
    ///
    /// # Errors
    /// If a tool fails.
    pub fn create_chain(&self, folder: &Path, specs: &[ImageSpec]) -> Result<Vec<PathBuf>, ImageError> {
        let mut made: Vec<PathBuf> = Vec::with_capacity(specs.len());
        let mut below = None;
        for (index, spec) in specs.iter().enumerate() {
            let name = format!("layer{index}.{}", spec.format.name());
            let mut spec = spec.clone();
            spec.backing = below.take().or(spec.backing);
            let path = folder.join(&name);
            self.create(&path, &spec)?;
            below = Some((PathBuf::from(name), spec.format));
            made.push(path);
        }
        Ok(made)
    }

    /// Writes contents to an image with qemu-io.
    ///
    /// # Errors
    /// If the tool fails, or reports a failed command.
    pub fn write(&self, path: &Path, format: Format, contents: &[Content]) -> Result<(), ImageError> {
        let commands: Vec<String> = contents.iter().map(|content| content.command()).collect();
        self.io(path, format, &commands)
    }

    /// Runs commands in qemu-io, one after the other.
    ///
    /// Compressed writes come first in each process. QEMU 10.0 remembers where the last compressed write ended, and
    /// puts the next one there, even if that cluster has been freed and reused since. Data written then is sometimes
    /// lost.
    ///
    /// # Errors
    /// If the tool fails, or reports a failed command.
    pub fn io(&self, path: &Path, format: Format, commands: &[String]) -> Result<(), ImageError> {
        let is_compressed = |command: &String| command.starts_with("write -c");
        for batch in commands.chunk_by(|before, after| is_compressed(before) || !is_compressed(after)) {
            let mut command = Command::new(&self.io);
            command.args(["-f", format.name(), "--discard=unmap"]);
            for text in batch {
                command.args(["-c", text]);
            }
            let output = run(command.arg(path))?;
            // qemu-io reports some failures only in its output.
            let text = String::from_utf8_lossy(&output.stdout);
            if text.contains("failed") || text.contains("Error") || text.contains("error") {
                return Err(ImageError::Failed { command: line(&command), text: text.into_owned() });
            }
        }
        Ok(())
    }

    /// Checks a qcow2 image with `qemu-img check`.
    ///
    /// # Errors
    /// If the check fails to run.
    pub fn check(&self, path: &Path) -> Result<Check, ImageError> {
        let mut command = Command::new(&self.img);
        command.args(["check", "--output=json", "-f", "qcow2"]).arg(path);
        let output = start(&mut command)?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let messages = String::from_utf8_lossy(&output.stderr);
        // 0: clean, 2: corrupt, 3: only leaks. Every other code means that nothing was checked.
        match output.status.code() {
            Some(0) => Ok(Check::Clean),
            Some(2) => Ok(Check::Corrupt(format!("{}\n{}", messages.trim(), stdout.trim()))),
            Some(3) => {
                let report: Option<Value> = serde_json::from_str(&stdout).ok();
                let leaks = report.as_ref().and_then(|report| report.get("leaks")).and_then(Value::as_u64);
                leaks.map(Check::Leaks).ok_or_else(|| unexpected(&command, &stdout))
            }
            _ => Err(ImageError::Failed { command: line(&command), text: messages.trim().to_owned() }),
        }
    }

    /// Reads a whole image, through its chain, as the guest would. The image must not be in use.
    ///
    /// # Errors
    /// If the tool fails, for example because another process has the image open for writing.
    pub fn read_all(&self, path: &Path, format: Format) -> Result<Vec<u8>, ImageError> {
        self.convert(path, format, &[])
    }

    /// As [`Qemu::read_all`], without locks: the image may be in use. Data that its writer has not flushed is missing.
    ///
    /// # Errors
    /// If the tool fails.
    pub fn read_all_shared(&self, path: &Path, format: Format) -> Result<Vec<u8>, ImageError> {
        self.convert(path, format, &["-U"])
    }

    fn convert(&self, path: &Path, format: Format, flags: &[&str]) -> Result<Vec<u8>, ImageError> {
        let target = NamedTempFile::new().map_err(ImageError::Temporary)?;
        let mut command = Command::new(&self.img);
        command.arg("convert").args(flags).args(["-f", format.name(), "-O", "raw"]);
        run(command.arg(path).arg(target.path()))?;
        std::fs::read(target.path()).map_err(ImageError::Temporary)
    }

    /// Returns the extents of an image (`qemu-img map`).
    ///
    /// # Errors
    /// If the tool fails, or its output cannot be parsed.
    pub fn map(&self, path: &Path, format: Format) -> Result<Vec<Extent>, ImageError> {
        let mut command = Command::new(&self.img);
        command.args(["map", "--output=json", "-f", format.name()]).arg(path);
        let value = run_json(&mut command)?;
        let extents = value.as_array().map(|list| list.iter().map(extent).collect::<Option<Vec<_>>>());
        extents.flatten().ok_or_else(|| unexpected(&command, &value.to_string()))
    }

    /// The JSON output of `qemu-img info`.
    ///
    /// # Errors
    /// If the tool fails, or its output cannot be parsed.
    pub fn info(&self, path: &Path, format: Format) -> Result<Value, ImageError> {
        run_json(Command::new(&self.img).args(["info", "--output=json", "-f", format.name()]).arg(path))
    }

    /// Runs `qemu-img` with any arguments.
    ///
    /// # Errors
    /// If it fails.
    pub fn img(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String, ImageError> {
        let output = run(Command::new(&self.img).args(arguments))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn extent(value: &Value) -> Option<Extent> {
    let number = |name: &str| value.get(name).and_then(Value::as_u64);
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    Some(Extent {
        start: number("start")?,
        length: number("length")?,
        depth: number("depth")?,
        zero: flag("zero")?,
        data: flag("data")?,
        offset: number("offset"),
    })
}

fn line(command: &Command) -> String {
    let mut text = OsString::from(command.get_program());
    for argument in command.get_args() {
        text.push(" ");
        text.push(argument);
    }
    text.to_string_lossy().into_owned()
}

fn unexpected(command: &Command, text: &str) -> ImageError {
    ImageError::Output { command: line(command), text: text.to_owned() }
}

fn start(command: &mut Command) -> Result<Output, ImageError> {
    command.output().map_err(|source| ImageError::Run { program: command.get_program().into(), source })
}

fn run(command: &mut Command) -> Result<Output, ImageError> {
    let output = start(command)?;
    if output.status.success() {
        return Ok(output);
    }
    let [said, complained] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    Err(ImageError::Failed { command: line(command), text: format!("{} {}", said.trim(), complained.trim()) })
}

fn run_json(command: &mut Command) -> Result<Value, ImageError> {
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(&text).map_err(|_| unexpected(command, &text))
}
