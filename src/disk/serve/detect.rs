//! The search for zeros in the guest's writes, which then become write zeroes.
//!
//! How a range is zeroed is in zero.rs.

use std::ops::ControlFlow;

use smallvec::SmallVec;
use storage::guest::{guest_len, subrange};
use storage::zeroes::zero_pieces;
use storage::{GuestSlice, Storage};

use crate::error::RequestError;
use crate::options::DetectZeroes;
use crate::range::ByteRange;
use crate::serve::worker::Worker;
use crate::serve::write::Payload;

/// Zeros are searched for in pieces of a granule, but at least of this size: smaller pieces would cost more than the
/// space is worth.
const PIECE_BYTES_MIN: u64 = 4096;

/// A run of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    length: u64,
    zero: bool,
    /// It contains at least one whole piece.
    worthwhile: bool,
}

impl<S: Storage> Worker<S> {
    /// Bytes of the pieces in which zeros are searched for.
    fn piece_bytes(&self) -> u64 {
        self.engine().granule().max(PIECE_BYTES_MIN)
    }

    /// Bytes of the first piece of a write: up to where the next begins.
    fn first_piece(&self, offset: u64) -> usize {
        (offset.next_multiple_of(self.piece_bytes()) - offset) as usize
    }

    /// True if a write has zeros that are to become write zeroes. Costs nothing unless the option is on.
    #[inline]
    pub fn has_zeroes(&self, offset: u64, slices: &[GuestSlice]) -> bool {
        self.shared.policy.detect != DetectZeroes::Off && self.finds_zeroes(offset, slices)
    }

    fn finds_zeroes(&self, offset: u64, slices: &[GuestSlice]) -> bool {
        let (piece, mut all, mut found) = (self.piece_bytes() as usize, true, false);
        zero_pieces(slices, self.first_piece(offset), piece, |length, zero| {
            all &= zero;
            found = zero && length == piece;
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        found || (all && guest_len(slices) > 0)
    }

    /// Writes. If the option is on, runs of zeros are zeroed instead. The caller holds a claim on the range.
    pub async fn write_or_zero(&self, offset: u64, slices: &[GuestSlice]) -> Result<(), RequestError> {
        if !self.has_zeroes(offset, slices) {
            return self.write(offset, Payload::Guest(slices)).await;
        }
        Box::pin(self.write_with_zeroes(offset, slices)).await
    }

    async fn write_with_zeroes(&self, offset: u64, slices: &[GuestSlice]) -> Result<(), RequestError> {
        let mode = self.shared.policy.mode_of_detected();
        let mut done = 0;
        for run in self.runs_of_zeroes(offset, slices) {
            let at = offset + done;
            if run.zero {
                self.zero_range(ByteRange::new(at, run.length), mode).await?;
            } else {
                let part = subrange(slices, done as usize, run.length as usize);
                self.write(at, Payload::Guest(&part)).await?;
            }
            done += run.length;
        }
        Ok(())
    }

    /// Splits a write into runs of zeros and of data. A run of zeros without a whole piece counts as data, if there
    /// is any data.
    fn runs_of_zeroes(&self, offset: u64, slices: &[GuestSlice]) -> SmallVec<[Run; 4]> {
        let piece = self.piece_bytes() as usize;
        let mut runs: SmallVec<[Run; 4]> = SmallVec::new();
        zero_pieces(slices, self.first_piece(offset), piece, |length, zero| {
            push_run(&mut runs, Run { length: length as u64, zero, worthwhile: length == piece });
            ControlFlow::Continue(())
        });
        if runs.len() == 1 {
            return runs;
        }
        let mut worthy = SmallVec::new();
        for run in runs {
            push_run(&mut worthy, Run { zero: run.zero && run.worthwhile, ..run });
        }
        worthy
    }
}

/// Adds a run, joining it with the last if they are alike.
fn push_run(runs: &mut SmallVec<[Run; 4]>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.zero == run.zero => {
            last.length += run.length;
            last.worthwhile |= run.worthwhile;
        }
        _ => runs.push(run),
    }
}
