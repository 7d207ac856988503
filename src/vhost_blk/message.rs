//! The facts in a message's own bytes, read before `vhost` handles it.
//!
//! `vhost` handles a message and returns only whether that failed. The first bytes of the message show whether the
//! frontend gets a reply, and the bits of a queue index that `vhost` drops. Nothing here checks a message.

use vhost::vhost_user::message::FrontendReq;

/// Bytes of a message's header: request, flags and the payload's size, 32 bits each.
pub(crate) const HEADER: usize = 12;
const NEED_REPLY: u32 = 1 << 3;
/// In the payload of a message about a queue's descriptors: no descriptor is sent.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// The bytes of payload that a whole header announces; 0 if the header is not whole.
pub(crate) fn payload_bytes(header: &[u8]) -> usize {
    let size = header.get(8..HEADER).and_then(|size| <[u8; 4]>::try_from(size).ok());
    size.map_or(0, |size| u32::from_ne_bytes(size) as usize)
}

/// True for the first bytes of a message that gives a back channel.
pub(crate) fn gives_channel(bytes: &[u8]) -> bool {
    let request = bytes.first_chunk().map(|request| u32::from_ne_bytes(*request));
    request == Some(FrontendReq::SET_BACKEND_REQ_FD as u32)
}

/// The parts of a message that the session needs and `vhost` does not pass on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Envelope {
    request: Option<FrontendReq>,
    /// The frontend wants an acknowledgement.
    pub needs_reply: bool,
    /// The queue of a kick, call or error message at its full width.
    pub vring_index: Option<u64>,
}

impl Envelope {
    /// Reads a whole message.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let Some(([r0, r1, r2, r3, f0, f1, f2, f3, ..], payload)) = bytes.split_first_chunk::<HEADER>()
        else {
            return Self::default();
        };
        let request = FrontendReq::try_from(u32::from_ne_bytes([*r0, *r1, *r2, *r3])).ok();
        let flags = u32::from_ne_bytes([*f0, *f1, *f2, *f3]);
        let about_descriptor = matches!(
            request,
            Some(FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR)
        );
        let vring_index = payload
            .first_chunk()
            .filter(|_| about_descriptor)
            .map(|payload| u64::from_ne_bytes(*payload) & !NO_DESCRIPTOR);
        Envelope { request, needs_reply: flags & NEED_REPLY != 0, vring_index }
    }

    /// The message has no reply of its own, so REPLY_ACK gives it one.
    pub(crate) fn is_acknowledged(&self) -> bool {
        use FrontendReq as R;
        matches!(
            self.request,
            Some(
                R::SET_OWNER
                    | R::RESET_OWNER
                    | R::RESET_DEVICE
                    | R::SET_FEATURES
                    | R::SET_PROTOCOL_FEATURES
                    | R::SET_MEM_TABLE
                    | R::ADD_MEM_REG
                    | R::REM_MEM_REG
                    | R::SET_VRING_NUM
                    | R::SET_VRING_ADDR
                    | R::SET_VRING_BASE
                    | R::SET_VRING_KICK
                    | R::SET_VRING_CALL
                    | R::SET_VRING_ERR
                    | R::SET_VRING_ENABLE
                    | R::SET_CONFIG
                    | R::SET_BACKEND_REQ_FD
                    | R::SET_INFLIGHT_FD
            )
        )
    }

    pub(crate) fn is_set_config(&self) -> bool {
        self.request == Some(FrontendReq::SET_CONFIG)
    }

    /// The name for the log.
    pub(crate) fn name(&self) -> String {
        self.request.map_or_else(|| "unknown".to_owned(), |request| format!("{request:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, payload: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(request.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(8u32.to_ne_bytes());
        bytes.extend(payload.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_whole_index_is_seen() {
        let kick = FrontendReq::SET_VRING_KICK as u32;
        assert_eq!(Envelope::parse(&message(kick, 1, 0x203)).vring_index, Some(0x203));
        assert_eq!(Envelope::parse(&message(kick, 1, 0x103)).vring_index, Some(3));
        assert_eq!(Envelope::parse(&message(kick, 1, 3)[..19]).vring_index, None);
        assert_eq!(Envelope::parse(&message(FrontendReq::SET_VRING_NUM as u32, 1, 3)).vring_index, None);
    }

    #[test]
    fn a_header_tells_the_size_of_the_payload() {
        assert_eq!(payload_bytes(&message(1, 1, 0)), 8);
        assert_eq!(payload_bytes(&[0xff; 12]), u32::MAX as usize);
        assert_eq!(payload_bytes(&[0xff; 11]), 0);
    }

    #[test]
    fn replies_are_told_apart() {
        let set = Envelope::parse(&message(FrontendReq::SET_FEATURES as u32, 9, 0));
        assert!(set.needs_reply && set.is_acknowledged());
        let get = Envelope::parse(&message(FrontendReq::GET_VRING_BASE as u32, 9, 0));
        assert!(get.needs_reply && !get.is_acknowledged());
        assert!(!Envelope::parse(&[1, 2, 3]).is_acknowledged());
    }
}
