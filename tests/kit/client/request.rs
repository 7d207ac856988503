//! virtio-blk requests and answers as a guest sends and sees them (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk as virtio;

use super::ClientError;

/// Bytes in a sector, the unit of every address in a virtio-blk request.
pub const SECTOR: u64 = 512;

/// Bytes in the answer to [`Request::GetId`].
pub const ID_BYTES: usize = virtio::VIRTIO_BLK_ID_BYTES as usize;

/// Bytes in one segment of a discard or write zeroes request.
pub const SEGMENT_BYTES: usize = 16;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// The device completed the chain without setting the status byte.
    Missing,
    /// A value that virtio-blk does not define for these requests.
    Other(u8),
}

impl Status {
    /// The value of the status byte before the device answers.
    pub(crate) const UNSET: u8 = 0xff;

    /// Reads a status byte.
    pub fn from_byte(byte: u8) -> Self {
        match u32::from(byte) {
            virtio::VIRTIO_BLK_S_OK => Self::Ok,
            virtio::VIRTIO_BLK_S_IOERR => Self::IoError,
            virtio::VIRTIO_BLK_S_UNSUPP => Self::Unsupported,
            _ if byte == Self::UNSET => Self::Missing,
            _ => Self::Other(byte),
        }
    }

    /// Whether the request succeeded.
    pub fn is_ok(self) -> bool {
        self == Self::Ok
    }
}

/// One segment of a discard or write zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte on the disk; a multiple of 512.
    pub offset: u64,
    /// Bytes; a multiple of 512.
    pub length: u64,
    /// The segment's flags; [`UNMAP`] is the only one that virtio defines.
    pub flags: u32,
}

/// "The device may deallocate" in a segment of write zeroes.
pub const UNMAP: u32 = virtio::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

impl Segment {
    /// The 16 bytes of the segment (struct virtio_blk_discard_write_zeroes).
    ///
    /// # Errors
    /// When offset or length are not whole sectors, or the length in sectors exceeds 32 bits.
    pub fn bytes(self) -> Result<[u8; SEGMENT_BYTES], ClientError> {
        let count = u32::try_from(sectors(self.length)?).map_err(|_| ClientError::Misaligned(self.length))?;
        let mut bytes = [0; SEGMENT_BYTES];
        bytes[..8].copy_from_slice(&sectors(self.offset)?.to_le_bytes());
        bytes[8..12].copy_from_slice(&count.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        Ok(bytes)
    }
}

/// Turns bytes into sectors.
///
/// # Errors
/// When they are not whole sectors.
pub(crate) fn sectors(bytes: u64) -> Result<u64, ClientError> {
    if bytes.is_multiple_of(SECTOR) { Ok(bytes / SECTOR) } else { Err(ClientError::Misaligned(bytes)) }
}

/// The requests that a guest can send to a disk. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// Read `length` bytes.
    Read {
        /// First byte on the disk; a multiple of 512.
        offset: u64,
        /// Bytes; sent unchecked, so that tests can send an invalid length.
        length: usize,
    },
    /// Write the bytes.
    Write {
        /// First byte on the disk; a multiple of 512.
        offset: u64,
        /// The bytes to write; their length is sent unchecked.
        data: &'a [u8],
    },
    /// Make every completed write durable.
    Flush,
    /// Discard the segments: their contents are no longer needed.
    Discard(&'a [Segment]),
    /// Make the segments read as zero.
    WriteZeroes(&'a [Segment]),
    /// Read the serial number.
    GetId,
    /// Any request: type, first sector, and bytes that the device reads or writes.
    Other {
        /// The type field.
        kind: u32,
        /// The sector field.
        sector: u64,
        /// The data that the device reads; empty for none.
        output: &'a [u8],
        /// Bytes that the device may write, besides the status; ignored unless `output` is empty.
        input: usize,
    },
}

/// The direction of a request's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads the slot's buffer.
    ToDevice,
    /// The device writes the slot's buffer.
    FromDevice,
}

/// A request whose data is in a slot's buffer already, with everything the ring needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// The type field.
    pub kind: u32,
    /// The sector field.
    pub sector: u64,
    /// Bytes of the slot's buffer, from its start, that belong to the request.
    pub length: u32,
    /// The direction of those bytes.
    pub direction: Direction,
}

impl Command {
    /// A read of whole sectors.
    pub fn read(sector: u64, length: u32) -> Self {
        Self { kind: virtio::VIRTIO_BLK_T_IN, sector, length, direction: Direction::FromDevice }
    }

    /// A write of the slot's buffer.
    pub fn write(sector: u64, length: u32) -> Self {
        Self { kind: virtio::VIRTIO_BLK_T_OUT, sector, length, direction: Direction::ToDevice }
    }

    /// A flush.
    pub fn flush() -> Self {
        Self { kind: virtio::VIRTIO_BLK_T_FLUSH, sector: 0, length: 0, direction: Direction::ToDevice }
    }

    /// A discard of the segments in the first `length` bytes of the slot's buffer.
    pub fn discard(length: u32) -> Self {
        Self { kind: virtio::VIRTIO_BLK_T_DISCARD, sector: 0, length, direction: Direction::ToDevice }
    }

    /// A write zeroes of the segments in the first `length` bytes of the slot's buffer.
    pub fn write_zeroes(length: u32) -> Self {
        Self { kind: virtio::VIRTIO_BLK_T_WRITE_ZEROES, sector: 0, length, direction: Direction::ToDevice }
    }

    /// A request for the serial number.
    pub fn get_id() -> Self {
        Self {
            kind: virtio::VIRTIO_BLK_T_GET_ID,
            sector: 0,
            length: ID_BYTES as u32,
            direction: Direction::FromDevice,
        }
    }
}

/// The outcome of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status byte.
    pub status: Status,
    /// The used element's length: bytes that the device claims to have written, the status byte included.
    pub used_length: u32,
    /// The data of a read, whatever the status; empty for other requests.
    pub data: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_and_segments_are_the_bytes_of_virtio() {
        assert_eq!(Status::from_byte(0), Status::Ok);
        assert_eq!(Status::from_byte(1), Status::IoError);
        assert_eq!(Status::from_byte(2), Status::Unsupported);
        assert_eq!(Status::from_byte(0xff), Status::Missing);
        assert_eq!(Status::from_byte(9), Status::Other(9));
        let segment = Segment { offset: 1024, length: 512 * 0x0102, flags: UNMAP };
        let bytes = segment.bytes().expect("whole sectors");
        assert_eq!(bytes, [2, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 1, 0, 0, 0]);
        assert!(Segment { offset: 1, length: 512, flags: 0 }.bytes().is_err());
        assert!(Segment { offset: 0, length: 512 << 32, flags: 0 }.bytes().is_err());
    }
}
