//! Large requests go to the disk in pieces. Owns the size of a piece, and the rest of a chain that is not yet at
//! the disk.
//!
//! Between two pieces the worker looks whether it has to stop. So a stop never waits for more than the pieces that
//! the disk has, however large the guest's requests are. Pure arithmetic and lists; `in_flight` counts the pieces.

use std::collections::VecDeque;

use block::Request;

use crate::bounds::{PIECE_BYTES, PIECE_GRANULES};
use crate::device::{DeviceProfile, GuestSlice};

/// Decides which requests are large, and how they are cut.
///
/// The *weight* of a request is its size in bytes of data. A discard or write zeroes weighs as much for each piece of it
/// as a piece of data does.
#[derive(Debug)]
pub(crate) struct Cutter {
    /// Bytes of a piece of a discard: whole clusters, and so whole subclusters.
    discard_bytes: u64,
    /// Bytes of a piece of a write zeroes: the same, or as of a write where it may be one.
    zeroes_bytes: u64,
}

impl Cutter {
    pub(crate) fn new(profile: &DeviceProfile) -> Self {
        let discard_bytes = u64::from(profile.discard_alignment.max(512)) * PIECE_GRANULES;
        let zeroes_bytes = if profile.zeroes_are_data { PIECE_BYTES } else { discard_bytes };
        Cutter { discard_bytes, zeroes_bytes }
    }

    /// The weight of a chain that goes to the disk as it is; `None` if it goes in pieces. `bytes` is its data.
    pub(crate) fn whole(&self, requests: &[Request], bytes: u32) -> Option<u64> {
        let [request] = requests else { return None };
        Some(self.weight(request, u64::from(bytes))).filter(|weight| *weight <= PIECE_BYTES)
    }

    fn weight(&self, request: &Request, bytes: u64) -> u64 {
        match *request {
            Request::Read { .. } | Request::Write { .. } => bytes,
            Request::Flush => 0,
            Request::Discard { length, .. } | Request::WriteZeroes { length, .. } => {
                length.saturating_mul(PIECE_BYTES).div_ceil(self.range_bytes(request))
            }
        }
    }

    /// Bytes of a piece of a discard or write zeroes.
    fn range_bytes(&self, request: &Request) -> u64 {
        if matches!(request, Request::WriteZeroes { .. }) { self.zeroes_bytes } else { self.discard_bytes }
    }
}

/// The requests of a chain, or parts of them, that the disk does not have yet.
#[derive(Debug)]
pub(crate) struct Rest {
    /// The slot of the chain.
    pub chain: usize,
    requests: VecDeque<Request>,
    /// The memory of the rest of a read or write, and its bytes.
    data: VecDeque<GuestSlice>,
    bytes: u64,
}

impl Rest {
    /// A chain of which the disk has nothing yet.
    pub(crate) fn new(
        chain: usize,
        requests: impl IntoIterator<Item = Request>,
        data: &[GuestSlice],
        bytes: u32,
    ) -> Self {
        Rest {
            chain,
            requests: requests.into_iter().collect(),
            data: data.iter().copied().collect(),
            bytes: u64::from(bytes),
        }
    }

    /// True if the disk has all of it.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Cuts the next piece off, and replaces `slices` by its memory. Returns the piece and its weight.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn next(&mut self, cutter: &Cutter, slices: &mut Vec<GuestSlice>) -> (Request, u64) {
        slices.clear();
        let front = self.requests.front_mut().expect("a rest that is not empty");
        let mut piece = *front;
        let step = cutter.range_bytes(front);
        let left = match (front, &mut piece) {
            (Request::Read { offset }, _) | (Request::Write { offset, .. }, _) => {
                let taken = cut(offset, &mut self.bytes, PIECE_BYTES);
                take_front(&mut self.data, taken, slices);
                self.bytes
            }
            (
                Request::Discard { offset, length, .. } | Request::WriteZeroes { offset, length, .. },
                Request::Discard { length: taken, .. } | Request::WriteZeroes { length: taken, .. },
            ) => {
                *taken = cut(offset, length, step);
                *length
            }
            _ => 0,
        };
        if left == 0 {
            self.requests.pop_front();
        }
        let bytes = slices.iter().map(|slice| slice.len() as u64).sum();
        (piece, cutter.weight(&piece, bytes))
    }
}

/// Moves a range forward to the next multiple of `step`, or to its end. Returns the bytes that it passed.
fn cut(offset: &mut u64, length: &mut u64, step: u64) -> u64 {
    let taken = (*length).min(step - *offset % step);
    *offset += taken;
    *length -= taken;
    taken
}

/// Moves the first bytes of `data` to `slices`.
fn take_front(data: &mut VecDeque<GuestSlice>, bytes: u64, slices: &mut Vec<GuestSlice>) {
    let mut left = usize::try_from(bytes).expect("a piece of memory fits an address");
    while left > 0 {
        let slice = data.pop_front().expect("a request's memory has its length");
        let (first, rest) = slice.split_at(left.min(slice.len())).expect("within the slice");
        left -= first.len();
        slices.push(first);
        if !rest.is_empty() {
            data.push_front(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Capacity;

    const GRANULE: u32 = 65536;

    fn cutter() -> Cutter {
        let profile = DeviceProfile {
            capacity: Capacity::new(u64::MAX / 512),
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: GRANULE,
            read_only: false,
            discard: true,
            discard_alignment: GRANULE,
            write_zeroes: true,
            zeroes_are_data: false,
            serial: [0; 20],
        };
        Cutter::new(&profile)
    }

    fn slices(lengths: &[usize]) -> Vec<GuestSlice> {
        // Never accessed: only their lengths and addresses are looked at.
        let mut memory = vec![0u8; lengths.iter().sum()].leak();
        let mut slices = Vec::new();
        for length in lengths {
            let (first, rest) = memory.split_at_mut(*length);
            slices.push(GuestSlice::from(first));
            memory = rest;
        }
        slices
    }

    #[test]
    fn small_requests_are_whole() {
        let cutter = cutter();
        let read = Request::Read { offset: 512 };
        let piece = u32::try_from(PIECE_BYTES).expect("small");
        assert_eq!(cutter.whole(&[read], 512), Some(512));
        assert_eq!(cutter.whole(&[read], piece), Some(PIECE_BYTES));
        assert_eq!(cutter.whole(&[read], piece + 512), None);
        assert_eq!(cutter.whole(&[Request::Flush], 0), Some(0));
        let discard = |length| Request::Discard { offset: 0, length, write_through: false };
        let range = u64::from(GRANULE) * PIECE_GRANULES;
        assert_eq!(cutter.whole(&[discard(range)], 0), Some(PIECE_BYTES));
        assert_eq!(cutter.whole(&[discard(range + 512)], 0), None);
        assert_eq!(cutter.whole(&[discard(512), discard(512)], 0), None, "segments are pieces");
    }

    #[test]
    fn a_read_is_cut_with_its_memory() {
        let piece = usize::try_from(PIECE_BYTES).expect("small");
        let memory = slices(&[512, 2 * piece, 512, piece]);
        let total = 3 * piece + 1024;
        let offset = PIECE_BYTES - 1024;
        let bytes = u32::try_from(total).expect("small");
        let mut rest = Rest::new(7, [Request::Read { offset }], &memory, bytes);
        let (mut at, mut found, mut cut) = (offset, Vec::new(), Vec::new());
        while !rest.is_empty() {
            let (request, weight) = rest.next(&cutter(), &mut cut);
            assert_eq!(request, Request::Read { offset: at });
            assert_eq!(weight, cut.iter().map(|slice| slice.len() as u64).sum::<u64>());
            at += weight;
            assert!(at % PIECE_BYTES == 0 || rest.is_empty(), "cut where a cluster ends");
            found.extend(cut.iter().map(|slice| (slice.ptr_guard().as_ptr().addr(), slice.len())));
        }
        assert_eq!(at, offset + total as u64);
        let first = memory[0].ptr_guard().as_ptr().addr();
        let mut next = first;
        for (address, length) in found {
            assert_eq!(address, next, "in order, without a gap");
            next += length;
        }
        assert_eq!(next, first + total);
    }

    #[test]
    fn ranges_are_cut_at_clusters() {
        let range = u64::from(GRANULE) * PIECE_GRANULES;
        let zeroes =
            |offset, length| Request::WriteZeroes { offset, length, unmap: true, write_through: true };
        let requests = [zeroes(range - 512, 2 * range), zeroes(512, 512)];
        let mut rest = Rest::new(0, requests, &[], 0);
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (piece, weight) = rest.next(&cutter(), &mut Vec::new());
            assert!((1..=PIECE_BYTES).contains(&weight));
            pieces.push(piece);
        }
        let expected = [
            zeroes(range - 512, 512),
            zeroes(range, range),
            zeroes(2 * range, range - 512),
            zeroes(512, 512),
        ];
        assert_eq!(pieces, expected);
    }
}
