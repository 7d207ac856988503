//! virtio-blk requests (virtio 1.2, 5.2.6): turns a chain into requests for the disk, or into an immediate answer.
//!
//! Owns every check of a request against the disk. It reads each guest byte once and uses its copy. It makes no
//! assumption about how header, data and status are spread over descriptors.

use block::Request;
use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::config::{MAX_DISCARD_SEGMENTS, MAX_RANGE_SECTORS, MAX_WRITE_ZEROES_SEGMENTS, SECTOR};
use crate::device::{DeviceProfile, GuestSlice};
use crate::ring::{Chain, Fault};

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;
/// The most data bytes in a request: the used length (data and status) must fit 32 bits. QEMU has the same limit.
const MAX_DATA_BYTES: u64 = (i32::MAX as u64) & !(SECTOR - 1);
/// Write zeroes: the space may be freed.
const FLAG_UNMAP: u32 = 1;

/// A 512-byte unit of the disk, by number.
#[derive(Clone, Copy)]
struct Sector(u64);

/// How a request ended for the guest (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed: VIRTIO_BLK_S_IOERR.
    IoError,
    /// Not supported here: VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// The type of a request, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    Unknown,
}

/// The result of parsing a chain.
#[derive(Debug)]
pub enum Parsed {
    /// There is no status byte to write: the chain goes back with a length of 0.
    NoStatus,
    /// The chain is answered without the disk.
    Answer(Answer),
    /// The chain needs the disk.
    Submit(Submission),
}

/// An answer: write `status` to the status byte and give the chain back with `written` bytes.
#[derive(Debug)]
pub struct Answer {
    pub kind: Kind,
    pub status_byte: GuestSlice,
    pub status: Status,
    /// Bytes written, the status byte included.
    pub written: u32,
}

/// Requests for the disk. The chain is done once all of them are.
#[derive(Debug)]
pub struct Submission {
    pub kind: Kind,
    pub status_byte: GuestSlice,
    pub requests: SmallVec<[Request; 2]>,
    /// Bytes of data, in either direction.
    pub bytes: u32,
    /// Bytes written to the chain on success, the status byte included.
    pub written: u32,
}

/// Checks requests against the disk's profile.
#[derive(Debug)]
pub struct Checker {
    profile: DeviceProfile,
}

/// The status with which a request is refused.
type Refusal = Status;

impl Checker {
    /// A checker of requests for a disk with this profile.
    pub fn new(profile: DeviceProfile) -> Self {
        Checker { profile }
    }

    /// Parses a chain. Afterwards the chain holds only the data: `chain.writable` for a read, `chain.readable` for a
    /// write.
    #[inline]
    pub fn parse(&self, chain: &mut Chain, write_through: bool) -> Parsed {
        if chain.fault == Some(Fault::Malformed) {
            return Parsed::NoStatus;
        }
        let Some(status_byte) = take_last_byte(&mut chain.writable) else { return Parsed::NoStatus };
        let refuse = |kind, status| Parsed::Answer(Answer { kind, status_byte, status, written: 1 });
        if chain.fault.is_some() {
            return refuse(Kind::Unknown, Status::IoError);
        }
        let mut header = [0; HEADER_BYTES];
        if !take_front(&mut chain.readable, &mut header) {
            return refuse(Kind::Unknown, Status::IoError);
        }
        let (kind, sector) = decode(&header);
        let submit = |requests: SmallVec<_>, bytes: u32, written| {
            Parsed::Submit(Submission { kind, status_byte, requests, bytes, written })
        };
        match kind {
            Kind::Read => match self.data_range(sector, &chain.writable) {
                Ok((offset, bytes)) => {
                    submit(SmallVec::from_iter([Request::Read { offset }]), bytes, bytes + 1)
                }
                Err(status) => refuse(kind, status),
            },
            Kind::Write => match self.writable(|| self.data_range(sector, &chain.readable)) {
                Ok((offset, bytes)) => {
                    submit(SmallVec::from_iter([Request::Write { offset, write_through }]), bytes, 1)
                }
                Err(status) => refuse(kind, status),
            },
            Kind::Flush if self.profile.read_only => refuse(kind, Status::Ok),
            Kind::Flush => submit(SmallVec::from_iter([Request::Flush]), 0, 1),
            Kind::Discard | Kind::WriteZeroes => {
                match self.writable(|| self.ranges(kind, &mut chain.readable, write_through)) {
                    Ok(requests) => submit(requests, 0, 1),
                    Err(status) => refuse(kind, status),
                }
            }
            Kind::GetId => {
                let written = fill(&chain.writable, &self.profile.serial) + 1;
                Parsed::Answer(Answer { kind, status_byte, status: Status::Ok, written })
            }
            Kind::Unknown => refuse(kind, Status::Unsupported),
        }
    }

    fn writable<T>(&self, then: impl FnOnce() -> Result<T, Refusal>) -> Result<T, Refusal> {
        if self.profile.read_only { Err(Status::IoError) } else { then() }
    }

    /// The byte offset and length of the data of a read or write.
    #[inline]
    fn data_range(&self, sector: u64, data: &[GuestSlice]) -> Result<(u64, u32), Refusal> {
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        if bytes > MAX_DATA_BYTES {
            return Err(Status::IoError);
        }
        let offset = self.in_range(Sector(sector), bytes)?;
        Ok((offset, u32::try_from(bytes).map_err(|_| Status::IoError)?))
    }

    /// The byte offset of a sector, if the disk holds `bytes` from there, and both are multiples of a logical block.
    fn in_range(&self, sector: Sector, bytes: u64) -> Result<u64, Refusal> {
        let offset = sector.0.checked_mul(SECTOR).ok_or(Status::IoError)?;
        if (offset | bytes) & (u64::from(self.profile.block_size) - 1) != 0 {
            return Err(Status::IoError);
        }
        let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
        if end > self.profile.capacity.sectors().saturating_mul(SECTOR) {
            Err(Status::IoError)
        } else {
            Ok(offset)
        }
    }

    /// The segments of a discard or write zeroes (virtio 1.2, 5.2.6.2): all are checked before any is done.
    fn ranges(
        &self,
        kind: Kind,
        data: &mut Vec<GuestSlice>,
        write_through: bool,
    ) -> Result<SmallVec<[Request; 2]>, Refusal> {
        let (offered, most) = match kind {
            Kind::Discard => (self.profile.discard, MAX_DISCARD_SEGMENTS),
            _ => (self.profile.write_zeroes, MAX_WRITE_ZEROES_SEGMENTS),
        };
        if !offered {
            return Err(Status::Unsupported);
        }
        let bytes: u64 = data.iter().map(|piece| piece.len() as u64).sum();
        if bytes == 0 || !bytes.is_multiple_of(SEGMENT_BYTES as u64) {
            return Err(Status::IoError);
        }
        if bytes > (most * SEGMENT_BYTES) as u64 {
            return Err(Status::Unsupported);
        }
        let mut requests = SmallVec::new();
        let mut segment = [0; SEGMENT_BYTES];
        while take_front(data, &mut segment) {
            let (sector, sectors, flags) = decode_segment(&segment);
            let unmap = flags & FLAG_UNMAP != 0;
            if flags & !FLAG_UNMAP != 0 || (unmap && kind == Kind::Discard) {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            let length = u64::from(sectors) * SECTOR;
            let offset = self.in_range(Sector(sector), length)?;
            if length > 0 {
                requests.push(match kind {
                    Kind::Discard => Request::Discard { offset, length, write_through },
                    _ => Request::WriteZeroes { offset, length, unmap, write_through },
                });
            }
        }
        Ok(requests)
    }
}

/// Writes the status byte.
pub fn write_status(byte: &GuestSlice, status: Status) {
    let code = match status {
        Status::Ok => VIRTIO_BLK_S_OK,
        Status::IoError => VIRTIO_BLK_S_IOERR,
        Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
    };
    byte.copy_from(&[code as u8]);
}

/// struct virtio_blk_req: le32 type, le32 reserved, le64 sector.
#[inline]
fn decode(header: &[u8; HEADER_BYTES]) -> (Kind, u64) {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
    let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_DISCARD => Kind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
        VIRTIO_BLK_T_GET_ID => Kind::GetId,
        _ => Kind::Unknown,
    };
    (kind, u64::from_le_bytes(sector))
}

/// struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags.
fn decode_segment(segment: &[u8; SEGMENT_BYTES]) -> (u64, u32, u32) {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    (sector, u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags))
}

/// Moves the first bytes of the slices into `bytes`. False, with nothing taken, if the slices are too short.
#[inline]
fn take_front(slices: &mut Vec<GuestSlice>, bytes: &mut [u8]) -> bool {
    let mut filled = 0;
    let mut whole = 0;
    for slice in slices.iter() {
        let wanted = bytes.len() - filled;
        let copied = slice.copy_to(&mut bytes[filled..]);
        filled += copied;
        if slice.len() > wanted {
            break;
        }
        whole += 1;
        if filled == bytes.len() {
            break;
        }
    }
    if filled < bytes.len() {
        return false;
    }
    let before: usize = slices[..whole].iter().map(|slice| slice.len()).sum();
    if let Some(partial) = slices.get_mut(whole)
        && let Ok(rest) = partial.offset(bytes.len() - before)
    {
        *partial = rest;
    }
    slices.drain(..whole);
    true
}

/// Splits the last byte off.
#[inline]
fn take_last_byte(slices: &mut Vec<GuestSlice>) -> Option<GuestSlice> {
    let last = slices.last_mut()?;
    let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
    if rest.is_empty() {
        slices.pop();
    } else {
        *last = rest;
    }
    Some(byte)
}

/// Copies as many bytes as fit; returns their number.
fn fill(slices: &[GuestSlice], bytes: &[u8]) -> u32 {
    let mut done = 0;
    for slice in slices {
        let part = &bytes[done..bytes.len().min(done + slice.len())];
        slice.copy_from(part);
        done += part.len();
    }
    done as u32
}
