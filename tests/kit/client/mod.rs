//! A vhost-user-blk client: a guest's driver and its VMM in one, without a guest or a VMM.
//!
//! [`Session`] is the VMM's part, [`Queue`] the driver's, [`Client`] both with a simple blocking interface. It does
//! not depend on Strata, so it also drives other implementations.

mod config;
mod error;
mod events;
mod layout;
#[cfg(test)]
mod loopback;
mod memory;
mod queue;
mod raw;
mod request;
mod ring;
mod session;

pub use config::{BlockConfig, CONFIG_BYTES};
pub use error::ClientError;
pub use memory::{GUEST_BASE, PAGE, SharedMemory, View};
pub use queue::{Completion, Queue, Slot, Ticket};
pub use raw::{RawEvent, RawRing};
pub use request::{
    Command, Direction, ID_BYTES, Outcome, Request, SECTOR, SEGMENT_BYTES, Segment, Status, UNMAP,
};
pub use ring::{Descriptor, INDIRECT, NEXT, Used, WRITE};
pub use session::Session;

use std::path::Path;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// How the device learns of the guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMessages {
    /// One SET_MEM_TABLE.
    Table,
    /// An ADD_MEM_REG for each region.
    Regions,
}

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtio features to accept if the device offers them, as bits.
    pub features: u64,
    /// Protocol features to accept if the device offers them.
    pub protocol_features: Protocol,
    /// Queues to start.
    pub queues: usize,
    /// Entries of each ring: a power of two.
    pub queue_size: u16,
    /// Bytes of data that one request can carry; rounded up to whole pages.
    pub data_capacity: usize,
    /// The most data descriptors of one request: its data is cut into about equal pieces.
    pub segments: u16,
    /// Put each request's descriptors into an indirect table, if negotiated.
    pub indirect: bool,
    /// At most this many requests in flight per queue, whatever the size of the ring.
    pub slots_max: u16,
    /// Cut the memory into this many adjacent regions (at most 32 in a table).
    pub regions: usize,
    /// How the device learns of the regions.
    pub memory_messages: MemoryMessages,
    /// The first avail and used index, as after a migration; near 65,535 to reach the wrap early.
    pub base: u16,
    /// Keep an in-flight region, so that the client can connect again after the device died.
    pub in_flight: bool,
    /// The longest wait for any answer.
    pub timeout: Duration,
    /// The longest polling of a used ring before sleeping; zero sleeps at once.
    pub spin_max: Duration,
}

/// Every feature that this driver supports, as bits of the feature word.
pub const DRIVER_FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    | 1 << VIRTIO_F_VERSION_1;

impl Default for Options {
    fn default() -> Self {
        Self {
            features: DRIVER_FEATURES,
            protocol_features: Protocol::MQ
                | Protocol::REPLY_ACK
                | Protocol::CONFIG
                | Protocol::CONFIGURE_MEM_SLOTS,
            queues: 1,
            queue_size: 256,
            data_capacity: 1 << 20,
            segments: 1,
            indirect: true,
            slots_max: u16::MAX,
            regions: 1,
            memory_messages: MemoryMessages::Table,
            base: 0,
            in_flight: false,
            timeout: Duration::from_secs(30),
            spin_max: Duration::from_micros(50),
        }
    }
}

impl Options {
    /// The defaults with this many queues.
    pub fn with_queues(queues: usize) -> Self {
        Self { queues, ..Self::default() }
    }

    /// Removes features, given by their bit numbers, from those to accept.
    #[must_use]
    pub fn without(mut self, bits: &[u32]) -> Self {
        for bit in bits {
            self.features &= !(1 << bit);
        }
        self
    }
}

/// A session with its queues started.
pub struct Client {
    session: Session,
    queues: Vec<Queue>,
}

impl Client {
    /// Connects, negotiates, shares memory, starts every ring.
    ///
    /// # Errors
    /// As [`Session::connect`] and [`Session::start`].
    pub fn connect(path: impl AsRef<Path>, options: &Options) -> Result<Self, ClientError> {
        let mut session = Session::connect(path.as_ref(), options)?;
        let queues = session.start()?;
        Ok(Self { session, queues })
    }

    /// Connects to another device, or to the same one started again. The rings, the requests in flight and the
    /// in-flight region stay as they are; see [`Session::reconnect`]. On an error the client is as before.
    ///
    /// # Errors
    /// When no server accepts, or a message fails.
    pub fn reconnect(&mut self, path: impl AsRef<Path>) -> Result<(), ClientError> {
        self.session.reconnect(path.as_ref(), &mut self.queues)
    }

    /// The control side.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// One queue.
    ///
    /// # Panics
    /// When there is no such queue.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// All queues, to be handed to threads.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// Takes the client apart. Dropping the [`Session`] ends the session, even while queues exist.
    pub fn into_parts(self) -> (Session, Vec<Queue>) {
        (self.session, self.queues)
    }

    /// The configuration space.
    pub fn config(&self) -> &BlockConfig {
        self.session.config()
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.session.config().size()
    }

    /// Reads into `data` by one request on queue 0. On a bad status `data` is unchanged.
    ///
    /// # Errors
    /// When the request could not be sent or answered.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<Status, ClientError> {
        let outcome = self.queues[0].run(&Request::Read { offset, length: data.len() })?;
        if outcome.status.is_ok() {
            data.copy_from_slice(&outcome.data);
        }
        Ok(outcome.status)
    }

    /// Writes by one request on queue 0.
    ///
    /// # Errors
    /// When the request could not be sent or answered.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<Status, ClientError> {
        self.status(&Request::Write { offset, data })
    }

    /// Flushes by queue 0.
    ///
    /// # Errors
    /// When the request could not be sent or answered.
    pub fn flush(&mut self) -> Result<Status, ClientError> {
        self.status(&Request::Flush)
    }

    /// Discards one range, in bytes, by queue 0.
    ///
    /// # Errors
    /// When the request could not be sent or answered.
    pub fn discard(&mut self, offset: u64, length: u64) -> Result<Status, ClientError> {
        self.status(&Request::Discard(&[Segment { offset, length, flags: 0 }]))
    }

    /// Writes zeroes to one range, in bytes, by queue 0.
    ///
    /// # Errors
    /// When the request could not be sent or answered.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> Result<Status, ClientError> {
        let flags = if unmap { UNMAP } else { 0 };
        self.status(&Request::WriteZeroes(&[Segment { offset, length, flags }]))
    }

    /// Requests the serial number, without the zero bytes at its end.
    ///
    /// # Errors
    /// When the request could not be sent, or was answered with a bad status.
    pub fn get_id(&mut self) -> Result<Vec<u8>, ClientError> {
        let outcome = self.queues[0].run(&Request::GetId)?;
        if !outcome.status.is_ok() {
            return Err(ClientError::Status { what: "get id", offset: 0, status: outcome.status });
        }
        let end = outcome.data.iter().position(|byte| *byte == 0).unwrap_or(outcome.data.len());
        Ok(outcome.data[..end].to_vec())
    }

    /// Reads a range of any length by as many requests as necessary.
    ///
    /// # Errors
    /// When a request could not be sent, or was answered with a bad status.
    pub fn read_range(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, ClientError> {
        let mut data = vec![0; length];
        let piece = self.queues[0].capacity();
        let mut at = offset;
        for part in data.chunks_mut(piece) {
            let status = self.read(at, part)?;
            if !status.is_ok() {
                return Err(ClientError::Status { what: "read", offset: at, status });
            }
            at += part.len() as u64;
        }
        Ok(data)
    }

    /// Sends a request on any queue.
    ///
    /// # Errors
    /// As [`Queue::submit`].
    pub fn submit(&mut self, queue: usize, request: &Request<'_>) -> Result<Ticket, ClientError> {
        self.queues[queue].submit(request)
    }

    /// Collects the completed requests of every queue without waiting. Returns their number.
    ///
    /// # Errors
    /// As [`Queue::poll`].
    pub fn poll(&mut self) -> Result<usize, ClientError> {
        self.queues.iter_mut().try_fold(0, |sum, queue| Ok(sum + queue.poll()?))
    }

    /// Waits for a request sent by [`Client::submit`].
    ///
    /// # Errors
    /// As [`Queue::wait`].
    pub fn wait(&mut self, ticket: Ticket) -> Result<Outcome, ClientError> {
        self.queues[ticket.queue()].wait(ticket)
    }

    /// Stops every ring and closes the session; see [`Session::close`].
    ///
    /// # Errors
    /// When the device refuses a message.
    pub fn close(self) -> Result<Vec<u16>, ClientError> {
        self.session.close()
    }

    /// Closes the session without a message; see [`Session::abandon`].
    pub fn abandon(self) {
        self.session.abandon();
    }

    fn status(&mut self, request: &Request<'_>) -> Result<Status, ClientError> {
        Ok(self.queues[0].run(request)?.status)
    }
}
