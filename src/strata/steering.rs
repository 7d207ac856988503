//! What the control socket can ask and tell this daemon: connects `control` to the disk, the server and the log.
//!
//! Owns the translation of their facts and errors into answers. Every query reads counters or facts.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use control::api::{
    Chain, Counters, DiskState, EventData, EventName, Format, Frontend, Layer, Metadata, QueueStats, Resize,
    Resized, Snapshot, SnapshotTaken, Stats,
};
use control::{Failure, Hub, Kind, Subject};
use disk::NewOverlay;
use disk::resize::{NewSize, ResizeError, Shrinking};
use names::shown;
use storage::Storage;
use tracing::{info, warn};
use vhost_blk::{BackChannel, Metrics, QueueSnapshot, Stage};

use crate::device::{DeviceSnapshotError, DeviceWatch, DiskDevice, PauseError};
use crate::error::ProgramError;
use crate::log::{self, LogLevel};
use crate::report;
use crate::shutdown::Shutdown;
use crate::text::json_name;
use crate::top_pointer::{self, TopPointer};

/// What the server does for frontends, for the control socket: the present stage, and events about changes.
#[derive(Debug, Default)]
pub struct Stages {
    /// Stored by the session's thread, loaded by the control thread: relaxed, it orders nothing.
    now: AtomicU8,
    hub: Arc<Hub>,
}

const WAITING: u8 = 0;
const ATTACHED: u8 = 1;
const DRAINING: u8 = 2;

impl Stages {
    /// The server has a new stage.
    pub fn tell(&self, stage: Stage) {
        let (now, event) = match stage {
            Stage::Waiting => (WAITING, None),
            Stage::Attached => (ATTACHED, Some(EventName::FrontendConnected)),
            Stage::Draining => (DRAINING, Some(EventName::FrontendLeft)),
        };
        self.now.store(now, Ordering::Relaxed);
        if let Some(event) = event {
            self.hub.tell(event, EventData::default());
        }
    }

    /// The hub of the events.
    pub fn hub(&self) -> Arc<Hub> {
        Arc::clone(&self.hub)
    }

    fn now(&self) -> Frontend {
        match self.now.load(Ordering::Relaxed) {
            ATTACHED => Frontend::Attached,
            DRAINING => Frontend::Draining,
            _ => Frontend::Waiting,
        }
    }
}

/// A daemon as its control socket sees it.
pub struct Steering<S: Storage> {
    /// The top image.
    pub image: PathBuf,
    /// The disk in the guest.
    pub device: Arc<DiskDevice<S>>,
    /// Queues on offer.
    pub num_queues: u16,
    /// Their counters.
    pub metrics: Arc<Metrics>,
    /// What the server does.
    pub stages: Arc<Stages>,
    /// Tells the frontend of another size.
    pub back_channel: Arc<BackChannel>,
    /// What a pointer to another top image means to this daemon.
    pub top_pointer: TopPointer,
    /// Ends the daemon.
    pub shutdown: Shutdown,
    /// The daemon ends. Relaxed: it orders nothing.
    pub ending: AtomicBool,
}

impl<S: Storage> Steering<S> {
    /// True if the frontend was told that the disk has another size.
    fn tell_size(&self) -> bool {
        self.back_channel.tell_change().unwrap_or_else(|error| {
            warn!(%error, "the frontend could not be told that the disk has another size");
            false
        })
    }

    fn awaits_journal(&self) -> Failure {
        let message = "the last daemon was killed, and the frontend that has its journal is not back yet";
        let hint = Some("let the virtual machine attach first".to_owned());
        Failure { file: Some(json_name(&self.image)), hint, ..Failure::new(Kind::Refused, message) }
    }

    fn is_being_changed(&self) -> Failure {
        let hint = Some("ask again when the snapshot has been taken".to_owned());
        let file = Some(json_name(&self.image));
        Failure { file, hint, ..Failure::new(Kind::Busy, "a snapshot of the disk is being taken") }
    }

    fn is_elsewhere(&self) -> Failure {
        let file = Some(json_name(&self.image));
        let hint = Some("the image is opened when the guest starts here".to_owned());
        Failure { file, hint, ..Failure::new(Kind::InUse, "another process may have the image now") }
    }
}

impl<S: Storage> Subject for Steering<S> {
    fn disk(&self) -> DiskState {
        let facts = self.device.facts();
        // Looked at on both sides of the glance, as a snapshot may begin or end in between.
        let is_changing = self.device.is_changing();
        let disk = self.device.glance();
        DiskState {
            filename: json_name(&self.image),
            virtual_size: facts.size,
            ro: facts.read_only,
            open: disk.is_some() || is_changing || self.device.is_changing(),
            failed: disk.as_ref().is_some_and(|disk| disk.has_failed()),
            corrupt: disk.as_ref().is_some_and(|disk| disk.is_marked_corrupt()),
            paused: self.device.is_paused(),
            frontend: self.stages.now(),
            num_queues: self.num_queues,
        }
    }

    fn chain(&self) -> Result<Chain, Failure> {
        let is_changing = self.device.is_changing();
        let disk = self.device.glance().ok_or_else(|| {
            if is_changing || self.device.is_changing() {
                self.is_being_changed()
            } else {
                self.is_elsewhere()
            }
        })?;
        let layer = |(index, layer): (usize, &disk::Layer)| Layer {
            filename: json_name(&layer.path),
            format: if layer.header.is_some() { Format::Qcow2 } else { Format::Raw },
            virtual_size: if index == 0 { disk.size() } else { layer.size },
            actual_size: disk.allocated(index).ok(),
            cluster_size: layer.header.as_ref().map(|header| header.geometry().cluster_size()),
            data_file: if index == 0 { disk.data_file().map(json_name) } else { None },
        };
        Ok(Chain { layers: disk.layers().iter().enumerate().map(layer).collect() })
    }

    fn stats(&self) -> Stats {
        let watch = self.device.watch();
        let space = watch.space_status();
        let metadata = self.device.glance().map(|disk| {
            let status = disk.status();
            Metadata {
                map_bytes: status.map_bytes as u64,
                dirty_bytes: status.dirty_bytes as u64,
                quarantined_clusters: status.quarantined_clusters,
                reserved_clusters: status.reserved_clusters,
                cuts: status.cuts,
            }
        });
        Stats {
            total: counters(&self.metrics.total()),
            queues: queues(&self.metrics.snapshot(), &watch),
            space_waiting: space.waiting,
            space_waited: space.waited,
            metadata,
        }
    }

    fn set_log_level(&self, level: &str) -> Result<(), Failure> {
        let level: LogLevel = level
            .parse()
            .map_err(|error: log::LogLevelError| Failure::new(Kind::Usage, &error.to_string()))?;
        let changed = log::change(&level);
        changed
            .then_some(())
            .ok_or_else(|| Failure::new(Kind::Host, "the log of this daemon cannot be changed"))
    }

    fn flush(&self) -> Result<(), Failure> {
        let disk = self.device.disk().ok_or_else(|| self.is_elsewhere())?;
        let failed = |source| report::failure(&ProgramError::Flush { image: self.image.clone(), source });
        if disk.flush().map_err(failed)? {
            return Ok(());
        }
        Err(self.awaits_journal())
    }

    fn pause(&self) -> Result<(), Failure> {
        self.device.pause().map_err(|error| match error {
            PauseError::Flush(source) => {
                report::failure(&ProgramError::Flush { image: self.image.clone(), source })
            }
            PauseError::Gate(source) => {
                let hint =
                    Some("requests that wait for space on the host keep a disk from its pause".to_owned());
                let file = Some(json_name(&self.image));
                Failure { file, hint, ..Failure::new(Kind::Busy, &source.to_string()) }
            }
        })
    }

    fn resume(&self) {
        self.device.resume();
    }

    fn snapshot(&self, wanted: Snapshot) -> Result<SnapshotTaken, Failure> {
        let overlay = PathBuf::from(&wanted.overlay);
        let refused = |kind, message: &str| Failure {
            file: Some(wanted.overlay.clone()),
            ..Failure::new(kind, message)
        };
        if self.top_pointer != TopPointer::Follow {
            let hint = Some("start the daemon with --top-pointer follow".to_owned());
            let message = "the next daemon would not find the overlay";
            return Err(Failure { hint, ..refused(Kind::Refused, message) });
        }
        if !overlay.is_absolute() || overlay.file_name().is_none() {
            return Err(refused(Kind::Usage, "the overlay needs the absolute path of a file"));
        }
        if top_pointer::is_taken(&self.image, &overlay) {
            return Err(refused(Kind::Refused, "this name is that of the pointer to the top image"));
        }
        let disk = self.device.disk().ok_or_else(|| self.is_elsewhere())?;
        let present = disk.layers()[0].path.clone();
        drop(disk);
        let present = std::path::absolute(&present)
            .map_err(|error| refused(Kind::Host, &format!("the top image has no absolute path: {error}")))?;
        let new = NewOverlay { path: overlay.clone(), backing_file: present.as_os_str().as_bytes().to_vec() };
        let taken = self.device.snapshot(&new, || top_pointer::store(&self.image, &overlay));
        let done = taken.map_err(|error| match error {
            DeviceSnapshotError::Disk(source) => report::failure(&ProgramError::LiveSnapshot(source)),
            other => refused(Kind::Busy, &other.to_string()),
        })?;
        done.ok_or_else(|| self.is_elsewhere())?;
        info!("{} is the top of the chain now, and {} is only read", shown(&overlay), shown(&present));
        self.stages.hub.tell(EventName::SnapshotTaken, EventData::default());
        Ok(SnapshotTaken { filename: wanted.overlay, backing_filename: json_name(&present) })
    }

    fn resize(&self, wanted: Resize) -> Result<Resized, Failure> {
        let block = self.device.logical_block_size();
        if !wanted.size.is_multiple_of(block) {
            let message = format!("{} bytes are no multiple of a block of {block} bytes", wanted.size);
            return Err(Failure::new(Kind::Usage, &message));
        }
        if self.device.disk().is_some_and(|disk| disk.awaits_journal()) {
            return Err(self.awaits_journal());
        }
        let shrinking = if wanted.force { Shrinking::Accepted } else { Shrinking::Refused };
        let gives_up = || self.ending.load(Ordering::Relaxed);
        match self.device.resize(NewSize::Of(wanted.size), shrinking, gives_up) {
            Ok(None) => Err(self.is_elsewhere()),
            Ok(Some(resized)) => Ok(Resized {
                previous_size: resized.from,
                virtual_size: resized.to,
                frontend_told: resized.from != resized.to && self.tell_size(),
            }),
            Err(error @ ResizeError::WouldShrink { .. }) => {
                let hint = Some("\"force\": true permits that (strata ctl: --force)".to_owned());
                let message =
                    "with that size, what lies past the new end of the disk would be lost".to_owned();
                Err(Failure { message, hint, ..report::failure(&ProgramError::Resize(error)) })
            }
            Err(error) => Err(report::failure(&ProgramError::Resize(error))),
        }
    }

    fn give_up(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    fn shut_down(&self) {
        self.shutdown.ask("the control socket");
    }
}

/// The queues that were used.
fn queues(counted: &[QueueSnapshot], watch: &DeviceWatch) -> Vec<QueueStats> {
    let busy = watch.in_flight();
    let in_flight = |queue: u16| {
        let name = format!("strata-q{queue}");
        busy.iter().find(|(thread, _)| *thread == name).map_or(0, |(_, count)| *count)
    };
    let each = (0..).zip(counted).map(|(queue, snapshot)| QueueStats {
        queue,
        in_flight: in_flight(queue),
        counters: counters(snapshot),
    });
    each.filter(|stats| *stats != QueueStats { queue: stats.queue, ..QueueStats::default() }).collect()
}

/// QMP's counters of operations leave out those that failed. The counters are read one after another, so a failure may be
/// seen before its request.
fn counters(of: &QueueSnapshot) -> Counters {
    Counters {
        rd_operations: of.reads.saturating_sub(of.read_errors),
        wr_operations: of.writes.saturating_sub(of.write_errors),
        flush_operations: of.flushes.saturating_sub(of.flush_errors),
        unmap_operations: of.discards.saturating_sub(of.discard_errors),
        write_zeroes_operations: of.write_zeroes.saturating_sub(of.write_zeroes_errors),
        other_operations: of.others.saturating_sub(of.other_errors),
        rd_bytes: of.read_bytes,
        wr_bytes: of.written_bytes,
        failed_rd_operations: of.read_errors,
        failed_wr_operations: of.write_errors,
        failed_flush_operations: of.flush_errors,
        failed_unmap_operations: of.discard_errors,
        failed_write_zeroes_operations: of.write_zeroes_errors,
        failed_other_operations: of.other_errors,
        malformed: of.malformed,
        ring_errors: of.ring_errors,
        interrupts: of.interrupts,
        sleeps: of.sleeps,
    }
}
