//! The stock rust-vmm backend: a raw file behind `vhost-user-backend` and `virtio-queue`, written as their
//! documentation suggests.
//!
//! It is a peer in `cargo bench-peers` and a second implementation for the protocol tests, and not part of the product.
//! It has one thread per queue, one file handle per thread, and one plain read or write per request. It serves one
//! session and returns.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use strata_kit::client::SECTOR;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueOwnedT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// The largest ring size on offer.
const QUEUE_SIZE: usize = 1024;
/// Bytes of the configuration space up to and including the discard fields.
const CONFIG_BYTES: usize = 60;
/// The feature bit for protocol features (vhost-user specification, "Feature bits").
const PROTOCOL_FEATURES: u32 = 30;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Guest = <Memory as GuestAddressSpace>::T;
type Chain = virtio_queue::DescriptorChain<Guest>;

/// A raw file as a block device.
struct StockDisk {
    /// One file handle per queue, because each queue needs its own file position.
    files: Vec<Mutex<Handle>>,
    sectors: u64,
    memory: Memory,
    event_idx: AtomicBool,
}

/// A queue's file handle and buffer.
struct Handle {
    file: File,
    buffer: Vec<u8>,
}

/// Serves a raw file to one frontend, until the frontend disconnects.
pub fn serve(socket: &Path, image: &Path, queues: u16) -> Result<()> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let disk = Arc::new(StockDisk::open(image, queues, memory.clone())?);
    let mut daemon = VhostUserDaemon::new("stock".to_owned(), disk, memory)
        .map_err(|error| anyhow::anyhow!("cannot start the stock backend: {error:?}"))?;
    daemon.serve(socket).map_err(|error| anyhow::anyhow!("the stock backend failed: {error:?}"))
}

impl StockDisk {
    fn open(image: &Path, queues: u16, memory: Memory) -> Result<Self> {
        let open = || File::options().read(true).write(true).open(image);
        let bytes =
            open().and_then(|file| file.metadata()).with_context(|| image.display().to_string())?.len();
        let handle = |_| Ok(Mutex::new(Handle { file: open()?, buffer: Vec::new() }));
        let files = (0..queues).map(handle).collect::<io::Result<_>>()?;
        Ok(Self { files, sectors: bytes / SECTOR, memory, event_idx: AtomicBool::new(false) })
    }

    /// Serves all available chains.
    fn drain(&self, vring: &VringRwLock, handle: &mut Handle) -> io::Result<()> {
        let memory = self.memory.memory();
        let chains: Vec<Chain> = {
            let mut state = vring.get_mut();
            state.get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.collect()
        };
        for chain in chains {
            let head = chain.head_index();
            // A chain without a status byte cannot report a status, and is returned with length 0.
            let written = self.serve_chain(chain, &memory, handle).unwrap_or(0);
            vring.add_used(head, written).map_err(io::Error::other)?;
            if vring.needs_notification().map_err(io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
        Ok(())
    }

    /// Serves one request. Returns the number of bytes written to the guest, the status byte included.
    fn serve_chain(&self, chain: Chain, memory: &Guest, handle: &mut Handle) -> io::Result<u32> {
        let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(memory).map_err(io::Error::other)?;
        let data_bytes = writer.available_bytes().checked_sub(1).ok_or(io::ErrorKind::InvalidData)?;
        let mut status = writer.split_at(data_bytes).map_err(io::Error::other)?;
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes of sixteen"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes of sixteen"));
        let result = self.transfer(kind, sector, &mut reader, &mut writer, handle);
        status.write_all(&[result.unwrap_or(VIRTIO_BLK_S_IOERR as u8)])?;
        u32::try_from(writer.bytes_written() + 1).map_err(io::Error::other)
    }

    /// Carries out a request. Returns its status.
    fn transfer(
        &self,
        kind: u32,
        sector: u64,
        reader: &mut impl Read,
        writer: &mut virtio_queue::Writer<'_>,
        handle: &mut Handle,
    ) -> io::Result<u8> {
        match kind {
            VIRTIO_BLK_T_IN => {
                handle.buffer.resize(writer.available_bytes(), 0);
                self.seek(&mut handle.file, sector, handle.buffer.len())?;
                handle.file.read_exact(&mut handle.buffer)?;
                writer.write_all(&handle.buffer)?;
            }
            VIRTIO_BLK_T_OUT => {
                handle.buffer.clear();
                reader.read_to_end(&mut handle.buffer)?;
                self.seek(&mut handle.file, sector, handle.buffer.len())?;
                handle.file.write_all(&handle.buffer)?;
            }
            VIRTIO_BLK_T_FLUSH => handle.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => writer.write_all(&b"stock\0"[..writer.available_bytes().min(6)])?,
            _ => return Ok(VIRTIO_BLK_S_UNSUPP as u8),
        }
        Ok(VIRTIO_BLK_S_OK as u8)
    }

    /// Seeks to a sector, if the disk has `bytes` bytes from there on.
    fn seek(&self, file: &mut File, sector: u64, bytes: usize) -> io::Result<()> {
        let end = sector.checked_mul(SECTOR).and_then(|start| start.checked_add(bytes as u64));
        if end.is_none_or(|end| end > self.sectors * SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        file.seek(SeekFrom::Start(sector * SECTOR)).map(drop)
    }
}

impl VhostUserBackend for StockDisk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.files.len()
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
            PROTOCOL_FEATURES,
        ];
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn protocol_features(&self) -> Protocol {
        Protocol::CONFIG | Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&self.sectors.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[34..36].copy_from_slice(&(self.files.len() as u16).to_le_bytes());
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        config.get(range).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, _: Memory) -> io::Result<()> {
        // Nothing to do: `self.memory` is shared with the daemon, which has updated it.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.files.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[VringRwLock], thread: usize) -> io::Result<()> {
        let vring = vrings.get(usize::from(event)).ok_or(io::ErrorKind::NotFound)?;
        let mut handle = self.files[thread].lock().unwrap_or_else(PoisonError::into_inner);
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.drain(vring, &mut handle);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.drain(vring, &mut handle)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
