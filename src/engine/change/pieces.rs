//! Splits the bytes and runs of a plan into pieces, and compares the references of two trees.

use std::collections::VecDeque;

use qcow2::entry::COPIED;
use qcow2::{HostCluster, HostOffset, HostRange};

use super::step::PlanStep;
use crate::check::READ_MAX;
use crate::check::counts::Counts;
use crate::file_step::FileStep;

/// Takes a piece from the front of bytes to be written.
pub(super) fn take_piece(offset: &mut u64, bytes: &mut Vec<u8>) -> Option<FileStep> {
    let length = bytes.len().min(READ_MAX as usize);
    if length == 0 {
        return None;
    }
    let rest = bytes.split_off(length);
    let piece = std::mem::replace(bytes, rest);
    let at = HostOffset(*offset);
    *offset += length as u64;
    Some(FileStep::Write { offset: at, bytes: piece })
}

/// Takes adjacent tables from the front.
pub(super) fn take_run(tables: &mut VecDeque<HostRange>) -> Option<PlanStep> {
    let whole = tables.pop_front()?;
    let mut taken = HostRange::new(whole.offset, whole.length.min(READ_MAX));
    if taken.length < whole.length {
        tables.push_front(HostRange::new(taken.end(), whole.length - taken.length));
    }
    while let Some(next) = tables.front()
        && next.offset == taken.end()
        && taken.length + next.length <= READ_MAX
    {
        taken.length += next.length;
        tables.pop_front();
    }
    Some(PlanStep::Correct(taken))
}

/// Subtracts the references that both have from both.
pub(super) fn cancel(one: &mut Counts, other: &mut Counts) {
    for cluster in one.touched(one) {
        let both = one.get(cluster).min(other.get(cluster));
        if both > 0 {
            one.subtract(HostCluster(cluster), both);
            other.subtract(HostCluster(cluster), both);
        }
    }
}

/// The bytes of an L1 table of `entries` entries. COPIED is set where `sole` returns true.
pub(super) fn encode_l1(l1: &[u64], entries: u64, sole: impl Fn(HostOffset) -> bool) -> Vec<u8> {
    let mut bytes = vec![0; entries as usize * 8];
    for (index, raw) in l1.iter().take(entries as usize).enumerate() {
        let offset = HostOffset(raw & qcow2::entry::OFFSET_MASK);
        let flag = if offset.0 > 0 && sole(offset) { COPIED } else { 0 };
        qcow2::set_entry(&mut bytes, index, raw & !COPIED | flag);
    }
    bytes
}
