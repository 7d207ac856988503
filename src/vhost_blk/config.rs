//! The device's offer: virtio features, protocol features and the configuration space (virtio 1.2, 5.2.3 and 5.2.4).
//! Pure functions of the disk's profile.

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::DeviceProfile;

/// FLUSH: without it every write must be durable before it is done.
pub(crate) const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// CONFIG_WCE: the guest may turn the write cache off and on.
pub(crate) const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
/// EVENT_IDX.
pub(crate) const EVENT_INDEX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// INDIRECT_DESC.
pub(crate) const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// RING_PACKED: rings are packed ones.
pub(crate) const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
/// vhost's own bit: all writes to guest memory are logged for a migration. A guest never sees it.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// vhost-user's own bit: protocol features can be negotiated, and rings start disabled.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Bytes in a sector of the virtio interface, whatever the block size.
pub(crate) const SECTOR: u64 = 512;
/// The longest segment that the device allows, in bytes.
const SIZE_MAX: u32 = 4 << 20;
/// The most data segments in a request, where the ring has room for them.
const SEG_MAX: u16 = 126;
/// The longest discard or write-zeroes segment, in sectors: 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// The most segments in a discard.
pub(crate) const MAX_DISCARD_SEGMENTS: usize = 32;
/// The most segments in a write zeroes.
pub(crate) const MAX_WRITE_ZEROES_SEGMENTS: usize = 1;

/// The offset of the `writeback` byte.
pub(crate) const WRITEBACK_OFFSET: usize = 32;
/// Bytes of the configuration space that are used here.
const CONFIG_BYTES: usize = 60;
/// The size of a vhost-user configuration space; up to here a read is padded with zeros.
const CONFIG_SPACE: usize = 256;

/// The virtio features on offer.
pub(crate) fn features(profile: &DeviceProfile, num_queues: u16) -> u64 {
    let bit = |number: u32| 1u64 << number;
    let mut features = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_F_ANY_LAYOUT)
        | INDIRECT
        | EVENT_INDEX
        | PACKED
        | PROTOCOL_FEATURES
        | LOG_ALL
        | FLUSH
        | bit(VIRTIO_BLK_F_SIZE_MAX)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | CONFIG_WCE;
    let mut offer = |wanted: bool, number: u32| features |= if wanted { bit(number) } else { 0 };
    offer(num_queues > 1, VIRTIO_BLK_F_MQ);
    offer(profile.read_only, VIRTIO_BLK_F_RO);
    offer(profile.discard && !profile.read_only, VIRTIO_BLK_F_DISCARD);
    offer(profile.write_zeroes && !profile.read_only, VIRTIO_BLK_F_WRITE_ZEROES);
    features
}

/// Virtio features of a block device by their names in the specification; others by their bit.
pub(crate) fn names(features: u64) -> String {
    const NAMES: [(u32, &str); 15] = [
        (VIRTIO_BLK_F_SIZE_MAX, "SIZE_MAX"),
        (VIRTIO_BLK_F_SEG_MAX, "SEG_MAX"),
        (VIRTIO_BLK_F_RO, "RO"),
        (VIRTIO_BLK_F_BLK_SIZE, "BLK_SIZE"),
        (VIRTIO_BLK_F_FLUSH, "FLUSH"),
        (VIRTIO_BLK_F_TOPOLOGY, "TOPOLOGY"),
        (VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE"),
        (VIRTIO_BLK_F_MQ, "MQ"),
        (VIRTIO_BLK_F_DISCARD, "DISCARD"),
        (VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES"),
        (VIRTIO_F_ANY_LAYOUT, "ANY_LAYOUT"),
        (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
        (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
        (VIRTIO_F_VERSION_1, "VERSION_1"),
        (VIRTIO_F_RING_PACKED, "RING_PACKED"),
    ];
    let name = |bit: u32| match NAMES.iter().find(|(number, _)| *number == bit) {
        Some((_, name)) => (*name).to_owned(),
        None if PROTOCOL_FEATURES == 1 << bit => "PROTOCOL_FEATURES".to_owned(),
        None if LOG_ALL == 1 << bit => "LOG_ALL".to_owned(),
        None => format!("bit {bit}"),
    };
    let names: Vec<String> = (0..u64::BITS).filter(|bit| features & (1 << bit) != 0).map(name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The protocol features on offer.
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// `size` bytes of the configuration space from `offset`, padded with zeros; `None` if the range exceeds the space.
pub(crate) fn read(
    profile: &DeviceProfile,
    num_queues: u16,
    queue_size: u16,
    writeback: bool,
    offset: u32,
    size: u32,
) -> Option<Vec<u8>> {
    let (start, size) = (usize::try_from(offset).ok()?, usize::try_from(size).ok()?);
    let end = start.checked_add(size).filter(|end| *end <= CONFIG_SPACE)?;
    let mut space = space(profile, num_queues, queue_size, writeback);
    space.resize(CONFIG_SPACE, 0);
    Some(space[start..end].to_vec())
}

/// struct virtio_blk_config up to and including the write-zeroes fields, all little-endian.
fn space(profile: &DeviceProfile, num_queues: u16, queue_size: u16, writeback: bool) -> Vec<u8> {
    let mut space = Vec::with_capacity(CONFIG_SPACE);
    space.extend(profile.capacity.sectors().to_le_bytes());
    space.extend(SIZE_MAX.to_le_bytes());
    // Header and status need a descriptor each.
    space.extend(u32::from(SEG_MAX.min(queue_size.saturating_sub(2)).max(1)).to_le_bytes());
    space.extend([0; 4]); // geometry: not offered
    space.extend(profile.block_size.to_le_bytes());
    // physical_block_exp, alignment_offset, then min_io_size and opt_io_size in logical blocks
    let physical_blocks = (profile.physical_block_size / profile.block_size.max(1)).max(1);
    space.extend([physical_blocks.trailing_zeros() as u8, 0]);
    space.extend(u16::try_from(physical_blocks).unwrap_or(1).to_le_bytes());
    let optimal = profile.optimal_io_size.max(profile.physical_block_size);
    space.extend((optimal / profile.block_size.max(1)).to_le_bytes());
    debug_assert_eq!(space.len(), WRITEBACK_OFFSET);
    space.extend([u8::from(writeback), 0]);
    space.extend(num_queues.to_le_bytes());
    let discard = profile.discard && !profile.read_only;
    space.extend(only(discard, MAX_RANGE_SECTORS).to_le_bytes());
    space.extend(only(discard, MAX_DISCARD_SEGMENTS as u32).to_le_bytes());
    let alignment = profile.discard_alignment.max(profile.block_size);
    space.extend(only(discard, alignment / SECTOR as u32).to_le_bytes());
    let zeroes = profile.write_zeroes && !profile.read_only;
    space.extend(only(zeroes, MAX_RANGE_SECTORS).to_le_bytes());
    space.extend(only(zeroes, MAX_WRITE_ZEROES_SEGMENTS as u32).to_le_bytes());
    space.extend([u8::from(zeroes), 0, 0, 0]);
    debug_assert_eq!(space.len(), CONFIG_BYTES);
    space
}

fn only(offered: bool, value: u32) -> u32 {
    if offered { value } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Capacity;

    fn profile() -> DeviceProfile {
        DeviceProfile {
            capacity: Capacity::new(0x1234),
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 65536,
            read_only: false,
            discard: true,
            discard_alignment: 65536,
            write_zeroes: true,
            zeroes_are_data: false,
            serial: [0; 20],
        }
    }

    #[test]
    fn the_space_is_laid_out_as_virtio_says() {
        let space = read(&profile(), 4, 1024, true, 0, 60).expect("in range");
        let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(space[..8], 0x1234u64.to_le_bytes());
        assert_eq!(u32_at(12), 126);
        assert_eq!(u32_at(20), 512);
        assert_eq!(u32_at(28), 128);
        assert_eq!(space[32], 1);
        assert_eq!(space[34..36], 4u16.to_le_bytes());
        assert_eq!([u32_at(36), u32_at(40), u32_at(44)], [1 << 22, 32, 128]);
        assert_eq!([u32_at(48), u32_at(52)], [1 << 22, 1]);
        assert_eq!(space[56..], [1, 0, 0, 0]);
    }

    #[test]
    fn the_topology_is_in_logical_blocks() {
        let topology = |logical, physical, optimal| {
            let profile = DeviceProfile {
                block_size: logical,
                physical_block_size: physical,
                optimal_io_size: optimal,
                discard_alignment: 512,
                ..profile()
            };
            let space = read(&profile, 1, 128, true, 0, 60).expect("in range");
            let (exponent, least) = (space[24], u16::from_le_bytes([space[26], space[27]]));
            let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().expect("four bytes"));
            (u32_at(20), exponent, space[25], least, u32_at(28), u32_at(44))
        };
        assert_eq!(topology(512, 512, 65536), (512, 0, 0, 1, 128, 1));
        assert_eq!(topology(512, 4096, 65536), (512, 3, 0, 8, 128, 1));
        assert_eq!(topology(4096, 4096, 65536), (4096, 0, 0, 1, 16, 8));
        assert_eq!(topology(512, 65536, 512), (512, 7, 0, 128, 128, 1), "no optimum below a physical block");
    }

    #[test]
    fn features_have_names() {
        assert_eq!(
            names(0x1_4000_0044),
            "SEG_MAX, BLK_SIZE, PROTOCOL_FEATURES, VERSION_1",
            "bits 2, 6, 30 and 32"
        );
        assert_eq!(names(1 << 63 | FLUSH), "FLUSH, bit 63");
        assert_eq!(names(0), "none");
        assert!(!names(features(&profile(), 2)).contains("bit "), "what is on offer has a name");
    }

    #[test]
    fn reads_have_exactly_the_size_asked_for() {
        for size in [36, 57, 60, 96, 256] {
            assert_eq!(read(&profile(), 1, 128, true, 0, size).map(|bytes| bytes.len()), Some(size as usize));
        }
        assert_eq!(read(&profile(), 1, 128, false, 32, 1), Some(vec![0]));
        assert_eq!(read(&profile(), 1, 128, true, 255, 1), Some(vec![0]));
        for (offset, size) in [(256, 1), (0, 257), (u32::MAX, 2), (2, u32::MAX)] {
            assert_eq!(read(&profile(), 1, 128, true, offset, size), None);
        }
    }

    #[test]
    fn a_read_only_disk_offers_no_way_to_change_it() {
        let read_only = DeviceProfile { read_only: true, ..profile() };
        let offered = features(&read_only, 1);
        assert_ne!(offered & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(offered & ((1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES)), 0);
        assert_eq!(offered & (1 << VIRTIO_BLK_F_MQ), 0);
        assert_ne!(features(&profile(), 2) & (1 << VIRTIO_BLK_F_MQ), 0);
    }
}
