//! The control side of a client: connecting, negotiating, memory, starting and stopping rings.
//!
//! Owns the socket and the shared memory. It sends a frontend's messages and knows nothing of requests.
//! [`Session::frontend`] gives tests the bare protocol for other messages.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::VringConfigData;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::config::{BlockConfig, CONFIG_BYTES};
use super::events::Events;
use super::layout::QueueLayout;
use super::memory::SharedMemory;
use super::queue::{Parts, Queue};
use super::{ClientError, MemoryMessages, Options};

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The in-flight region that a device made and the client keeps.
struct InFlightRegion {
    message: VhostUserInflight,
    file: File,
}

/// A negotiated session.
pub struct Session {
    frontend: Frontend,
    socket: Arc<UnixStream>,
    options: Options,
    offered: u64,
    features: u64,
    protocol: Protocol,
    config: BlockConfig,
    memory: Option<Arc<SharedMemory>>,
    region: Option<Arc<InFlightRegion>>,
    started: Vec<usize>,
}

impl Session {
    /// Connects and negotiates: owner, features, protocol features, number of queues, configuration. Shares no
    /// memory and starts no ring yet.
    ///
    /// # Errors
    /// When no server accepts, a message fails or the device does not support what the options require.
    pub fn connect(path: &Path, options: &Options) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Self::over(stream, options)
    }

    /// As [`Session::connect`], over a stream that is already connected.
    ///
    /// # Errors
    /// When a message fails or the device does not support what the options require.
    pub fn over(stream: UnixStream, options: &Options) -> Result<Self, ClientError> {
        // A device that never answers must fail a test, not hang it.
        stream.set_read_timeout(Some(options.timeout)).map_err(ClientError::host("socket timeout"))?;
        let socket = stream.try_clone().map_err(ClientError::host("socket"))?;
        let frontend = Frontend::from_stream(stream, options.queues as u64);
        let mut session = Self {
            frontend,
            socket: Arc::new(socket),
            options: options.clone(),
            offered: 0,
            features: 0,
            protocol: Protocol::empty(),
            config: BlockConfig::default(),
            memory: None,
            region: None,
            started: Vec::new(),
        };
        session.negotiate()?;
        Ok(session)
    }

    fn negotiate(&mut self) -> Result<(), ClientError> {
        let message = ClientError::message;
        self.frontend.set_owner().map_err(message("SET_OWNER"))?;
        self.offered = self.frontend.get_features().map_err(message("GET_FEATURES"))?;
        self.features = self.offered & self.options.features;
        if self.features & PROTOCOL_FEATURES == 0 {
            return Err(ClientError::NotOffered("protocol features"));
        }
        let offered = self.frontend.get_protocol_features().map_err(message("GET_PROTOCOL_FEATURES"))?;
        self.protocol = offered & self.options.protocol_features;
        if self.options.in_flight {
            if !offered.contains(Protocol::INFLIGHT_SHMFD) {
                return Err(ClientError::NotOffered("in-flight region"));
            }
            self.protocol |= Protocol::INFLIGHT_SHMFD;
        }
        self.frontend.set_protocol_features(self.protocol).map_err(message("SET_PROTOCOL_FEATURES"))?;
        if self.protocol.contains(Protocol::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = self.options.queues as u64;
        let offered = if self.protocol.contains(Protocol::MQ) {
            self.frontend.get_queue_num().map_err(message("GET_QUEUE_NUM"))?
        } else {
            1
        };
        if offered < queues {
            return Err(ClientError::TooFew { what: "queues", wanted: queues, offered });
        }
        if self.protocol.contains(Protocol::CONFIG) {
            self.config = BlockConfig::parse(&self.read_config(0, CONFIG_BYTES as u32)?);
        }
        self.frontend.set_features(self.features).map_err(message("SET_FEATURES"))
    }

    /// Reads part of the configuration space (GET_CONFIG), offset and size in bytes.
    ///
    /// # Errors
    /// When the device refuses or answers with another size.
    pub fn read_config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, ClientError> {
        let zeroes = vec![0; size as usize];
        let reply = self.frontend.get_config(offset, size, VhostUserConfigFlags::empty(), &zeroes);
        Ok(reply.map_err(ClientError::message("GET_CONFIG"))?.1)
    }

    /// Writes one byte of the configuration space (SET_CONFIG).
    ///
    /// # Errors
    /// When the device refuses.
    pub fn write_config(&mut self, offset: u32, byte: u8) -> Result<(), ClientError> {
        let written = self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, &[byte]);
        written.map_err(ClientError::message("SET_CONFIG"))
    }

    /// Lays out and shares the memory for all queues, and starts their rings.
    ///
    /// # Errors
    /// When a message fails or the host has no memory for it.
    pub fn start(&mut self) -> Result<Vec<Queue>, ClientError> {
        let options = self.options.clone();
        let indirect = options.indirect && self.has(VIRTIO_RING_F_INDIRECT_DESC);
        let mut layouts = Vec::with_capacity(options.queues);
        let mut end = 0;
        for _ in 0..options.queues {
            let layout = QueueLayout::new(
                end,
                options.queue_size,
                options.segments,
                options.data_capacity,
                indirect,
                options.slots_max,
            );
            end = layout.end;
            layouts.push(layout);
        }
        let memory = Arc::new(SharedMemory::new(end).map_err(ClientError::host("shared memory"))?);
        self.share_memory(&memory)?;
        if options.in_flight {
            let wanted = VhostUserInflight::new(0, 0, options.queues as u16, options.queue_size);
            let (message, file) =
                self.frontend.get_inflight_fd(&wanted).map_err(ClientError::message("GET_INFLIGHT_FD"))?;
            self.region = Some(Arc::new(InFlightRegion { message, file }));
            self.send_region()?;
        }
        let mut queues = Vec::with_capacity(layouts.len());
        for (index, layout) in layouts.into_iter().enumerate() {
            let queue = Queue::new(Parts {
                index,
                memory: Arc::clone(&memory),
                layout,
                events: Events::new(&self.socket)?,
                event_idx: self.has(VIRTIO_RING_F_EVENT_IDX),
                base: options.base,
                timeout: options.timeout,
                spin_max: options.spin_max,
            });
            self.start_ring(&queue, options.base)?;
            queues.push(queue);
        }
        self.memory = Some(memory);
        // Without REPLY_ACK no message so far has confirmed the others: this one has a reply.
        self.frontend.get_features().map_err(ClientError::message("GET_FEATURES"))?;
        Ok(queues)
    }

    /// Replaces the session by a new one with the same memory, rings and in-flight region. It does so in the order
    /// of Cloud Hypervisor. A ring begins at the index up to which requests are available, whether or not the
    /// device that died had taken them. Nothing but the region says what it had in flight.
    ///
    /// # Errors
    /// When no server accepts, or a message fails; then the old session is left.
    pub fn reconnect(&mut self, path: &Path, queues: &mut [Queue]) -> Result<(), ClientError> {
        let message = ClientError::message;
        let mut session = Self::connect(path, &self.options)?;
        session.memory.clone_from(&self.memory);
        session.region.clone_from(&self.region);
        if let Some(memory) = &self.memory {
            session.share_memory(memory)?;
        }
        let frontend = &mut session.frontend;
        for queue in queues.iter() {
            frontend.set_vring_num(queue.index(), queue.ring_size()).map_err(message("SET_VRING_NUM"))?;
        }
        session.send_region()?;
        let frontend = &mut session.frontend;
        for queue in queues.iter_mut() {
            let index = queue.index();
            queue.set_events(Events::new(&session.socket)?);
            let (addresses, events) = (queue.vring_addresses(), queue.events());
            frontend.set_vring_addr(index, &addresses).map_err(message("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, queue.available_index()).map_err(message("SET_VRING_BASE"))?;
            frontend.set_vring_call(index, &events.call).map_err(message("SET_VRING_CALL"))?;
            frontend.set_vring_err(index, &events.error).map_err(message("SET_VRING_ERR"))?;
            frontend.set_vring_kick(index, &events.kick).map_err(message("SET_VRING_KICK"))?;
        }
        for queue in queues.iter() {
            session.enable(queue.index(), true)?;
            session.started.push(queue.index());
        }
        *self = session;
        Ok(())
    }

    fn send_region(&mut self) -> Result<(), ClientError> {
        let Some(region) = &self.region else { return Ok(()) };
        let sent = self.frontend.set_inflight_fd(&region.message, region.file.as_raw_fd());
        sent.map_err(ClientError::message("SET_INFLIGHT_FD"))
    }

    fn share_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<(), ClientError> {
        let regions = memory.regions(self.options.regions);
        match self.options.memory_messages {
            MemoryMessages::Table => {
                self.frontend.set_mem_table(&regions).map_err(ClientError::message("SET_MEM_TABLE"))?;
            }
            MemoryMessages::Regions => {
                if !self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
                    return Err(ClientError::NotOffered("memory slots"));
                }
                let offered =
                    self.frontend.get_max_mem_slots().map_err(ClientError::message("GET_MAX_MEM_SLOTS"))?;
                let wanted = regions.len() as u64;
                if offered < wanted {
                    return Err(ClientError::TooFew { what: "memory slots", wanted, offered });
                }
                for region in &regions {
                    self.frontend.add_mem_region(region).map_err(ClientError::message("ADD_MEM_REG"))?;
                }
            }
        }
        Ok(())
    }

    fn start_ring(&mut self, queue: &Queue, base: u16) -> Result<(), ClientError> {
        let message = ClientError::message;
        let index = queue.index();
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.ring_size()).map_err(message("SET_VRING_NUM"))?;
        frontend.set_vring_base(index, base).map_err(message("SET_VRING_BASE"))?;
        frontend.set_vring_addr(index, &queue.vring_addresses()).map_err(message("SET_VRING_ADDR"))?;
        frontend.set_vring_call(index, &queue.events().call).map_err(message("SET_VRING_CALL"))?;
        frontend.set_vring_err(index, &queue.events().error).map_err(message("SET_VRING_ERR"))?;
        frontend.set_vring_kick(index, &queue.events().kick).map_err(message("SET_VRING_KICK"))?;
        self.started.push(index);
        self.enable(index, true)
    }

    /// Enables or disables a ring (SET_VRING_ENABLE).
    ///
    /// # Errors
    /// When the device refuses.
    pub fn enable(&mut self, queue: usize, enabled: bool) -> Result<(), ClientError> {
        self.frontend.set_vring_enable(queue, enabled).map_err(ClientError::message("SET_VRING_ENABLE"))
    }

    /// Stops a ring (GET_VRING_BASE) and returns the next avail index that the device would have taken.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn stop_ring(&mut self, queue: usize) -> Result<u16, ClientError> {
        let base = self.frontend.get_vring_base(queue).map_err(ClientError::message("GET_VRING_BASE"))?;
        self.started.retain(|started| *started != queue);
        // Only 16 bits of the answer are valid for a split ring.
        Ok(base as u16)
    }

    /// Starts a stopped ring again at the given index, which must equal the queue's own indices. Sends its
    /// addresses and eventfds again.
    ///
    /// # Errors
    /// When a message fails.
    pub fn restart_ring(&mut self, queue: &Queue, base: u16) -> Result<(), ClientError> {
        self.start_ring(queue, base)
    }

    /// Stops every ring and closes the session, as a guest that shuts down does. Returns the last index per ring.
    ///
    /// # Errors
    /// When the device refuses a message; the session is closed anyway.
    pub fn close(mut self) -> Result<Vec<u16>, ClientError> {
        let started = std::mem::take(&mut self.started);
        started.into_iter().map(|queue| self.stop_ring(queue)).collect()
    }

    /// Closes the session without a message, as a VMM that is killed does. Dropping a session does the same.
    pub fn abandon(self) {
        drop(self);
    }

    /// The bare protocol.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The socket, for bytes that no frontend would send.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The memory shared with the device, once the session is started.
    pub fn memory(&self) -> Option<&Arc<SharedMemory>> {
        self.memory.as_ref()
    }

    /// Every virtio feature that the device offers, as bits.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// The virtio features in force, as bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a virtio feature, given by its bit's number, is in force.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// The protocol features in force.
    pub fn protocol_features(&self) -> Protocol {
        self.protocol
    }

    /// The configuration space at the start of the session.
    pub fn config(&self) -> &BlockConfig {
        &self.config
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The queues hold the socket too, so closing our descriptor alone would not end the session. A session that
        // has already ended is fine.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Queue {
    /// This queue's addresses for SET_VRING_ADDR.
    fn vring_addresses(&self) -> VringConfigData {
        let (layout, memory) = (self.ring_layout(), self.shared_memory());
        VringConfigData {
            queue_max_size: self.ring_size(),
            queue_size: self.ring_size(),
            flags: 0,
            desc_table_addr: memory.user_address(layout.descriptors),
            used_ring_addr: memory.user_address(layout.used),
            avail_ring_addr: memory.user_address(layout.available),
            log_addr: None,
        }
    }
}
