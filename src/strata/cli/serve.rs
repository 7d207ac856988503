//! The options of `strata serve`, and the checks of single values.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    Aio, Cache, ChainArgs, ControlArgs, DEVICE, DataFileArgs, DetectZeroes, Discard, HOST_IO, IMAGE,
    LockArgs, OnEnospc, SOCKET, SPACE, Serial,
};
use crate::help;
use crate::size::Size;
use crate::top_pointer::TopPointer;

/// The maximum of `--poll-max` in microseconds: compared with a longer poll, a sleep costs nothing.
const POLL_US_MAX: u64 = 10_000;

/// Options of `strata serve`.
#[derive(Clone, Debug, Args)]
#[command(after_long_help = help::SERVE)]
pub struct ServeArgs {
    /// The image to serve
    #[arg(
        long,
        visible_alias = "image",
        value_name = "FILE",
        required_unless_present_any = ["image_argument", "print_capabilities"],
        help_heading = IMAGE
    )]
    pub blk_file: Option<PathBuf>,

    /// The image to serve, without the name of an option
    #[arg(value_name = "IMAGE", conflicts_with = "blk_file")]
    pub image_argument: Option<PathBuf>,

    /// Listen on this unix socket; a stale socket file is replaced, one that somebody listens on is not. Neither this nor
    /// --fd is needed where a service manager passes a listening socket (LISTEN_FDS)
    #[arg(long, visible_alias = "socket", value_name = "PATH", conflicts_with = "fd", help_heading = SOCKET)]
    pub socket_path: Option<PathBuf>,

    /// Take the place of the daemon that serves this image on --socket-path, without a refused connection or a lost
    /// request. If this one fails to start, that one goes on. Without such a daemon, serve as usual
    #[arg(long, requires = "socket_path", conflicts_with_all = ["fd", "incoming"], help_heading = SOCKET)]
    pub replace: bool,

    /// Use this inherited file descriptor instead: a unix socket that is listening or connected
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..), help_heading = SOCKET)]
    pub fd: Option<i32>,

    #[command(flatten)]
    pub control: ControlArgs,

    #[command(flatten)]
    pub chain: ChainArgs,

    #[command(flatten)]
    pub data: DataFileArgs,

    #[command(flatten)]
    pub lock: LockArgs,

    /// The guest comes from another host or another virtual machine process, whose daemon still uses the image.
    /// Open it for writing when the guest starts here. Both must see the same file
    #[arg(long, conflicts_with_all = ["read_only", "snapshot"], help_heading = IMAGE)]
    pub incoming: bool,

    /// The same for the backing files, which are only read: through the page cache, disks that share one share its cache
    /// too
    #[arg(long, value_name = "MODE", default_value = "writeback", help_heading = HOST_IO)]
    pub backing_cache: Cache,

    /// How calls reach the host: by io_uring, else, if it refuses that, by threads (auto); or by one of these alone
    #[arg(long, value_name = "WAY", default_value = "auto", help_heading = HOST_IO)]
    pub aio: Aio,

    /// Never write to the image: the guest sees a read-only disk, and others may read the image too
    #[arg(long, help_heading = IMAGE)]
    pub read_only: bool,

    /// Serve this internal snapshot of the image, by its ID or its name, instead of the disk as it is now: read-only
    #[arg(long, value_name = "NAME_OR_ID", help_heading = IMAGE)]
    pub snapshot: Option<String>,

    /// A snapshot of the disk in use makes an overlay the top image, and IMAGE.strata-top names it: serve that disk (follow),
    /// the image itself (ignore), or nothing (refuse)
    #[arg(long, value_name = "CHOICE", default_value = "follow", help_heading = IMAGE)]
    pub top_pointer: TopPointer,

    /// How many queues to offer, 1 to 256; those that the guest does not use cost nothing
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = DEVICE)]
    pub num_queues: u16,

    /// The largest ring in descriptors: a power of two from 2 to 32768
    #[arg(long, value_name = "N", default_value = "1024", value_parser = queue_size, help_heading = DEVICE)]
    pub queue_size: u16,

    /// The file in which SIGHUP finds the size that the disk is to have from then on, while it is in use. It holds
    /// 20G, or "10G shrink" if what lies past a smaller end may be lost [default: SIGHUP reads a raw image's own
    /// size anew]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["read_only", "snapshot"], help_heading = DEVICE)]
    pub size_file: Option<PathBuf>,

    /// The smallest unit of the guest's requests, in bytes: 512 or 4096. The disk's size must be a multiple
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = logical_block_size, help_heading = DEVICE)]
    pub logical_block_size: u32,

    /// The unit that the guest should write whole, in bytes: a power of two from 512 to 64K [default: a block of
    /// the image's file system or device]
    #[arg(long, value_name = "BYTES", value_parser = physical_block_size, help_heading = DEVICE)]
    pub physical_block_size: Option<u32>,

    /// The disk's serial number in the guest: at most 20 printable ASCII characters [default: made of the image's file
    /// name and its path]
    #[arg(long, value_name = "TEXT", help_heading = DEVICE)]
    pub serial: Option<Serial>,

    /// The most memory for the map of the disk's clusters, 64K to 64G. 8 bytes map a cluster, so 32M map 256 GiB at
    /// a time with clusters of 64 KiB. Data that lies in order in its image needs almost none
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = map_cache_size, help_heading = HOST_IO)]
    pub map_cache_size: Size,

    /// How long at most an idle queue looks for work before it sleeps, 0 to 10000 microseconds. It saves wake-ups
    /// where work comes that soon, and looks less where it does not
    #[arg(long, value_name = "US", default_value_t = 100, value_parser = clap::value_parser!(u64).range(..=POLL_US_MAX), help_heading = HOST_IO)]
    pub poll_max: u64,

    /// What happens to a request that finds no space on the host: it fails (report), or waits for space while
    /// others go on (wait)
    #[arg(long, value_name = "ACTION", default_value = "report", help_heading = SPACE)]
    pub on_enospc: OnEnospc,

    /// Writes of zeros: written like any others (off), made write zeroes (on), or made write zeroes that give space back
    /// (unmap)
    #[arg(long, value_name = "MODE", default_value = "off", help_heading = SPACE)]
    pub detect_zeroes: DetectZeroes,

    /// What the guest discards: its space is given back (unmap), or nothing happens (ignore)
    #[arg(long, value_name = "MODE", default_value = "unmap", help_heading = SPACE)]
    pub discard: Discard,

    /// Let clusters keep their places in the image when they are discarded or zeroed, so that it does not become
    /// fragmented. Their space is given back all the same (qcow2 version 3)
    #[arg(long, help_heading = SPACE)]
    pub discard_no_unref: bool,

    /// The socket file's permissions, in octal, such as 0660 [default: by the umask; 0660 with --socket-group]
    #[arg(long, value_name = "OCTAL", value_parser = socket_mode, conflicts_with = "fd", help_heading = SOCKET)]
    pub socket_mode: Option<u32>,

    /// The socket file's group: a name in /etc/group, or a number
    #[arg(long, value_name = "NAME", conflicts_with = "fd", help_heading = SOCKET)]
    pub socket_group: Option<String>,

    /// Print what the backend can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

impl ServeArgs {
    /// The image, however it was named.
    pub fn image(&self) -> Option<&Path> {
        self.blk_file.as_deref().or(self.image_argument.as_deref())
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse::<u16>().ok().filter(|size| size.is_power_of_two() && (2..=32768).contains(size));
    size.ok_or_else(|| "a queue size is a power of two from 2 to 32768".to_owned())
}

fn map_cache_size(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
    if (64 << 10..=64 << 30).contains(&size.0) {
        return Ok(size);
    }
    Err("the map may take from 64K to 64G".to_owned())
}

fn socket_mode(text: &str) -> Result<u32, String> {
    let wrong = || "a mode is octal, from 0 to 0777".to_owned();
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(wrong)
}

fn logical_block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("a logical block has 512 or 4096 bytes".to_owned()),
    }
}

fn physical_block_size(text: &str) -> Result<u32, String> {
    let size = text.parse::<Size>().ok().and_then(|size| u32::try_from(size.0).ok());
    let size = size.filter(|size| size.is_power_of_two() && (512..=64 << 10).contains(size));
    size.ok_or_else(|| "a physical block has a power of two of bytes, from 512 to 64K".to_owned())
}
