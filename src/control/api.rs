//! The answers and the requests of the control socket, version 1.
//!
//! Their names are QMP's where QMP has the same thing: of ImageInfo and BlockDeviceInfo for the disk, of
//! BlockDeviceStats for counters. Names and meanings never change; new fields may come.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ping {
    /// The daemon's process.
    pub pid: u32,
}

/// The program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Its version.
    pub version: String,
}

/// A format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// qcow2.
    Qcow2,
    /// The bytes of the disk themselves.
    Raw,
}

/// What the daemon does for frontends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Frontend {
    /// It waits for one.
    #[default]
    Waiting,
    /// It serves one.
    Attached,
    /// A session has ended, and its requests are being finished.
    Draining,
}

/// The disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskState {
    /// The top image, as it was named to the daemon.
    pub filename: String,
    /// Bytes of the disk that the guest sees.
    pub virtual_size: u64,
    /// Nothing can be written.
    pub ro: bool,
    /// False while another process has the image, before or after a migration.
    pub open: bool,
    /// Metadata could not be made durable: every later write and flush fails.
    pub failed: bool,
    /// Damage was found while the image was in use, and recorded in its header.
    pub corrupt: bool,
    /// The disk was paused: requests wait in their rings.
    pub paused: bool,
    /// What the daemon does for frontends.
    pub frontend: Frontend,
    /// Queues on offer.
    pub num_queues: u16,
}

/// The layers of the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Chain {
    /// The top image first.
    pub layers: Vec<Layer>,
}

/// An image of the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Layer {
    /// Its file.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// Bytes of its disk.
    pub virtual_size: u64,
    /// Bytes that the host has allocated for its file; null if the host does not say.
    pub actual_size: Option<u64>,
    /// Bytes of its clusters; null for a raw image.
    pub cluster_size: Option<u64>,
    /// The external file with its data; null if it has none.
    pub data_file: Option<String>,
}

/// Counters of requests since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Reads done; none of those that failed.
    pub rd_operations: u64,
    /// Writes done; none of those that failed.
    pub wr_operations: u64,
    /// Flushes done; none of those that failed.
    pub flush_operations: u64,
    /// Discards done; none of those that failed.
    pub unmap_operations: u64,
    /// Write-zeroes requests done; none of those that failed.
    pub write_zeroes_operations: u64,
    /// GET_ID requests done.
    pub other_operations: u64,
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
    /// Reads that failed.
    pub failed_rd_operations: u64,
    /// Writes that failed.
    pub failed_wr_operations: u64,
    /// Flushes that failed.
    pub failed_flush_operations: u64,
    /// Discards that failed.
    pub failed_unmap_operations: u64,
    /// Write-zeroes requests that failed.
    pub failed_write_zeroes_operations: u64,
    /// GET_ID and unknown requests that failed.
    pub failed_other_operations: u64,
    /// Chains of descriptors without a usable status byte.
    pub malformed: u64,
    /// Times a ring was found corrupt or its thread failed.
    pub ring_errors: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Times the thread went to sleep.
    pub sleeps: u64,
}

/// The counters of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QueueStats {
    /// Its number.
    pub queue: u16,
    /// Requests in flight now.
    pub in_flight: u32,
    /// Its counters.
    #[serde(flatten)]
    pub counters: Counters,
}

/// The counters of the disk. They are read one after another, so they need not fit together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stats {
    /// The sums over all queues.
    pub total: Counters,
    /// The queues that a guest has used.
    pub queues: Vec<QueueStats>,
    /// Requests that wait for space on the host now.
    pub space_waiting: u64,
    /// Requests that have waited for space since the image was opened.
    pub space_waited: u64,
    /// Counters of the metadata; null while another process has the image, or a snapshot is being
    /// taken.
    pub metadata: Option<Metadata>,
}

/// Counters of the disk's metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Metadata {
    /// Memory of the map of clusters, in bytes.
    pub map_bytes: u64,
    /// About the bytes of metadata that are not durable yet.
    pub dirty_bytes: u64,
    /// Freed clusters that cannot be used again yet.
    pub quarantined_clusters: u64,
    /// Clusters that are reserved for coming writes.
    pub reserved_clusters: u64,
    /// Times that metadata was made durable since the image was opened.
    pub cuts: u64,
}

/// What is to be logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// off, error, warn, info, debug, trace, or a filter like warn,vhost_blk=debug.
    pub level: String,
}

/// The size that the disk is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Bytes.
    pub size: u64,
    /// The disk may become smaller: what lies past the new end is lost.
    #[serde(default)]
    pub force: bool,
}

/// A disk that was resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Resized {
    /// Bytes before.
    pub previous_size: u64,
    /// Bytes now.
    pub virtual_size: u64,
    /// The frontend was told. If it was not, the guest sees the size when its device starts anew.
    pub frontend_told: bool,
}

/// How an overlay comes to be, as QMP's NewImageMode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotMode {
    /// It is created, and names the present top image by its absolute path.
    #[default]
    AbsolutePaths,
}

/// The overlay that a snapshot is to make the top image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its file, which does not exist: an absolute path.
    pub overlay: String,
    /// How it comes to be.
    #[serde(default)]
    pub mode: SnapshotMode,
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotTaken {
    /// The top image now.
    pub filename: String,
    /// The image that was the top: it has the disk as it was, and is only read.
    pub backing_filename: String,
}

/// The name of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EventName {
    /// A frontend has connected.
    FrontendConnected,
    /// A frontend has left, or was sent away.
    FrontendLeft,
    /// Requests wait for space on the host, or (with `waiting` 0) none does any more.
    SpaceWait,
    /// Metadata could not be made durable: every later write and flush fails.
    DiskFailed,
    /// Damage was found while the image was in use.
    ImageCorrupt,
    /// An overlay was put on top of the chain.
    SnapshotTaken,
}

/// Something that happened, in the form of QMP's events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its name.
    pub event: EventName,
    /// What it says besides; empty for most.
    pub data: EventData,
    /// When it happened.
    pub timestamp: Timestamp,
}

/// What an event says besides its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventData {
    /// Of SPACE_WAIT: requests that wait now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<u64>,
}

/// The time since 1970 by the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: u64,
    /// Microseconds of the present second.
    pub microseconds: u32,
}
