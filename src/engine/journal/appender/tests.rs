//! Tests of the ring: what a successor reads of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2::{Geometry, GuestCluster, RawL2Entry, Version};

use super::{ALLOCATION_RECORDS_EXTENDED, Journal};
use crate::journal::record::Record;
use crate::journal::ring::{JournalError, JournalMemory, read};

const NUMBER: u64 = 0x0123_4567_89ab_cdef;
/// Words before the first record, and words of a record.
const HEADER: usize = 32;
const RECORD: usize = 4;

fn geometry() -> Geometry {
    Geometry { size: 1 << 30, cluster_bits: 16, refcount_order: 4, version: Version::V3, extended_l2: false }
}

fn memory(slots: usize) -> JournalMemory {
    struct Words(Vec<AtomicU64>);
    impl AsRef<[AtomicU64]> for Words {
        fn as_ref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
    Arc::new(Words((0..HEADER + slots * RECORD).map(|_| AtomicU64::new(0)).collect()))
}

fn words(memory: &JournalMemory) -> &[AtomicU64] {
    (**memory).as_ref()
}

/// The record that test number `n` writes: no two of them join.
fn record(n: u64) -> Record {
    Record { first: GuestCluster(2 * n), count: 1, raw: RawL2Entry::from(1 << 63 | (n + 1) << 16) }
}

fn commit(journal: &mut Journal, n: u64) {
    let Record { first, count, raw } = record(n);
    journal.note(first, count, raw, &geometry());
    journal.publish();
}

fn begun(slots: usize) -> (Journal, JournalMemory) {
    let (mut journal, memory) = (Journal::default(), memory(slots));
    assert!(journal.begin(Arc::clone(&memory), NUMBER, &geometry()));
    (journal, memory)
}

#[test]
fn records_are_read_in_order_and_leave_with_their_cut() {
    let (mut journal, memory) = begun(8);
    assert_eq!(read(&memory, NUMBER), Ok(Vec::new()));
    // Three times around.
    for n in 0..24 {
        commit(&mut journal, n);
        let kept = n.saturating_sub(5)..=n;
        journal.cut_is_durable(*kept.start());
        assert_eq!(read(&memory, NUMBER), Ok(kept.map(record).collect()), "{n}");
    }
}

#[test]
fn a_full_journal_makes_plans_wait_for_a_cut() {
    let memory = memory(8);
    let mut journal = Journal::default();
    assert!(journal.begin(memory, NUMBER, &Geometry { extended_l2: true, ..geometry() }));
    assert!(!journal.is_crowded() && !journal.is_uncut() && !journal.wants_cut());
    let reserved = journal.reserve();
    assert_eq!((reserved, journal.is_crowded()), (ALLOCATION_RECORDS_EXTENDED, false));
    (0..3).for_each(|n| commit(&mut journal, n));
    assert!(journal.is_crowded() && journal.is_uncut() && !journal.wants_cut(), "3 taken, 3 reserved");
    journal.release(reserved);
    assert!(!journal.is_crowded());
    (3..6).for_each(|n| commit(&mut journal, n));
    assert!(journal.is_crowded() && journal.wants_cut());
    assert!(!journal.cut_is_durable(0), "still crowded by what is past that cut");
    assert!(journal.cut_is_durable(6));
    assert!(!journal.is_crowded() && !journal.is_uncut());
}

#[test]
fn entries_of_one_commit_join_and_those_of_two_do_not() {
    let (mut journal, memory) = begun(8);
    let zero = RawL2Entry::from(1);
    for guest in [5, 6, 7, 9] {
        journal.note(GuestCluster(guest), 1, zero, &geometry());
    }
    journal.publish();
    journal.note(GuestCluster(10), 1, zero, &geometry());
    journal.publish();
    let runs: Vec<_> =
        read(&memory, NUMBER).expect("ours").iter().map(|run| (run.first.0, run.count)).collect();
    assert_eq!(runs, [(5, 3), (9, 1), (10, 1)]);
}

#[test]
fn a_record_is_read_only_once_it_is_published() {
    let (mut journal, memory) = begun(8);
    let Record { first, count, raw } = record(0);
    journal.note(first, count, raw, &geometry());
    journal.append();
    assert_eq!(read(&memory, NUMBER), Ok(Vec::new()), "the head has not moved");
    commit(&mut journal, 1);
    assert_eq!(read(&memory, NUMBER), Ok(vec![record(0), record(1)]));
}

#[test]
fn a_journal_of_another_state_of_the_image_is_foreign() {
    let (mut journal, memory) = begun(8);
    commit(&mut journal, 0);
    assert_eq!(read(&memory, NUMBER + 1), Err(JournalError::Foreign));
    // Half begun: the proof is stored last.
    words(&memory)[3].store(0, Ordering::Relaxed);
    assert_eq!(read(&memory, NUMBER), Err(JournalError::Foreign));
    assert!(journal.begin(Arc::clone(&memory), NUMBER + 1, &geometry()));
    assert_eq!(
        (read(&memory, NUMBER), read(&memory, NUMBER + 1)),
        (Err(JournalError::Foreign), Ok(Vec::new()))
    );
    assert!(!journal.begin(self::memory(7), NUMBER, &geometry()), "too small");
    assert_eq!(read(&self::memory(7), NUMBER), Err(JournalError::Foreign));
}

#[test]
fn every_changed_bit_of_a_used_word_is_noticed() {
    let (mut journal, memory) = begun(8);
    (0..4).for_each(|n| commit(&mut journal, n));
    journal.cut_is_durable(1);
    let whole = read(&memory, NUMBER);
    assert_eq!(whole, Ok((1..4).map(record).collect()));
    let used = (0..4).chain(HEADER + RECORD..HEADER + 4 * RECORD);
    for (at, bit) in used.flat_map(|at| (0..64).map(move |bit| (at, bit))) {
        let word = &words(&memory)[at];
        let was = word.fetch_xor(1 << bit, Ordering::Relaxed);
        assert!(read(&memory, NUMBER).is_err(), "word {at}, bit {bit}");
        word.store(was, Ordering::Relaxed);
    }
    assert_eq!(read(&memory, NUMBER), whole);
    // A tail and a head that claim more than there is, in either direction.
    for (tail, head) in [(4, 3), (0, 9), (u64::MAX, 0), (0, u64::MAX), (1, 5), (8, 9)] {
        words(&memory)[8].store(tail, Ordering::Relaxed);
        words(&memory)[16].store(head, Ordering::Relaxed);
        assert!(read(&memory, NUMBER).is_err(), "{tail}..{head}");
    }
}

#[test]
fn records_cannot_change_places() {
    let (mut journal, memory) = begun(8);
    (0..2).for_each(|n| commit(&mut journal, n));
    for at in HEADER..HEADER + RECORD {
        let [first, second] = [at, at + RECORD].map(|at| words(&memory)[at].load(Ordering::Relaxed));
        words(&memory)[at].store(second, Ordering::Relaxed);
        words(&memory)[at + RECORD].store(first, Ordering::Relaxed);
    }
    assert_eq!(read(&memory, NUMBER), Err(JournalError::Seal { position: 0 }));
}

#[test]
fn a_cut_of_before_a_switch_moves_no_tail() {
    let (mut journal, memory) = begun(8);
    commit(&mut journal, 0);
    let old = journal.head();
    assert!(journal.begin(Arc::clone(&memory), NUMBER + 1, &geometry()));
    commit(&mut journal, 1);
    journal.cut_is_durable(old);
    assert_eq!(read(&memory, NUMBER + 1), Ok(vec![record(1)]));
}
