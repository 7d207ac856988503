//! One frontend's session: what each vhost-user message does.
//!
//! Owns the queues, the memory table and the negotiated features of a session. Only the session's thread touches it, so
//! the lock that `vhost` needs around it is never contended. Workers see only [`Shared`] and their signal slots. A
//! refused message is recorded, so that the loop can tell it from a broken stream.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::config::{self, FLUSH, LOG_ALL, PACKED, PROTOCOL_FEATURES, WRITEBACK_OFFSET};
use crate::control::{Shared, Stop};
use crate::descriptor;
use crate::device::{BlockDevice, DeviceProfile};
use crate::dirty_log::{DirtyLog, LogError};
use crate::error::MemoryError;
use crate::fd::{eventfd_from, may_be_event};
use crate::in_flight_region::{Claim, Layout, Region, RegionError, RingKind};
use crate::loss::MemoryLoss;
use crate::memory::{MAX_MEMORY_SLOTS, MemoryTable, RegionInfo};
use crate::message::Envelope;
use crate::options::ServeOptions;
use crate::vring::{Surroundings, UserAddresses, Vring};
use crate::write_cache::WriteCache;

/// How long a stop of one ring keeps the others from taking more chains at most, while it lasts and after it.
const HELD_BY_A_STOP: Duration = Duration::from_secs(1);
const HELD_AFTER_A_STOP: Duration = Duration::from_millis(20);

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("there is no queue {index}")]
    Queue { index: u64 },
    #[error("a queue of {size} descriptors: at most {limit}, and a power of two unless rings are packed")]
    QueueSize { size: u32, limit: u16 },
    #[error("queue {index} is running")]
    Running { index: u32 },
    #[error("{base} is no index of an available ring")]
    Base { base: u32 },
    #[error("a queue without a kick descriptor (polling) is not supported")]
    Polling,
    #[error("the descriptor of queue {index} is no eventfd")]
    NotAnEvent { index: u8 },
    #[error("bytes {offset}.. of the configuration space cannot be written")]
    ConfigWrite { offset: u32 },
    #[error("bytes {offset}..{offset}+{size} are not in the configuration space")]
    ConfigRead { offset: u32, size: u32 },
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Region(#[from] RegionError),
    #[error("{0}")]
    Log(#[from] LogError),
    #[error(
        "not everything that was written is durable: the disk or a worker has failed, or the server stops"
    )]
    NotDurable,
    #[error(
        "what was answered so far cannot be made durable, or what a dead daemon left cannot be carried out: {0}"
    )]
    Journal(io::Error),
    #[error("{0} was not offered")]
    NotOffered(&'static str),
}

/// A session, from SET_OWNER until the frontend leaves.
pub(crate) struct Session<D: BlockDevice> {
    device: Arc<D>,
    profile: DeviceProfile,
    options: ServeOptions,
    vrings: Vec<Vring>,
    table: MemoryTable,
    shared: Arc<Shared>,
    /// Whether nobody waits for the answer to a message any more: the frontend is gone, or the server stops.
    hurry: Box<dyn Fn() -> bool + Send>,
    /// The virtio features in force, once the frontend has set them.
    features: Option<u64>,
    protocol_features: VhostUserProtocolFeatures,
    cache: WriteCache,
    /// The in-flight region that the frontend sent back.
    region: Option<Region>,
    /// The log of dirty pages that the frontend last sent. It is in use while LOG_ALL is negotiated.
    log: Option<Arc<DirtyLog>>,
    /// The envelope of the current message.
    message: Envelope,
    /// The back channel that the current message gives.
    channel: Option<OwnedFd>,
    /// The current message was understood, and refused.
    refused: bool,
}

impl<D: BlockDevice> Session<D> {
    pub(crate) fn new(
        device: Arc<D>,
        options: ServeOptions,
        loss: Arc<MemoryLoss>,
        hurry: impl Fn() -> bool + Send + 'static,
    ) -> Self {
        Session {
            profile: device.profile(),
            vrings: (0..options.num_queues).map(Vring::new).collect(),
            device,
            options,
            table: MemoryTable::watched(loss),
            shared: Arc::new(Shared::new()),
            hurry: Box::new(hurry),
            features: None,
            protocol_features: VhostUserProtocolFeatures::empty(),
            cache: WriteCache::new(),
            region: None,
            log: None,
            message: Envelope::default(),
            channel: None,
            refused: false,
        }
    }

    /// How long a message may take from its first byte to its last.
    pub(crate) fn message_timeout(&self) -> Duration {
        self.options.message_timeout
    }

    /// The memory region that lost a page, if it is still in the table.
    pub(crate) fn lost_region(&self) -> Option<RegionInfo> {
        self.table.lost_region()
    }

    /// To be called before each message is handled.
    pub(crate) fn begin_message(&mut self, message: Envelope, channel: Option<OwnedFd>) {
        self.message = message;
        self.refused = false;
        // One that was not taken: no frontend may have this thread wait in a close.
        std::mem::replace(&mut self.channel, channel).into_iter().for_each(descriptor::close_beside);
    }

    /// Whether the session goes on after the current message failed: it was understood and refused, and the frontend is
    /// notified or needs no notice.
    pub(crate) fn survives_failure(&self) -> bool {
        let told = self.message.needs_reply
            && self.message.is_acknowledged()
            && self.protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK);
        self.refused && (told || self.message.is_set_config())
    }

    /// Whether a page of the in-flight region was lost.
    pub(crate) fn lost_in_flight_region(&self) -> bool {
        self.region.as_ref().is_some_and(Region::is_lost)
    }

    /// Whether a page of the dirty log was lost.
    pub(crate) fn lost_log(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.is_lost())
    }

    /// The log, while writes to guest memory are logged.
    fn log_in_use(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.is_logging_wanted())
    }

    fn is_logging_wanted(&self) -> bool {
        self.features.is_some_and(|features| features & LOG_ALL != 0)
    }

    /// Refuses a memory table of which the log cannot hold every page.
    fn check_logged(&mut self, table: &MemoryTable) -> Result<()> {
        match self.log_in_use().map(|log| log.check_covers(table.end())) {
            Some(Err(error)) => self.refuse(error),
            _ => Ok(()),
        }
    }

    /// Ends the session: every queue is drained and stopped.
    pub(crate) fn close(&mut self) {
        self.options.back_channel.set(None);
        self.channel.take().into_iter().for_each(descriptor::close_beside);
        Vring::stop_all(&mut self.vrings, Stop::Leave, &self.hurry);
        if let Some(region) = &self.region {
            self.vrings.iter_mut().for_each(|vring| vring.forget_told(region));
        }
        self.end_journal();
    }

    /// The in-flight region is let go: the disk no longer records anything there. All queues are stopped.
    fn end_journal(&mut self) {
        if self.region.take().is_none() {
            return;
        }
        if let Err(error) = self.outside_of_a_step(|device| device.keep_journal(None)) {
            warn!(%error, "what was answered could not be made durable when the in-flight region was let go");
        }
    }

    /// Makes durable what rings that have stopped answered. False if that failed.
    fn flush(&self) -> bool {
        let flushed = self.outside_of_a_step(D::flush);
        if let Err(error) = &flushed {
            warn!(%error, "what was answered could not be made durable when the write cache was turned off");
        }
        flushed.is_ok()
    }

    fn refuse<T>(&mut self, refusal: impl Into<Refusal>) -> Result<T> {
        let refusal = refusal.into();
        // A guest causes some: writes to the configuration space, for example.
        if self.shared.lines.refusals.admits(Instant::now()) {
            warn!(message = self.message.name(), "refused: {refusal}");
        } else {
            debug!(message = self.message.name(), "refused: {refusal}");
        }
        self.refused = true;
        Err(Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, refusal)))
    }

    /// Lets the device do I/O that takes as long as the host needs: the session's thread is not stuck meanwhile.
    fn outside_of_a_step<T>(&self, call: impl FnOnce(&D) -> T) -> T {
        let pulse = &self.options.pulse;
        let in_step = pulse.session.pause();
        let result = call(&self.device);
        if in_step {
            pulse.session.step();
        }
        result
    }

    fn offered(&self) -> u64 {
        config::features(&self.profile, self.options.num_queues)
    }

    /// The most queues and descriptors that an in-flight region may be for, and the kind of its rings.
    fn region_limits(&self) -> Layout {
        let kind = if self.is_packed() { RingKind::Packed } else { RingKind::Split };
        Layout { kind, queues: self.options.num_queues, queue_size: self.options.queue_size }
    }

    /// Whether rings are packed ones.
    fn is_packed(&self) -> bool {
        self.features.is_some_and(|features| features & PACKED != 0)
    }

    fn check_queue(&mut self, index: u32) -> Result<usize> {
        let found = usize::try_from(index).ok().filter(|index| *index < self.vrings.len());
        match found {
            Some(index) => Ok(index),
            None => self.refuse(Refusal::Queue { index: u64::from(index) }),
        }
    }

    /// The queue of a message whose index `vhost` truncates to 8 bits: the dropped bits must be zero.
    fn check_cut_queue(&mut self, index: u8) -> Result<usize> {
        match self.message.vring_index {
            Some(whole) if whole != u64::from(index) => self.refuse(Refusal::Queue { index: whole }),
            _ => self.check_queue(u32::from(index)),
        }
    }

    /// The queue of a message that carries an event descriptor, and the descriptor if it can be an event.
    fn check_event(&mut self, index: u8, file: Option<File>) -> Result<(usize, Option<File>)> {
        let queue = self.check_cut_queue(index)?;
        if file.as_ref().is_some_and(|file| !may_be_event(file)) {
            return self.refuse(Refusal::NotAnEvent { index });
        }
        Ok((queue, file))
    }

    /// Starts queue `index` once its setup is complete.
    fn start(&mut self, index: usize) {
        let Some(features) = self.features else { return };
        // Without protocol features no message enables a ring.
        if features & PROTOCOL_FEATURES == 0 {
            self.vrings[index].enabled = true;
        }
        let log = self.log_in_use().cloned();
        let surroundings = Surroundings {
            device: &self.device,
            table: &self.table,
            region: self.region.as_ref(),
            log: log.as_ref(),
            shared: &self.shared,
            metrics: &self.options.metrics,
            pulse: &self.options.pulse,
            features,
            poll_max: self.options.poll_max,
        };
        let Some(prepared) = self.vrings[index].prepare(&surroundings) else { return };
        if prepared.is_unrecorded() && self.cache.is_unsure(features) {
            info!(
                queue = index,
                "the queue was in use before, and nothing says whether the guest's write cache is on: it begins as off"
            );
            // Kept in the region before the ring has a record there.
            self.change_cache(|cache| cache.set(false));
            return self.start(index);
        }
        self.vrings[index].run(prepared, &surroundings);
    }

    fn start_all(&mut self) {
        (0..self.vrings.len()).for_each(|index| self.start(index));
    }

    fn stop_all(&mut self) {
        Vring::stop_all(&mut self.vrings, Stop::Drain, &self.hurry);
    }

    /// After a message that stopped a ring: if it was the last one, and guest memory is logged, the guest is about to go on
    /// elsewhere, with another daemon. That one must be able to open the disk when this message is answered. False if the
    /// disk is kept because something could not be made durable.
    fn release_if_migrated(&mut self) -> bool {
        if self.log_in_use().is_none() || self.vrings.iter().any(Vring::is_running) {
            return true;
        }
        match self.outside_of_a_step(D::release) {
            Ok(true) => info!("all queues are stopped while guest memory is logged: the image is released"),
            Ok(false) => {}
            Err(error) => {
                warn!(%error, "the image is not released");
                return false;
            }
        }
        true
    }

    /// Puts a memory table in use. While queues run, it must keep every mapping of the old table.
    fn use_table(&mut self, table: MemoryTable) {
        self.table = table;
        self.shared.set_memory(self.table.memory());
        self.start_all();
    }

    /// Combines FLUSH and the `writeback` byte.
    fn update_write_through(&mut self) {
        let flush = self.features.is_some_and(|features| features & FLUSH != 0);
        self.shared.set_write_through(!(flush && self.cache.is_on()));
    }

    /// Turns the write cache on or off. Writes made while it was on must not stay in it: false if the disk could not make
    /// them durable.
    fn change_cache(&mut self, change: impl FnOnce(&mut WriteCache)) -> bool {
        let was = self.cache.is_on();
        change(&mut self.cache);
        if let (Some(region), Some(on)) = (&self.region, self.cache.known()) {
            region.keep_write_cache(on);
        }
        self.update_write_through();
        if !was || self.cache.is_on() {
            return true;
        }
        if !self.vrings.iter().any(Vring::is_running) {
            return self.flush();
        }
        // Each is drained before it flushes: a write that began in the cache must not end after the flush. No ring is chosen
        // to flush for the others, as its worker may have ended by itself.
        let durable = Vring::stop_all(&mut self.vrings, Stop::DrainAndFlush, &self.hurry);
        self.start_all();
        durable
    }
}

impl<D: BlockDevice> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        self.vrings.iter_mut().for_each(|vring| vring.enabled = false);
        // The device begins anew, and so does its record, whoever uses it next.
        if let Some(region) = &self.region {
            region.empty();
        }
        self.end_journal();
        self.cache = WriteCache::new();
        self.update_write_through();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            warn!(
                "the frontend sets features that were not offered: {}; they are ignored",
                config::names(unknown)
            );
        }
        let features = features & self.offered();
        if self.features == Some(features) {
            return Ok(());
        }
        // The log may have come before regions that it has no bits for.
        if let (true, Some(log)) = (features & LOG_ALL != 0, &self.log)
            && let Err(error) = log.check_covers(self.table.end())
        {
            return self.refuse(error);
        }
        // Also where only LOG_ALL changes, when a migration begins or ends: the rings start anew, with all their
        // requests logged or none.
        self.stop_all();
        if self.shared.lines.features.admits(Instant::now()) {
            info!("features in force: {} ({features:#x})", config::names(features));
        }
        self.features = Some(features);
        self.update_write_through();
        self.start_all();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let infos: Vec<_> = regions.iter().map(RegionInfo::from).collect();
        match self.table.with_regions(&infos, files) {
            Ok(table) => {
                self.check_logged(&table)?;
                self.stop_all();
                self.use_table(table);
                Ok(None)
            }
            Err(error) => self.refuse(error),
        }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEMORY_SLOTS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        match self.table.with_region(RegionInfo::from(&**region), file) {
            Ok(table) => {
                self.check_logged(&table)?;
                self.use_table(table);
                Ok(None)
            }
            Err(error) => self.refuse(error),
        }
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        match self.table.without_region(RegionInfo::from(&**region)) {
            Ok(table) => {
                self.stop_all();
                self.use_table(table);
                Ok(())
            }
            Err(error) => self.refuse(error),
        }
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = self.check_queue(index)?;
        let (limit, packed) = (self.options.queue_size, self.is_packed());
        let is_size = |size: &u16| if packed { *size > 0 } else { size.is_power_of_two() };
        let size = u16::try_from(num).ok().filter(|size| is_size(size) && *size <= limit);
        let Some(size) = size else { return self.refuse(Refusal::QueueSize { size: num, limit }) };
        if !self.vrings[queue].set_size(size) {
            return self.refuse(Refusal::Running { index });
        }
        self.start(queue);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let queue = self.check_queue(index)?;
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        self.vrings[queue].set_addresses(UserAddresses {
            descriptors: descriptor,
            available,
            used,
            used_log,
        });
        self.start(queue);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = self.check_queue(index)?;
        if !self.is_packed() && base > u32::from(u16::MAX) {
            return self.refuse(Refusal::Base { base });
        }
        if !self.vrings[queue].set_base(base) {
            return self.refuse(Refusal::Running { index });
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = self.check_queue(index)?;
        // The other rings leave the processors and the disk to the one that is stopped.
        self.shared.hold(HELD_BY_A_STOP);
        let was_running = self.vrings[queue].is_running();
        let base = self.vrings[queue].take_base(self.features.unwrap_or(0));
        // Most likely they are stopped next, one after another.
        self.shared.hold(HELD_AFTER_A_STOP);
        if was_running && !self.release_if_migrated() {
            return self.refuse(Refusal::NotDurable);
        }
        self.vrings[queue].tell();
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (queue, file) = self.check_event(index, file)?;
        let polling = file.is_none();
        self.vrings[queue].set_kick(file.map(eventfd_from));
        if polling {
            return self.refuse(Refusal::Polling);
        }
        self.start(queue);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (queue, file) = self.check_event(index, file)?;
        let vring = &self.vrings[queue];
        vring.call.set(file);
        // The worker may just have raised the previous descriptor.
        if vring.is_running() {
            vring.call.raise();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (queue, file) = self.check_event(index, file)?;
        self.vrings[queue].error.set(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !config::protocol_features().bits();
        if unknown != 0 {
            warn!("the frontend sets protocol features that were not offered: {unknown:#x}");
        }
        self.protocol_features = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.options.num_queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.check_queue(index)?;
        self.vrings[queue].enabled = enable;
        if enable {
            self.start(queue);
        } else {
            // Cloud Hypervisor pauses a machine by this message alone, and its user may then copy the image. It resumes
            // with the available index of that moment as base, so what stays in the ring would be lost.
            let was_running = self.vrings[queue].is_running();
            let flushed = Vring::stop_all([&mut self.vrings[queue]], Stop::Pause, &self.hurry);
            if !flushed || (was_running && !self.release_if_migrated()) {
                return self.refuse(Refusal::NotDurable);
            }
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let ServeOptions { num_queues, queue_size, .. } = self.options;
        match config::read(&self.profile, num_queues, queue_size, self.cache.is_on(), offset, size) {
            Some(bytes) => Ok(bytes),
            None => self.refuse(Refusal::ConfigRead { offset, size }),
        }
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match bytes {
            [value @ (0 | 1)] if usize::try_from(offset) == Ok(WRITEBACK_OFFSET) => {
                debug!(writeback = value, "the guest sets the write cache");
                let durable = self.change_cache(|cache| cache.set(*value == 1));
                if durable { Ok(()) } else { self.refuse(Refusal::NotDurable) }
            }
            _ => self.refuse(Refusal::ConfigWrite { offset }),
        }
    }

    fn set_backend_req_fd(&mut self, _: Backend) {
        // `vhost` has checked the socket. It offers no way to send this device's one message, so a copy is used.
        self.options.back_channel.set(self.channel.take());
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        self.refuse(Refusal::NotOffered("a display"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        self.refuse(Refusal::NotOffered("SHARED_OBJECT"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        // It is used once the frontend sends it back.
        match Claim::check(wanted, self.region_limits()).and_then(Claim::create) {
            Ok(created) => Ok(created),
            Err(error) => self.refuse(error),
        }
    }

    fn set_inflight_fd(&mut self, claimed: &VhostUserInflight, file: File) -> Result<()> {
        let memory = self.table.memory();
        let checked = Claim::check(claimed, self.region_limits());
        match checked.and_then(|claim| Region::map(claim, file, memory.loss())) {
            Ok(region) => {
                self.stop_all();
                if let Err(error) = self.outside_of_a_step(|device| device.keep_journal(region.journal())) {
                    self.start_all();
                    return self.refuse(Refusal::Journal(error));
                }
                let kept = region.write_cache();
                self.region = Some(region);
                self.change_cache(|cache| cache.take_over(kept));
                self.start_all();
                Ok(())
            }
            Err(error) => self.refuse(error),
        }
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        self.refuse(Refusal::NotOffered("DEVICE_STATE"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.refuse(Refusal::NotOffered("DEVICE_STATE"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.refuse(Refusal::NotOffered("SHMEM"))
    }

    fn set_log_base(&mut self, claimed: &VhostUserLog, file: File) -> Result<()> {
        let memory = self.table.memory();
        let mapped = DirtyLog::map(claimed, file, memory.loss());
        match mapped.and_then(|log| log.check_covers(self.table.end()).map(|()| log)) {
            Ok(log) => {
                // Nothing goes to the old log after the answer: the frontend then reads it for the last time.
                let in_use = self.is_logging_wanted();
                if in_use {
                    self.stop_all();
                }
                self.log = Some(Arc::new(log));
                if in_use {
                    self.start_all();
                }
                Ok(())
            }
            Err(error) => self.refuse(error),
        }
    }
}
