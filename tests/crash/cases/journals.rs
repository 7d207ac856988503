//! A journal that is not what the last daemon left: of another state of the image, changed, made up. It is refused as a
//! whole. And a right one is laid out as docs/protocol.md says.
//!
//! The layout and the seal are written down here a second time, from that page, so that a change of either is noticed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use disk::resize::{InUseError, NewSize, ResizeError, Shrinking};
use disk::{JournalKept, NewOverlay, Request};
use qcow2::{Header, JournalNumber};
use storage::Errno;
use storage_sim::{Fault, Hung, Image, Outcome, Random, SimOptions, SimWorld, Verb};
use strata_crash::deaths::{memory_for, memory_of, words_of};
use strata_crash::direct::{carry_out, open, write};
use strata_crash::examine::{Seen, examine};
use strata_crash::recovery::{serve, wait_for_search};
use strata_crash::shape::{Shape, Start, TOP};
use strata_crash::stamp::{SECTOR, Value};

/// Words before the records, and of a record.
const HEADER: usize = 32;
const RECORD: usize = 4;
/// Room for records.
const SLOTS: usize = 32;
/// Random journals.
const ROUNDS: u64 = 300;

/// A dead daemon's image and journal. Sectors 0 to 7 were written and flushed (write 1), then 4 to 11 (write 2).
struct Left {
    start: Start,
    image: Image,
    words: Vec<u64>,
}

/// Clusters of one sector.
fn left() -> Left {
    let start = Shape::new(9, 64).make();
    let world = SimWorld::from_image(start.image.clone(), 1, SimOptions::calm());
    let memory = memory_for(SLOTS);
    let disk = open(&world, &start.shape);
    assert_eq!(
        disk.keep_journal(Some(memory.clone())).expect("a journal"),
        JournalKept::Begun { replayed: 0 }
    );
    write(&disk, 0, 8, 1);
    carry_out(&disk, Request::Flush, 0);
    write(&disk, 4, 8, 2);
    Left { start, image: world.image(), words: words_of(&memory) }
}

impl Left {
    /// How many clusters a successor carries out of these words, and what it leaves after a clean close.
    fn succeed(&self, words: &[u64]) -> (u64, Seen) {
        let world = SimWorld::from_image(self.image.clone(), 1, SimOptions::calm());
        let disk = open(&world, &self.start.shape);
        let kept = disk.keep_journal(Some(memory_of(words))).expect("it goes on");
        let JournalKept::Begun { replayed } = kept else { panic!("no journal was begun") };
        disk.close().expect("a clean close");
        assert_eq!(header(&world.image()).journal_number(), None, "a closed image has no journal");
        (replayed, examine(&world.image(), &self.start))
    }

    fn number(&self) -> u64 {
        header(&self.image).journal_number().map(JournalNumber::get).expect("a number")
    }

    /// A journal of these records, with seals that fit.
    fn forged(&self, records: &[[u64; 3]]) -> Vec<u64> {
        let mut words = vec![0; HEADER + SLOTS * RECORD];
        let slots = SLOTS as u64;
        words[..3].copy_from_slice(&[magic(), 1, slots]);
        words[3] = seal(self.number(), &[magic(), 1, slots, 0]);
        words[16] = records.len() as u64;
        for (position, record) in records.iter().enumerate() {
            let [first, second, third] = *record;
            let at = HEADER + position * RECORD;
            words[at..at + 3].copy_from_slice(record);
            words[at + 3] = seal(self.number(), &[position as u64, first, second, third]);
        }
        words
    }
}

fn header(image: &Image) -> Header {
    let file = image.file(Path::new(TOP)).expect("the image");
    let mut area = vec![0; 512];
    file.read(0, &mut area);
    Header::parse(&area, file.length()).expect("a header")
}

fn magic() -> u64 {
    u64::from_ne_bytes(*b"STRATAJL")
}

/// SipHash-1-3 of words, keyed as docs/protocol.md says.
fn seal(number: u64, words: &[u64]) -> u64 {
    let (low, high) = (number, number.rotate_left(29) ^ 0x5374_7261_7461_4a4c);
    let mut v = [
        low ^ u64::from_be_bytes(*b"somepseu"),
        high ^ u64::from_be_bytes(*b"dorandom"),
        low ^ u64::from_be_bytes(*b"lygenera"),
        high ^ u64::from_be_bytes(*b"tedbytes"),
    ];
    fn round(v: &mut [u64; 4]) {
        v[0] = v[0].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(13) ^ v[0];
        v[0] = v[0].rotate_left(32);
        v[2] = v[2].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(16) ^ v[2];
        v[0] = v[0].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(21) ^ v[0];
        v[2] = v[2].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(17) ^ v[2];
        v[2] = v[2].rotate_left(32);
    }
    for word in words.iter().copied().chain([(words.len() as u64 * 8) << 56]) {
        v[3] ^= word;
        round(&mut v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    (0..3).for_each(|_| round(&mut v));
    v.into_iter().fold(0, |all, part| all ^ part)
}

/// The disk with all that was answered, or only with what was flushed.
fn values(with_journal: bool) -> Vec<Value> {
    let value = |sector| match sector {
        4..12 if with_journal => Value::Write(2),
        // Sectors 4 to 7 are written in place.
        4..8 => Value::Write(2),
        0..4 => Value::Write(1),
        _ => Value::Zero,
    };
    (0..64).map(value).collect()
}

fn assert_sound(seen: &Seen, with_journal: bool, what: &str) {
    assert_eq!(seen.wrong, None, "{what}");
    assert_eq!(seen.values, values(with_journal), "{what}");
}

#[test]
fn a_journal_is_laid_out_as_documented() {
    let left = left();
    let (words, number) = (&left.words, left.number());
    assert_eq!(words[..3], [magic(), 1, SLOTS as u64]);
    assert_eq!(words[3], seal(number, &words[..3].iter().copied().chain([0]).collect::<Vec<_>>()));
    let (tail, head) = (words[8], words[16]);
    assert_eq!((tail, head), (1, 2), "one record was flushed, one was not");
    let at = HEADER + tail as usize * RECORD;
    let [clusters, entry, bitmap, sealed] = words[at..at + RECORD] else { panic!("four words") };
    assert_eq!((clusters & ((1 << 40) - 1), clusters >> 40, bitmap), (8, 4, 0), "clusters 8 to 11");
    assert!(entry >> 63 == 1 && entry & 0x1ff == 0, "data of the image's own: {entry:#x}");
    assert_eq!(sealed, seal(number, &[tail, clusters, entry, bitmap]));
    let (replayed, seen) = left.succeed(&left.forged(&[[clusters, entry, bitmap]]));
    assert_eq!(replayed, 4);
    assert_sound(&seen, true, "a journal written by the page alone");
}

#[test]
fn a_journal_is_carried_out_once() {
    let left = left();
    let (replayed, seen) = left.succeed(&left.words);
    assert_eq!(replayed, 4);
    assert_sound(&seen, true, "what the daemon left");
    // A second session of the same daemon begins a journal of its own, and the old words are of no use.
    let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &left.start.shape);
    let memory = memory_of(&left.words);
    assert_eq!(disk.keep_journal(Some(memory.clone())).expect("kept"), JournalKept::Begun { replayed: 4 });
    assert_eq!(disk.keep_journal(Some(memory)).expect("kept"), JournalKept::Begun { replayed: 0 });
    drop(disk);
    let again = Left { image: world.image(), ..left };
    let (replayed, seen) = again.succeed(&again.words);
    assert_eq!(replayed, 0, "it is the journal of an earlier state");
    assert_sound(&seen, true, "already carried out");
}

/// The image of a daemon that was killed before any flush, so that no count and no link of its clusters is on the disk.
fn left_unflushed() -> Left {
    let start = Shape::new(9, 64).make();
    let world = SimWorld::from_image(start.image.clone(), 1, SimOptions::calm());
    let memory = memory_for(SLOTS);
    let disk = open(&world, &start.shape);
    disk.keep_journal(Some(memory.clone())).expect("a journal");
    write(&disk, 0, 8, 1);
    Left { start, image: world.image(), words: words_of(&memory) }
}

/// A snapshot ends the journal. If another cannot begin, nothing more is answered that a death would lose. Where the
/// journal so far goes on, the disk does too.
#[test]
fn a_disk_fails_if_its_journal_cannot_begin_after_a_snapshot() {
    for (has_memory, takes_snapshot) in [(true, true), (true, false), (false, true)] {
        let start = Shape::new(9, 64).make();
        let world = SimWorld::from_image(start.image.clone(), 1, SimOptions::calm());
        let memory = has_memory.then(|| memory_for(SLOTS));
        let mut disk = open(&world, &start.shape);
        disk.keep_journal(memory.clone()).expect("kept");
        write(&disk, 0, 8, 1);
        if takes_snapshot {
            let new = NewOverlay { path: "overlay".into(), backing_file: TOP.as_bytes().to_vec() };
            let overlay = disk.make_overlay(&new).expect("it is made");
            let _old = disk.snapshot(overlay, || Ok(())).expect("it is put on top");
        }
        // No place is left for the worker that begins a journal.
        let mut queues = Vec::new();
        while let Ok(queue) = disk.queue(1) {
            queues.push(queue);
        }
        disk.keep_journal_again(memory).expect_err("there are too many queues");
        assert_eq!(disk.has_failed(), has_memory && takes_snapshot, "{has_memory} {takes_snapshot}");
    }
}

/// A journal is carried out in part, as space is lacking, and then its frontend does not come back. The clusters that were
/// counted for it are found by a later search.
#[test]
fn a_journal_that_was_carried_out_in_part_leaks_nothing_for_good() {
    let left = left_unflushed();
    let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &left.start.shape);
    let full = world.inject(Fault::nth(0, Outcome::Fail(Errno::ENOSPC)).of(Verb::Allocate).lasting());
    disk.keep_journal(Some(memory_of(&left.words))).expect_err("no space for an L2 table");
    assert!(world.hits(full) > 0);
    world.withdraw_faults();
    disk.keep_journal(None).expect("it is given up");
    let mut keeper = disk.keeper().expect("a housekeeper");
    wait_for_search(&disk, &mut keeper).expect("a search");
    drop(keeper);
    write(&disk, 20, 8, 3);
    disk.close().expect("a clean close");
    let seen = examine(&serve(&world.image(), &left.start).expect("the next session"), &left.start);
    assert_eq!((seen.wrong, seen.leaks), (None, 0));
    assert_eq!(seen.values[20..28], [Value::Write(3); 8]);
}

/// The search for leaks frees what a journal names if nobody carries it out. It waits until the image no longer has the
/// journal's number.
#[test]
fn a_journal_that_is_given_up_is_left_alone_until_its_number_is_gone() {
    for verb in [Verb::Write, Verb::Sync] {
        let left = left_unflushed();
        let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
        let disk = open(&world, &left.start.shape);
        let header = world.inject(Fault::nth(0, Outcome::Hang).of(verb).lasting());
        let given_up = catch_unwind(AssertUnwindSafe(|| disk.keep_journal(None)));
        assert!(given_up.is_err_and(|panic| panic.is::<Hung>()) && world.hits(header) > 0, "{verb:?}");
        assert!(disk.awaits_journal(), "{verb:?}: its number may still be there");
    }
}

/// A resize allocates, and a cluster that it would take may be one that the journal names.
#[test]
fn no_disk_is_resized_before_its_journal_is_carried_out() {
    let left = left();
    let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &left.start.shape);
    let wanted = || NewSize::Of(disk.size() + 64 * SECTOR);
    let refused = disk.resize(wanted(), Shrinking::Refused).expect_err("the journal is not here");
    let ResizeError::InUse { source: InUseError::AwaitsJournal, .. } = refused else { panic!("{refused}") };
    assert_eq!(header(&world.image()), header(&left.image), "nothing was changed");
    let kept = disk.keep_journal(Some(memory_of(&left.words))).expect("kept");
    assert_eq!(kept, JournalKept::Begun { replayed: 4 });
    disk.resize(wanted(), Shrinking::Refused).expect("it is here");
}

#[test]
fn a_journal_is_refused_once_somebody_else_wrote_the_image() {
    let left = left();
    // Another session, without the journal: it may use any cluster again.
    let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &left.start.shape);
    write(&disk, 20, 8, 3);
    carry_out(&disk, Request::Flush, 0);
    drop(disk);
    let after = Left { image: world.image(), ..left };
    let (replayed, seen) = after.succeed(&after.words);
    assert_eq!((replayed, seen.wrong), (0, None));
    assert_eq!(seen.values[20..28], [Value::Write(3); 8]);
    assert_eq!(seen.values[8..12], [Value::Zero; 4]);
}

#[test]
fn a_session_that_never_was_changes_nothing() {
    let left = left();
    let world = SimWorld::from_image(left.image.clone(), 1, SimOptions::calm());
    let disk = open(&world, &left.start.shape);
    let mut keeper = disk.keeper().expect("a housekeeper");
    (0..50).for_each(|_| keeper.poll());
    drop(keeper);
    disk.close().expect("a close");
    let after = Left { image: world.image(), ..left };
    let (replayed, seen) = after.succeed(&after.words);
    assert_eq!(replayed, 4);
    assert_sound(&seen, true, "opened and closed in between");
}

#[test]
fn a_changed_journal_is_refused_as_a_whole() {
    let left = left();
    let mut random = Random::new(7);
    let record = HEADER + RECORD;
    let used: Vec<usize> = (0..4).chain([8, 16]).chain(record..record + RECORD).collect();
    for round in 0..ROUNDS {
        let mut words = left.words.clone();
        let at = used[random.below(used.len() as u64) as usize];
        if round % 2 == 0 {
            words[at] ^= 1 << random.below(64);
        } else {
            words[at] = random.next_bits();
        }
        let (replayed, seen) = left.succeed(&words);
        // A tail before the flushed record only brings that back, which changes nothing.
        let whole = at == 8 && words[8] == 0;
        assert_eq!(replayed, if whole { 12 } else { 0 }, "word {at} is {:#x}", words[at]);
        assert_sound(&seen, whole, "a changed journal");
    }
}

#[test]
fn a_journal_of_random_words_is_refused() {
    let left = left();
    let mut random = Random::new(8);
    for _ in 0..ROUNDS / 4 {
        let words: Vec<u64> = left.words.iter().map(|_| random.next_bits()).collect();
        let (replayed, seen) = left.succeed(&words);
        assert_eq!(replayed, 0);
        assert_sound(&seen, false, "random words");
    }
}

/// Records whose seals fit, but which no daemon makes for this image.
#[test]
fn records_that_cannot_be_true_are_refused() {
    let left = left();
    let copied = 1u64 << 63;
    let file = left.image.file(Path::new(TOP)).expect("the image").length();
    let at = |first: u64, count: u64| count << 40 | first;
    // The clusters of the last record are free to be named.
    let free = left.words[HEADER + RECORD + 1] & !copied;
    let header = header(&left.image);
    let cases: &[(&str, Vec<[u64; 3]>)] = &[
        ("no clusters", vec![[at(3, 0), copied | free, 0]]),
        ("more than an L2 table has", vec![[at(0, 65), 1, 0]]),
        ("past the end of the disk", vec![[at(63, 2), 1, 0]]),
        ("the L1 table", vec![[at(20, 1), copied | header.l1_offset.0, 0]]),
        ("the refcount table", vec![[at(20, 1), copied | header.refcount_table_offset.0, 0]]),
        ("a run into the L1 table", vec![[at(20, 4), copied | (header.l1_offset.0 - 512), 0]]),
        ("past the end of the file", vec![[at(20, 1), copied | file.next_multiple_of(512), 0]]),
        ("past the largest offset", vec![[at(20, 2), copied | ((1 << 56) - 512), 0]]),
        ("the same cluster twice", vec![[at(20, 1), copied | free, 0], [at(21, 1), copied | free, 0]]),
        ("a cluster that another record's guest gives up", {
            // Cluster 0 has its data on the disk; it moves, and its old place is named elsewhere.
            let old = entry_of(&left, 0) & !copied;
            vec![[at(0, 1), copied | free, 0], [at(20, 1), copied | old, 0]]
        }),
        ("a shared cluster", vec![[at(20, 1), free, 0]]),
        ("compressed data", vec![[at(20, 1), 1 << 62 | free, 0]]),
    ];
    for (what, records) in cases {
        let (replayed, seen) = left.succeed(&left.forged(records));
        assert_eq!(replayed, 0, "{what}");
        assert_sound(&seen, false, what);
    }
}

/// The L2 entry of a guest cluster of the first table, as it is on the disk.
fn entry_of(left: &Left, cluster: u64) -> u64 {
    let file = left.image.file(Path::new(TOP)).expect("the image");
    let word = |offset: u64| {
        let mut bytes = [0; 8];
        file.read(offset, &mut bytes);
        u64::from_be_bytes(bytes)
    };
    let table = word(header(&left.image).l1_offset.0) & qcow2::entry::OFFSET_MASK;
    word(table + 8 * cluster)
}

/// Random records whose seals fit: whatever they say, nothing panics and no metadata is overwritten.
#[test]
fn no_sealed_records_harm_metadata() {
    let left = left();
    let mut random = Random::new(9);
    let clusters = left.image.file(Path::new(TOP)).expect("the image").length() / 512;
    let mut carried_out = 0;
    for round in 0..ROUNDS {
        let records: Vec<[u64; 3]> = (0..1 + random.below(6))
            .map(|_| {
                let first = random.below(66);
                let count = if random.chance(1, 8) { random.below(80) } else { 1 + random.below(4) };
                let entry = match random.below(8) {
                    0 => random.next_bits(),
                    1 => 0,
                    2 => 1,
                    3 => 1 << 63 | random.below(clusters + 2) << 9 | 1,
                    4 => random.below(clusters + 2) << 9,
                    _ => 1 << 63 | random.below(clusters + 2) << 9,
                };
                [count << 40 | first, entry, random.below(2) * random.next_bits()]
            })
            .collect();
        let world = SimWorld::from_image(left.image.clone(), round, SimOptions::calm());
        let disk = open(&world, &left.start.shape);
        let kept = disk.keep_journal(Some(memory_of(&left.forged(&records))));
        carried_out += u64::from(matches!(kept, Ok(JournalKept::Begun { replayed: 1.. })));
        // It may name what other entries of the guest's disk name, and so damage that disk, but no more.
        write(&disk, 40, 8, 5);
        drop(disk);
        let before = header(&left.image);
        let after = header(&world.image());
        assert_eq!((after.l1_offset, after.size), (before.l1_offset, before.size));
        let disk = open(&world, &left.start.shape);
        carry_out(&disk, Request::Read { offset: 0 }, 64);
    }
    assert!(carried_out > ROUNDS / 20, "only {carried_out} of {ROUNDS} journals were carried out");
}
