//! vhost-user messages by hand, such as a proper client would never send.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::guest::F_PACKED;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;

/// The reply to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A payload.
    Payload(Vec<u8>),
    /// The connection was closed.
    Closed,
}

impl Reply {
    pub fn number(&self) -> Option<u64> {
        match self {
            Reply::Payload(bytes) => Some(u64::from_ne_bytes(bytes[..].try_into().ok()?)),
            Reply::Closed => None,
        }
    }
}

pub struct Raw {
    pub stream: UnixStream,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Raw { stream }
    }

    /// A connection with REPLY_ACK, MQ, CONFIG and CONFIGURE_MEM_SLOTS in force, and split rings.
    pub fn negotiated(path: &Path) -> Self {
        let mut raw = Self::connect(path);
        raw.tell(SET_OWNER, &[], &[]);
        let features = raw.ask(GET_FEATURES, &[], &[]).number().expect("features");
        raw.ask(GET_PROTOCOL_FEATURES, &[], &[]).number().expect("protocol features");
        assert_eq!(raw.ask(SET_PROTOCOL_FEATURES, &0x8209u64.to_ne_bytes(), &[]).number(), Some(0));
        let features = features & !F_PACKED;
        assert_eq!(raw.ask(SET_FEATURES, &features.to_ne_bytes(), &[]).number(), Some(0));
        raw
    }

    /// Sends a message without a request for acknowledgement.
    pub fn tell(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) {
        self.send(request, VERSION, payload.len() as u32, payload, fds);
    }

    /// Sends a message that requests an acknowledgement, and returns the reply.
    pub fn ask(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> Reply {
        self.send(request, VERSION | NEED_REPLY, payload.len() as u32, payload, fds);
        self.reply()
    }

    pub fn send(&mut self, request: u32, flags: u32, size: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = Vec::new();
        message.extend(request.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(size.to_ne_bytes());
        message.extend(payload);
        let _ = self.stream.send_with_fds(&[&message[..]], fds);
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn reply(&mut self) -> Reply {
        let mut header = [0; 12];
        if let Err(error) = self.stream.read_exact(&mut header) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "neither a reply nor the end");
            return Reply::Closed;
        }
        let size = u32::from_ne_bytes(header[8..].try_into().expect("four bytes"));
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).expect("the payload that the header promises");
        Reply::Payload(payload)
    }

    /// True if the session is still served.
    pub fn lives(&mut self) -> bool {
        self.ask(GET_FEATURES, &[], &[]).number().is_some()
    }
}

/// Two 32-bit numbers: a queue and a value.
pub fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// struct vhost_vring_addr.
pub fn address(index: u32, descriptors: u64, used: u64, available: u64) -> Vec<u8> {
    let mut bytes = state(index, 0);
    for number in [descriptors, used, available, 0] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

/// One memory region: guest address, size, user address, offset.
pub fn region(parts: [u64; 4]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.to_ne_bytes()).collect()
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region(parts: [u64; 4]) -> Vec<u8> {
    [vec![0; 8], region(parts)].concat()
}

/// The payload of SET_MEM_TABLE.
pub fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = state(regions.len() as u32, 0);
    regions.iter().for_each(|parts| bytes.extend(region(*parts)));
    bytes
}

/// The payload of GET_CONFIG and SET_CONFIG.
pub fn config(offset: u32, size: u32, space: &[u8]) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &size.to_ne_bytes(), &0u32.to_ne_bytes(), space].concat()
}

/// Descriptors that this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

pub fn raw_fds<T: AsRawFd>(files: &[T]) -> Vec<RawFd> {
    files.iter().map(AsRawFd::as_raw_fd).collect()
}
