//! A frontend that speaks as Cloud Hypervisor does. It has that order of messages and an acknowledgement for each.
//! Rings begin at the available index, and there is no SET_CONFIG when it connects again.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::guest::{F_PROTOCOL, Guest, until};
use super::packed::Place;

/// The region that the frontend keeps.
pub struct InFlight {
    pub message: VhostUserInflight,
    pub file: File,
}

impl Guest {
    /// Connects with queues of these sizes, all of them new, and gets a region for them.
    pub fn connect_as_cloud(path: &Path, features: u64, sizes: &[u16]) -> (Self, InFlight) {
        let mut guest = Self::bare(UnixStream::pair().expect("a pair").0);
        until("it is served", || guest.greet(path));
        guest.features = features;
        sizes.iter().for_each(|size| guest.add_stopped_queue(*size));
        guest.set_up(None);
        let (num_queues, queue_size) = (sizes.len() as u16, sizes.iter().copied().max().unwrap_or(1));
        let wanted = VhostUserInflight::new(0, 0, num_queues, queue_size);
        let (message, file) = guest.frontend.get_inflight_fd(&wanted).expect("a region");
        let region = InFlight { message, file };
        guest.frontend.set_inflight_fd(&region.message, region.file.as_raw_fd()).expect("its own region");
        guest.start_all();
        (guest, region)
    }

    /// Hangs up.
    pub fn hang_up(&mut self) {
        let (nobody, _) = UnixStream::pair().expect("a pair");
        self.frontend = Frontend::from_stream(nobody, 64);
    }

    /// Hangs up, and waits until the server has ended the session.
    pub fn leave(&mut self, path: &Path) {
        self.hang_up();
        until("the session has ended", || self.greet(path));
        self.hang_up();
    }

    /// Connects again with the rings and the memory as they are, as often as it takes.
    pub fn reconnect(&mut self, path: &Path, region: Option<&InFlight>) {
        self.hang_up();
        until("it is served again", || self.greet(path));
        self.set_up(region);
        self.start_all();
    }

    /// Connects and sends the first messages. False if the server serves another session.
    fn greet(&mut self, path: &Path) -> bool {
        let stream = UnixStream::connect(path).expect("the server listens");
        self.frontend = Frontend::from_stream(stream, 64);
        self.frontend.set_owner().is_ok() && self.frontend.get_features().is_ok()
    }

    /// Everything between the first messages and the rings' start.
    fn set_up(&mut self, region: Option<&InFlight>) {
        let regions = [self.region(0), self.region(1)];
        let frontend = &mut self.frontend;
        let offered = frontend.get_protocol_features().expect("protocol features");
        let wanted = Protocol::MQ
            | Protocol::LOG_SHMFD
            | Protocol::CONFIG
            | Protocol::REPLY_ACK
            | Protocol::INFLIGHT_SHMFD;
        assert!(offered.contains(wanted));
        frontend.set_protocol_features(wanted).expect("protocol features");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.get_queue_num().expect("queues");
        frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).expect("the configuration");
        frontend.set_features(self.features | F_PROTOCOL).expect("features");
        frontend.set_mem_table(&regions).expect("memory");
        for queue in &self.queues {
            frontend.set_vring_num(queue.index, queue.size).expect("num");
        }
        if let Some(region) = region {
            frontend.set_inflight_fd(&region.message, region.file.as_raw_fd()).expect("the region");
        }
    }

    fn start_all(&mut self) {
        for index in 0..self.queues.len() {
            let config = self.config(index);
            let queue = &self.queues[index];
            self.frontend.set_vring_addr(index, &config).expect("addr");
            // QEMU, which uses packed rings, still has the base of the first start when a daemon has died.
            let base = if queue.packed.is_some() { Place::START.bits() } else { queue.next_available };
            self.frontend.set_vring_base(index, base).expect("base");
            self.frontend.set_vring_call(index, &queue.call).expect("call");
            self.frontend.set_vring_err(index, &queue.error).expect("err");
            self.frontend.set_vring_kick(index, &queue.kick).expect("kick");
        }
        for index in 0..self.queues.len() {
            self.frontend.set_vring_enable(index, true).expect("enable");
        }
    }
}
