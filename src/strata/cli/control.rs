//! The options of the control socket, and the command line of its client.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::help;
use crate::log::LogLevel;
use crate::size::Size;

/// The heading of the help.
const CONTROL: &str = "Control socket";

/// Where the daemon is controlled.
#[derive(Clone, Debug, Args)]
pub struct ControlArgs {
    /// Answer questions and commands on this unix socket: `strata ctl` asks, and any HTTP client may. Only this user can
    /// use it [default: there is none]
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd", help_heading = CONTROL)]
    pub control_socket: Option<PathBuf>,

    /// Use this inherited file descriptor instead: a unix socket that is listening
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..), help_heading = CONTROL)]
    pub control_fd: Option<i32>,

    /// A group that may use the control socket, too: a name in /etc/group, or a number
    #[arg(long, value_name = "NAME", requires = "control_socket", help_heading = CONTROL)]
    pub control_group: Option<String>,
}

/// Options of `strata ctl`.
#[derive(Debug, Args)]
#[command(after_long_help = help::CTL)]
pub struct CtlArgs {
    /// The control socket of the daemon
    #[arg(value_name = "SOCKET")]
    pub socket: PathBuf,

    /// Print the daemon's JSON as it is; an error too is JSON then, on the standard output
    #[arg(long, global = true)]
    pub json: bool,

    /// What to ask or to command.
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What a daemon can be asked and commanded.
#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Whether it answers
    Ping,
    /// The version of its program
    Version,
    /// The disk, its state and its frontend
    Disk,
    /// The layers of the disk, and the space that each takes
    Chain,
    /// The counters of requests and metadata
    Stats,
    /// The counters in the text format of OpenMetrics, which Prometheus reads
    Metrics,
    /// What happens from now on, a line for each event, until the daemon ends
    Events,
    /// The description of the control socket, as OpenAPI
    Api,
    /// Change what the daemon logs
    LogLevel {
        /// off, error, warn, info, debug, trace, or a filter like warn,vhost_blk=debug
        #[arg(value_name = "LEVEL")]
        level: LogLevel,
    },
    /// Give the disk another size, while it is in use
    Resize {
        /// Bytes, or with K, M, G or T (powers of 1024)
        #[arg(value_name = "SIZE")]
        size: Size,
        /// The disk may become smaller: what lies past the new end is lost
        #[arg(long)]
        force: bool,
    },
    /// Make every write durable that was acknowledged before
    Flush,
    /// Make a new overlay the top image, while the disk is in use: the image that was the top keeps the disk as it is now
    Snapshot {
        /// The file of the overlay, which must not exist
        #[arg(value_name = "OVERLAY")]
        overlay: PathBuf,
    },
    /// Keep the guest's requests waiting until `resume`: those in flight end, and everything becomes durable
    Pause,
    /// Let requests pass again
    Resume,
    /// End the daemon, as SIGTERM does; this returns when it has begun to end
    Shutdown,
}
