//! The configuration space of a block device (virtio 1.2, section 5.2.4).

/// Bytes requested by default: up to and including the write zeroes fields, as Cloud Hypervisor does.
pub const CONFIG_BYTES: usize = 60;

/// The fields of struct virtio_blk_config, read from its first 60 bytes. The features decide which of them are
/// valid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockConfig {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Most bytes of a segment (SIZE_MAX).
    pub size_max: u32,
    /// Most segments of a request (SEG_MAX).
    pub seg_max: u32,
    /// Logical block size in bytes (BLK_SIZE).
    pub block_size: u32,
    /// Exponent of the logical blocks in a physical one (TOPOLOGY).
    pub physical_block_exponent: u8,
    /// First aligned logical block (TOPOLOGY).
    pub alignment_offset: u8,
    /// Minimal I/O size in blocks (TOPOLOGY).
    pub min_io_blocks: u16,
    /// Optimal I/O size in blocks (TOPOLOGY).
    pub opt_io_blocks: u32,
    /// 1 for a write-back cache (CONFIG_WCE).
    pub writeback: u8,
    /// Queues (MQ).
    pub num_queues: u16,
    /// Most sectors of a discard segment (DISCARD).
    pub max_discard_sectors: u32,
    /// Most segments of a discard (DISCARD).
    pub max_discard_segments: u32,
    /// Sectors to which discards should be aligned (DISCARD).
    pub discard_sector_alignment: u32,
    /// Most sectors of a write zeroes segment (WRITE_ZEROES).
    pub max_write_zeroes_sectors: u32,
    /// Most segments of a write zeroes (WRITE_ZEROES).
    pub max_write_zeroes_segments: u32,
    /// 1 if write zeroes may deallocate (WRITE_ZEROES).
    pub write_zeroes_may_unmap: u8,
}

impl BlockConfig {
    /// Reads the fields; fields past the end of `bytes` are 0.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut all = [0u8; CONFIG_BYTES];
        let length = bytes.len().min(CONFIG_BYTES);
        all[..length].copy_from_slice(&bytes[..length]);
        let half = |at: usize| u16::from_le_bytes([all[at], all[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([all[at], all[at + 1], all[at + 2], all[at + 3]]);
        Self {
            capacity_sectors: u64::from(word(0)) | u64::from(word(4)) << 32,
            size_max: word(8),
            seg_max: word(12),
            // Bytes 16 to 19 hold the geometry, which is obsolete.
            block_size: word(20),
            physical_block_exponent: all[24],
            alignment_offset: all[25],
            min_io_blocks: half(26),
            opt_io_blocks: word(28),
            writeback: all[32],
            num_queues: half(34),
            max_discard_sectors: word(36),
            max_discard_segments: word(40),
            discard_sector_alignment: word(44),
            max_write_zeroes_sectors: word(48),
            max_write_zeroes_segments: word(52),
            write_zeroes_may_unmap: all[56],
        }
    }

    /// Size of the disk in bytes; saturates where a device claims more than 64 bits hold.
    pub fn size(&self) -> u64 {
        self.capacity_sectors.saturating_mul(512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_virtio_puts_them() {
        let bytes: Vec<u8> = (0..60).collect();
        let config = BlockConfig::parse(&bytes);
        assert_eq!(config.capacity_sectors, 0x0706_0504_0302_0100);
        assert_eq!(config.block_size, 0x1716_1514);
        assert_eq!(config.num_queues, 0x2322);
        assert_eq!(config.discard_sector_alignment, 0x2f2e_2d2c);
        assert_eq!(config.write_zeroes_may_unmap, 56);
        assert_eq!(BlockConfig::parse(&bytes[..36]).max_discard_sectors, 0);
        assert_eq!(config.size(), u64::MAX);
    }
}
