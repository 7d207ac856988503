//! The command line: commands, options, and wrong usage (exit code 2).
//!
//! Owns the spelling of every option and the checks that need only the option's text. The commands own the meaning
//! of the options.

mod control;
mod lock;
mod serial;
mod serve;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ::control::Failure;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

pub use self::control::{ControlArgs, CtlArgs, CtlCommand};
pub use self::lock::LockArgs;
pub use self::serial::Serial;
pub use self::serve::ServeArgs;
use crate::help;
use crate::log::{LogFormat, LogLevel};
use crate::notify;
use crate::size::SizeChange;
use crate::text;

/// A program called by this name (a link) runs `strata serve`: management layers that follow QEMU's conventions for
/// backend programs call a program with options only.
pub const BACKEND_PROGRAM: &str = "strata-blk";

/// Headings of the help.
const IMAGE: &str = "Image and backing chain";
const SOCKET: &str = "Socket";
const DEVICE: &str = "Device in the guest";
const SPACE: &str = "Space, zeros and discards";
const HOST_IO: &str = "I/O and memory on the host";

/// Serves qcow2 and raw images to virtual machines over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "strata", version, max_term_width = 120, about, after_long_help = help::PROGRAM, arg_required_else_help = true)]
pub struct Cli {
    /// Print what the backend can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// How much to log: off, error, warn, info, debug, trace, or a filter like warn,vhost_blk=debug [default: RUST_LOG,
    /// else info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,

    /// How log lines look: text, or a JSON object each
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

impl Cli {
    /// Refuses what options say that contradict each other by their values.
    fn consistent(self) -> Result<Self, clap::Error> {
        if let Some(Command::Serve(serve)) = &self.command
            && serve.detect_zeroes == DetectZeroes::Unmap
            && serve.discard == Discard::Ignore
        {
            let why = "--detect-zeroes unmap gives space back, and with --discard ignore nothing does";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, why));
        }
        if let Some(Command::Serve(serve)) = &self.command
            && let ServeArgs { logical_block_size, physical_block_size: Some(physical), .. } = serve.as_ref()
            && physical < logical_block_size
        {
            let why = "--physical-block-size cannot be less than --logical-block-size";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, why));
        }
        if let Some(Command::Serve(serve)) = &self.command
            && !(self.print_capabilities || serve.print_capabilities)
            && serve.socket_path.is_none()
            && serve.fd.is_none()
            && notify::passed_sockets() == 0
        {
            let why = "a socket is missing: --socket-path PATH, --fd N, or one that a service manager passes";
            return Err(Cli::command().error(ErrorKind::MissingRequiredArgument, why));
        }
        Ok(self)
    }
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an image to a virtual machine over vhost-user
    Serve(Box<ServeArgs>),
    /// Describe an image and its backing chain
    Info(InfoArgs),
    /// Look for damage in an image, and repair what can be repaired
    Check(CheckArgs),
    /// List, make, apply or delete the internal snapshots of an image that is not in use
    Snapshot(SnapshotArgs),
    /// Give the disk of an image that is not in use another size
    Resize(ResizeArgs),
    /// Ask or command a daemon by its control socket
    Ctl(CtlArgs),
}

impl Command {
    /// True if the result is to be JSON.
    pub fn prints_json(&self) -> bool {
        match self {
            Command::Info(info) => info.output.is_json(),
            Command::Check(check) => check.output.is_json(),
            Command::Snapshot(snapshot) => snapshot.output.is_json(),
            Command::Ctl(ctl) => ctl.json,
            Command::Serve(_) | Command::Resize(_) => false,
        }
    }
}

/// Options of `strata info`.
#[derive(Debug, Args)]
#[command(after_long_help = help::INFO)]
pub struct InfoArgs {
    /// The image
    #[arg(value_name = "FILE")]
    pub image: PathBuf,

    #[command(flatten)]
    pub chain: ChainArgs,

    #[command(flatten)]
    pub lock: LockArgs,

    /// Describe the backing files too, all the way down
    #[arg(long)]
    pub backing_chain: bool,

    /// Take no lock: also if another program is writing to the image, so that what it says may not fit together
    #[arg(short = 'U', long)]
    pub force_share: bool,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options of `strata check`.
#[derive(Debug, Args)]
#[command(after_long_help = help::CHECK)]
pub struct CheckArgs {
    /// The image; its backing files are not looked at
    #[arg(value_name = "FILE")]
    pub image: PathBuf,

    /// Repair: space that is lost (leaks), or all that refcounts and flags can mend
    #[arg(short, long, value_name = "WHAT")]
    pub repair: Option<Repairs>,

    #[command(flatten)]
    pub output: OutputArgs,

    /// The image's format; a raw image has nothing to check
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "qcow2")]
    pub format: ImageFormat,

    /// Look at an image that is in use, without a lock; what is found may just have been changing
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,

    #[command(flatten)]
    pub lock: LockArgs,

    /// Take the image only from this folder and what is below it; may be given several times
    #[arg(long, value_name = "DIR")]
    pub chain_root: Vec<PathBuf>,

    /// Bypass the host's page cache (direct) or go through it (writeback)
    #[arg(long, value_name = "MODE", default_value = "direct")]
    pub cache: Cache,
}

/// Options of `strata snapshot`.
#[derive(Debug, Args)]
#[command(after_long_help = help::SNAPSHOT)]
pub struct SnapshotArgs {
    /// List the snapshots; so it does if nothing else is asked for
    #[arg(short = 'l', long, group = "action")]
    pub list: bool,

    /// Keep the disk as it is now under this name
    #[arg(short = 'c', long, value_name = "NAME", group = "action", conflicts_with_all = ["json", "output"])]
    pub create: Option<String>,

    /// Make the disk what it was; what has been written since is lost
    #[arg(short = 'a', long, value_name = "NAME_OR_ID", group = "action", conflicts_with_all = ["json", "output"])]
    pub apply: Option<String>,

    /// Forget a snapshot
    #[arg(short = 'd', long, value_name = "NAME_OR_ID", group = "action", conflicts_with_all = ["json", "output"])]
    pub delete: Option<String>,

    /// The image, in format qcow2
    #[arg(value_name = "FILE")]
    pub image: PathBuf,

    #[command(flatten)]
    pub output: OutputArgs,

    /// List the snapshots of an image that is in use, without a lock; the list may just have been changing
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub force_share: bool,

    /// Take the image only from this folder and what is below it; may be given several times
    #[arg(long, value_name = "DIR")]
    pub chain_root: Vec<PathBuf>,

    /// The external file that holds the image's data; it is not opened, and such an image can have no new snapshots
    #[arg(long, value_name = "FILE")]
    pub data_file: Option<PathBuf>,

    #[command(flatten)]
    pub lock: LockArgs,

    /// Bypass the host's page cache (direct) or go through it (writeback)
    #[arg(long, value_name = "MODE", default_value = "direct")]
    pub cache: Cache,
}

/// Options of `strata resize`.
#[derive(Debug, Args)]
#[command(after_long_help = help::RESIZE)]
pub struct ResizeArgs {
    #[command(flatten)]
    pub chain: ChainArgs,

    #[command(flatten)]
    pub data: DataFileArgs,

    #[command(flatten)]
    pub lock: LockArgs,

    /// The disk may become smaller: the data past its new end is lost
    #[arg(long)]
    pub shrink: bool,

    /// The image
    #[arg(value_name = "FILE")]
    pub image: PathBuf,

    /// The disk's new size in bytes, or with K, M, G or T (powers of 1024). +SIZE is so much more than now, -SIZE
    /// so much less
    #[arg(value_name = "[+-]SIZE", allow_hyphen_values = true)]
    pub size: SizeChange,
}

/// What a check repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repairs {
    /// Refcounts that are too high
    Leaks,
    /// Refcounts, flags, the snapshot table, and the marks "dirty" and "corrupt"
    All,
    /// All, and snapshots that cannot be read are given up: what only they have is freed
    DropSnapshots,
}

/// How to open a chain of images.
#[derive(Clone, Debug, Args)]
pub struct ChainArgs {
    /// The image's format; it is never guessed, as a guest could write a qcow2 header into a raw disk
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "qcow2", help_heading = IMAGE)]
    pub format: ImageFormat,

    /// The format of backing files whose overlay does not record it
    #[arg(long, value_name = "FORMAT", help_heading = IMAGE)]
    pub backing_format: Option<ImageFormat>,

    /// Take the image and its backing files only from this folder and what is below it; may be given several times
    #[arg(long, value_name = "DIR", help_heading = IMAGE)]
    pub chain_root: Vec<PathBuf>,

    /// Bypass the host's page cache (direct) or go through it (writeback)
    #[arg(long, value_name = "MODE", default_value = "direct", help_heading = IMAGE)]
    pub cache: Cache,
}

/// In which form the result is printed.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Print JSON; an error too is JSON then, on the standard output
    #[arg(long, conflicts_with = "output", help_heading = "Output")]
    json: bool,

    /// Print for people (human) or JSON (json), as with qemu-img
    #[arg(long, value_name = "FORM", help_heading = "Output")]
    output: Option<Output>,
}

impl OutputArgs {
    /// True if the result is to be JSON.
    pub fn is_json(&self) -> bool {
        self.json || self.output == Some(Output::Json)
    }
}

/// A form of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text for people
    Human,
    /// JSON for programs
    Json,
}

/// Which external files have the data of images.
#[derive(Clone, Debug, Args)]
pub struct DataFileArgs {
    /// The external file that holds the image's data; the name in the image's header is never followed
    #[arg(long, value_name = "FILE", help_heading = IMAGE)]
    pub data_file: Option<PathBuf>,

    /// Likewise of a backing file: its name as messages have it, =, and its data file; may be given several times
    #[arg(long, value_name = "BACKING=FILE", value_parser = OsStringValueParser::new().try_map(backing_data_file), help_heading = IMAGE)]
    pub backing_data_file: Vec<(PathBuf, PathBuf)>,
}

/// A format by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// qcow2, version 2 or 3
    Qcow2,
    /// The bytes of the disk themselves
    Raw,
}

impl From<ImageFormat> for disk::Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Qcow2 => disk::Format::Qcow2,
            ImageFormat::Raw => disk::Format::Raw,
        }
    }
}

/// What the host's page cache is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// O_DIRECT where the file system has it
    Direct,
    /// Through the host's page cache; what the guest flushes is durable all the same
    Writeback,
}

/// How calls reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    /// By io_uring; where the host refuses it, by threads, with a warning
    Auto,
    /// By io_uring or not at all
    #[value(name = "io_uring")]
    IoUring,
    /// By threads that make plain system calls
    Threads,
}

impl From<Aio> for storage::host::Aio {
    fn from(aio: Aio) -> Self {
        match aio {
            Aio::Auto => storage::host::Aio::Auto,
            Aio::IoUring => storage::host::Aio::IoUring,
            Aio::Threads => storage::host::Aio::Threads,
        }
    }
}

/// What becomes of a request that finds no space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnEnospc {
    /// It fails, and the guest sees an I/O error
    Report,
    /// It waits, and is tried again until there is space
    Wait,
}

impl From<OnEnospc> for disk::OnEnospc {
    fn from(action: OnEnospc) -> Self {
        match action {
            OnEnospc::Report => disk::OnEnospc::Report,
            OnEnospc::Wait => disk::OnEnospc::Wait,
        }
    }
}

/// What becomes of writes of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DetectZeroes {
    /// They are written like any others
    Off,
    /// They are made write zeroes; space that is there is kept
    On,
    /// They are made write zeroes that give space back
    Unmap,
}

impl From<DetectZeroes> for disk::DetectZeroes {
    fn from(mode: DetectZeroes) -> Self {
        match mode {
            DetectZeroes::Off => disk::DetectZeroes::Off,
            DetectZeroes::On => disk::DetectZeroes::On,
            DetectZeroes::Unmap => disk::DetectZeroes::Unmap,
        }
    }
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// Space is given back
    Unmap,
    /// Nothing happens, and space is not given back by write zeroes either
    Ignore,
}

impl From<Discard> for disk::Discards {
    fn from(mode: Discard) -> Self {
        match mode {
            Discard::Unmap => disk::Discards::Unmap,
            Discard::Ignore => disk::Discards::Ignore,
        }
    }
}

fn backing_data_file(text: OsString) -> Result<(PathBuf, PathBuf), &'static str> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=').unwrap_or(0);
    let (backing, file) = (&bytes[..at], bytes.get(at + 1..).unwrap_or_default());
    if backing.is_empty() || file.is_empty() {
        return Err("it names a backing file and its data file, with = between them");
    }
    Ok((OsStr::from_bytes(backing).into(), OsStr::from_bytes(file).into()))
}

/// The arguments, with `serve` inserted where the program's name implies it.
pub fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = given.collect();
    let called = arguments.first().and_then(|name| Path::new(name).file_name());
    if called == Some(OsStr::new(BACKEND_PROGRAM)) {
        arguments.insert(1, "serve".into());
    }
    arguments
}

/// Parses the arguments, or ends the program: with exit code 0 after a request for help, else with 2. For `check`,
/// 2 means a corrupt image, so wrong usage is 1 there, as with `qemu-img check`.
pub fn parse(given: impl Iterator<Item = OsString>) -> Cli {
    let arguments = arguments(given);
    Cli::try_parse_from(&arguments).and_then(Cli::consistent).unwrap_or_else(|error| {
        tell_usage(&error, &arguments);
        std::process::exit(usage_exit_code(&error, &arguments))
    })
}

/// Prints clap's message. Values of the command line may be names: characters that control a terminal are escaped.
fn tell_usage(error: &clap::Error, arguments: &[OsString]) {
    let text = error.to_string();
    // If printing fails, the exit code still tells.
    if text.chars().any(|character| character != '\n' && names::must_be_escaped(character)) {
        let lines: Vec<String> = text.lines().map(|line| names::one_line(line).to_string()).collect();
        let _ = io::stderr().write_all((lines.join("\n") + "\n").as_bytes());
    } else {
        let _ = error.print();
    }
    if error.use_stderr() && asks_for_json(arguments) {
        let _ = text::print(&Failure::usage(&text).json());
    }
}

/// True if invalid arguments request JSON, spelled as in valid ones.
fn asks_for_json(arguments: &[OsString]) -> bool {
    let mut pairs = arguments.iter().zip(arguments.iter().skip(1)).take_while(|(_, word)| *word != "--");
    pairs.any(|(before, word)| {
        word == "--json" || word == "--output=json" || (before == "--output" && word == "json")
    })
}

fn usage_exit_code(error: &clap::Error, arguments: &[OsString]) -> i32 {
    let mut words = arguments.iter().skip(1);
    let mut command = words.next();
    while command.is_some_and(|word| word.as_encoded_bytes().starts_with(b"-")) {
        if command.is_some_and(|word| word == "--log-level" || word == "--log-format") {
            words.next();
        }
        command = words.next();
    }
    let is_check = command.is_some_and(|word| word == "check");
    if error.use_stderr() && is_check { 1 } else { error.exit_code() }
}

/// Ends the program: no command was given.
pub fn exit_without_command() -> ! {
    Cli::command()
        .error(
            ErrorKind::MissingSubcommand,
            "a command is missing: serve, info, check, snapshot, resize or ctl",
        )
        .exit()
}

#[cfg(test)]
mod tests;
