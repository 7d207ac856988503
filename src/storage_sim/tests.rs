//! Tests of the simulated host's storage: the results and times of reads, queues, the clock, faults, locks.

use std::collections::BTreeSet;

use vmm_sys_util::eventfd::EventFd;

use super::*;
use storage::{
    AlignedBuf, Completion, FileId, GuestSlice, IoQueue, Kind, OpenOptions, Operation, Part, Storage,
    StorageError, Token,
};

const KIB: u64 = 1024;

fn options(writable: bool) -> OpenOptions {
    OpenOptions { writable, direct: true, lock_timeout: Duration::ZERO }
}

/// A world with one file "a" of `bytes`, open for writing, and a queue.
fn open(seed: u64, sim: SimOptions, bytes: &[u8]) -> (SimWorld, SimStorage, FileId, SimQueue) {
    let world = SimWorld::new(seed, sim);
    world.add_file("a", bytes);
    let storage = world.storage();
    let (file, _) = storage.open(Path::new("a"), &options(true)).expect("a file that is there");
    let queue = storage.queue(64).expect("a queue");
    (world, storage, file, queue)
}

fn write(file: FileId, offset: u64, length: usize, byte: u8) -> Operation {
    let mut buffer = AlignedBuf::new(length);
    buffer.as_mut_slice().fill(byte);
    let mut operation = Operation::bare(file, Kind::Write, offset);
    operation.parts.push(Part::Owned(buffer));
    operation
}

fn read(file: FileId, offset: u64, length: usize) -> Operation {
    let mut operation = Operation::bare(file, Kind::Read, offset);
    operation.parts.push(Part::Owned(AlignedBuf::new(length)));
    operation
}

fn run_all(queue: &mut SimQueue) -> Vec<Completion> {
    let mut done = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(None);
        queue.reap(&mut done);
    }
    done
}

fn run(queue: &mut SimQueue, operation: Operation) -> Result<(), Errno> {
    queue.push(Token(0), operation);
    run_all(queue).pop().expect("one completion").result
}

fn bytes_of(completion: &Completion) -> &[u8] {
    match &completion.parts[0] {
        Part::Owned(buffer) => buffer.as_slice(),
        Part::Guest(_) => panic!("no guest memory here"),
    }
}

fn run_read(queue: &mut SimQueue, file: FileId, offset: u64, length: usize) -> Vec<u8> {
    queue.push(Token(0), read(file, offset, length));
    let done = run_all(queue).pop().expect("one completion");
    done.result.expect("a read succeeds");
    bytes_of(&done).to_vec()
}

/// The file as reads see it.
fn contents(world: &SimWorld) -> Vec<u8> {
    world.image().file(Path::new("a")).expect("the file").to_bytes()
}

#[test]
fn operations_do_what_they_say() {
    for seed in 0..20 {
        let (world, storage, file, mut queue) = open(seed, SimOptions::default(), &[1; 8192]);
        let mut model = vec![1u8; 8192];
        assert_eq!(run(&mut queue, write(file, 4096, 8192, 2)), Ok(()));
        model.resize(12_288, 0);
        model[4096..].fill(2);
        assert_eq!(contents(&world), model);
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Punch { length: 4096 }, 4096)), Ok(()));
        model[4096..8192].fill(0);
        assert_eq!(storage.allocated(file).expect("a size"), 8192);
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Zero { length: 8192 }, 8192)), Ok(()));
        model[8192..].fill(0);
        model.resize(16_384, 0);
        assert_eq!(storage.allocated(file).expect("a size"), 12_288);
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Allocate { length: 4096 }, 16_384)), Ok(()));
        model.resize(20_480, 0);
        assert_eq!(storage.allocated(file).expect("a size"), 16_384);
        assert_eq!(contents(&world), model);
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::SetLength, 1024)), Ok(()));
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::SetLength, 40_960)), Ok(()));
        model.truncate(1024);
        model.resize(40_960, 0);
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Sync, 0)), Ok(()));
        assert_eq!(storage.length(file).expect("a length"), 40_960);
        assert_eq!(contents(&world), model);
        model.resize(45_056, 0);
        assert_eq!(run_read(&mut queue, file, 0, 45_056), model, "past the end are zeros");
    }
}

#[test]
fn parts_of_guest_and_own_memory_are_moved_in_order() {
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[]);
    let memory: &'static mut [u8] = Box::leak(vec![0u8; 8192 + 4096].into_boxed_slice());
    let skip = memory.as_ptr().align_offset(4096);
    let slice = GuestSlice::from(&mut memory[skip..skip + 8192]);
    let guest = |from: usize, len: usize| slice.subslice(from, len).expect("within");
    guest(0, 512).copy_from(&[1u8; 512]);
    guest(1024, 512).copy_from(&[3u8; 512]);
    let mut operation = Operation::bare(file, Kind::Write, 512);
    operation.parts.push(Part::Guest(guest(0, 512)));
    let mut own = AlignedBuf::new(1024);
    own.as_mut_slice().fill(2);
    operation.parts.push(Part::Owned(own));
    operation.parts.push(Part::Guest(guest(1024, 512)));
    assert_eq!(run(&mut queue, operation), Ok(()));
    let whole = contents(&world);
    let expected: Vec<u8> = [(0, 512), (1, 512), (2, 1024), (3, 512)]
        .iter()
        .flat_map(|(byte, count)| vec![*byte as u8; *count])
        .collect();
    assert_eq!(whole, expected);

    let mut operation = Operation::bare(file, Kind::Read, 0);
    operation.parts.push(Part::Guest(guest(4096, 1024)));
    operation.parts.push(Part::Owned(AlignedBuf::new(2048)));
    queue.push(Token(9), operation);
    queue.submit();
    while world.step() {}
    let mut found = vec![9u8; 1024];
    guest(4096, 1024).copy_to(&mut found);
    assert_eq!(found, vec![0; 1024], "filled before it was handed over");
    let done = run_all(&mut queue).pop().expect("one completion");
    assert_eq!(done.token, Token(9));
    guest(4096, 1024).copy_to(&mut found);
    assert_eq!(found, expected[..1024]);
    let Part::Owned(buffer) = &done.parts[1] else { panic!("the parts come back in order") };
    assert_eq!(&buffer.as_slice()[..1536], &expected[1024..]);
}

#[test]
fn a_seed_is_one_run_and_completions_come_in_any_order() {
    let order = |seed| {
        let (world, storage, file, mut first) = open(seed, SimOptions::default(), &[0; 65_536]);
        let mut second = storage.queue(64).expect("a queue");
        for number in 0..16 {
            let queue = if number % 2 == 0 { &mut first } else { &mut second };
            queue.push(Token(number), write(file, number * 4096, 4096, number as u8 + 1));
        }
        first.submit();
        second.submit();
        let (mut done, mut order) = (Vec::new(), Vec::new());
        while first.in_flight() + second.in_flight() > 0 {
            first.wait(None);
            first.reap(&mut done);
            second.reap(&mut done);
            order.extend(done.drain(..).map(|completion| completion.token.0));
        }
        (order, format!("{:?}", world.history().events))
    };
    assert_eq!(order(7), order(7));
    let orders: BTreeSet<Vec<u64>> = (0..50).map(|seed| order(seed).0).collect();
    assert!(orders.len() > 45, "only {} orders in 50 runs", orders.len());
    // Every operation comes before and after every other in some run.
    for (a, b) in [(0, 1), (0, 15), (3, 4), (14, 15)] {
        let before = orders.iter().filter(|order| {
            let place = |number| order.iter().position(|other| *other == number);
            place(a) < place(b)
        });
        let count = before.count();
        assert!(count > 10 && count < orders.len() - 10, "{a} before {b} in {count} of {}", orders.len());
    }
}

#[test]
fn without_shuffling_all_is_in_order() {
    let (_world, _storage, file, mut queue) = open(3, SimOptions::calm(), &[]);
    for number in 0..100 {
        queue.push(Token(number), write(file, 0, 512, number as u8));
    }
    queue.push(Token(100), read(file, 0, 512));
    let done = run_all(&mut queue);
    assert!(done.iter().map(|completion| completion.token.0).eq(0..=100));
    assert_eq!(bytes_of(&done[100]), &[99; 512]);
}

#[test]
fn reads_during_a_write_return_old_or_new_sectors_and_after_it_new_ones() {
    let (mut old, mut new, mut mixed) = (0, 0, 0);
    for seed in 0..300 {
        let (_world, _storage, file, mut queue) = open(seed, SimOptions::default(), &[1; 4096]);
        queue.push(Token(0), write(file, 0, 4096, 2));
        queue.push(Token(1), read(file, 0, 4096));
        let done = run_all(&mut queue);
        let found = done.iter().find(|completion| completion.token == Token(1)).expect("the read");
        let sectors: BTreeSet<&[u8]> = bytes_of(found).chunks(512).collect();
        for sector in &sectors {
            assert!(*sector == [1; 512] || *sector == [2; 512], "a sector is one or the other");
        }
        match (sectors.len(), bytes_of(found)[0]) {
            (1, 1) => old += 1,
            (1, _) => new += 1,
            _ => mixed += 1,
        }
        assert_eq!(run_read(&mut queue, file, 0, 4096), vec![2; 4096]);
    }
    assert!(old > 20 && new > 20 && mixed > 5, "{old} old, {new} new, {mixed} mixed");
}

#[test]
fn nothing_starts_before_it_is_submitted_nor_beyond_the_depth() {
    let (world, storage, file, mut queue) = open(2, SimOptions::default(), &[0; 4096]);
    queue.push(Token(0), write(file, 0, 512, 1));
    assert!(!world.step(), "it was not submitted");
    assert!(!world.is_idle());
    queue.submit();
    while world.step() {}
    assert_eq!(contents(&world)[0], 1);
    assert_eq!(run_all(&mut queue).len(), 1);
    assert!(world.is_idle());

    let mut narrow = storage.queue(2).expect("a queue");
    for number in 0..5 {
        narrow.push(Token(number), write(file, number * 512, 512, 9));
    }
    narrow.submit();
    while world.step() {}
    let mut done = Vec::new();
    narrow.reap(&mut done);
    assert_eq!(done.len(), 2);
    assert_eq!(narrow.in_flight(), 3);
    assert_eq!(run_all(&mut narrow).len(), 3);
}

#[test]
fn operations_are_refused_as_by_a_real_host() {
    let sim = SimOptions { punch: false, zero: false, allocate: false, ..SimOptions::default() };
    let (world, storage, file, mut queue) = open(1, sim, &[1; 4096]);
    world.add_file("b", &[1; 4096]);
    let (reader, info) = storage.open(Path::new("b"), &options(false)).expect("another file");
    assert_eq!((info.offset_alignment, info.memory_alignment, info.length), (512, 512, 4096));
    let unaligned_memory = {
        let memory: &'static mut [u8] = Box::leak(vec![0u8; 2048].into_boxed_slice());
        let skip = memory.as_ptr().align_offset(512) + 1;
        let mut operation = Operation::bare(file, Kind::Read, 0);
        operation.parts.push(Part::Guest(GuestSlice::from(&mut memory[skip..skip + 512])));
        operation
    };
    let bare = |kind, offset| Operation::bare(file, kind, offset);
    let cases = [
        (write(file, 100, 512, 2), Err(Errno::EINVAL)),
        (write(file, 0, 100, 2), Err(Errno::EINVAL)),
        (unaligned_memory, Err(Errno::EINVAL)),
        (read(file, i64::MAX as u64 - 511, 4096), Err(Errno::EINVAL)),
        (read(file, u64::MAX - 511, 4096), Err(Errno::EINVAL)),
        (bare(Kind::SetLength, u64::MAX), Err(Errno::EINVAL)),
        (bare(Kind::Punch { length: 512 }, 0), Err(Errno::EOPNOTSUPP)),
        (bare(Kind::Zero { length: 512 }, 0), Err(Errno::EOPNOTSUPP)),
        (bare(Kind::Allocate { length: 512 }, 0), Err(Errno::EOPNOTSUPP)),
        (bare(Kind::Punch { length: 0 }, 0), Ok(())),
        (write(reader, 0, 512, 2), Err(Errno(libc::EBADF))),
        (Operation::bare(reader, Kind::SetLength, 0), Err(Errno::EINVAL)),
        (Operation::bare(reader, Kind::Sync, 0), Ok(())),
    ];
    for (number, (operation, expected)) in cases.into_iter().enumerate() {
        assert_eq!(run(&mut queue, operation), expected, "case {number}");
    }
    assert_eq!(contents(&world), vec![1; 4096]);
    let sim = SimOptions { offset_alignment: 1, memory_alignment: 1, ..SimOptions::default() };
    let (world, _storage, file, mut queue) = open(1, sim, &[1; 700]);
    assert_eq!(run(&mut queue, write(file, 100, 7, 2)), Ok(()));
    let found = contents(&world);
    assert_eq!((found[99], found[100], found[106], found[107]), (1, 2, 2, 1));
}

#[test]
fn a_writer_excludes_all_other_holders() {
    let (world, storage, _file, queue) = open(1, SimOptions::default(), &[1; 512]);
    let path = Path::new("a");
    let again = storage.open(path, &options(false)).expect_err("open here already");
    assert!(matches!(again, StorageError::AlreadyOpen { file: FileId(0), .. }), "{again}");
    let other = world.storage();
    let refused = other.open(path, &options(false)).expect_err("open for writing elsewhere");
    assert!(matches!(refused, StorageError::Locked { .. }), "{refused}");
    let missing = other.open(Path::new("none"), &options(false)).expect_err("there is none");
    assert!(matches!(missing, StorageError::File { step: storage::error::Step::Open, .. }), "{missing}");
    // A crash leaves no locks.
    let crashed = SimWorld::from_image(world.image(), 2, SimOptions::calm());
    assert!(crashed.storage().open(path, &options(true)).is_ok());
    drop(storage);
    assert!(other.open(path, &options(true)).is_err(), "the queue still uses it");
    drop(queue);
    let third = world.storage();
    let (first, _) = other.open(path, &options(false)).expect("free again");
    let (second, _) = other.open(path, &options(false)).expect("two readers");
    assert_eq!((first, second), (FileId(0), FileId(1)));
    assert!(third.open(path, &options(false)).is_ok());
    assert!(third.open(path, &options(true)).is_err(), "readers are in the way");
}

#[test]
fn time_advances_only_by_waits_and_passes() {
    let (world, storage, file, mut first) = open(1, SimOptions::default(), &[]);
    let start = world.now();
    let second = std::time::Duration::from_secs(1);
    first.wait(Some(3600 * second));
    assert_eq!(world.now() - start, 3600 * second);
    // Two queues: time moves when both wait, to the earlier end.
    let mut other = storage.queue(8).expect("a queue");
    let start = world.now();
    first.wait(Some(5 * second));
    assert_eq!(world.now(), start, "the other queue may have something to do");
    other.wait(Some(2 * second));
    assert_eq!(other.now() - start, 2 * second);
    // A completion in good time ends a wait.
    first.push(Token(0), write(file, 0, 512, 1));
    let start = world.now();
    other.wait(Some(second));
    assert_eq!(world.now(), start, "the first has something to submit");
    first.wait(Some(second));
    assert!(world.now() > start && world.now() - start < second / 10);
    assert_eq!(run_all(&mut first).len(), 1);
    let start = world.now();
    world.pass(7 * second);
    assert_eq!(world.now() - start, 7 * second);
}

#[test]
fn notifiers_and_watched_eventfds_end_a_wait_once() {
    let (_world, _storage, _file, mut queue) = open(1, SimOptions::default(), &[]);
    let start = queue.now();
    queue.notifier().notify();
    queue.wait(Some(Duration::from_secs(1)));
    assert_eq!(queue.now(), start);
    let event = EventFd::new(0).expect("an eventfd");
    queue.watch(event.try_clone().expect("a copy"));
    event.write(1).expect("a signal");
    queue.wait(Some(Duration::from_secs(1)));
    assert_eq!(queue.now(), start);
    queue.wait(Some(Duration::from_secs(1)));
    assert_eq!(queue.now() - start, Duration::from_secs(1));
}

#[test]
fn a_deadlock_lists_the_hanging_operations() {
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[]);
    world.inject(Fault::nth(0, Outcome::Hang));
    queue.push(Token(5), write(file, 512, 512, 1));
    let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_all(&mut queue)));
    let Hung(report) = *waited.expect_err("nothing ends").downcast().expect("a fault's doing");
    assert!(report.contains("in flight on queue 0 since 0ns: Write of 512 bytes at 0x200 of a"), "{report}");
}

#[test]
fn it_is_a_deadlock_only_if_all_queues_wait_without_work() {
    let (_world, storage, file, mut first) = open(1, SimOptions::default(), &[]);
    let mut second = storage.queue(8).expect("a queue");
    second.push(Token(0), write(file, 0, 512, 1));
    second.submit();
    for _ in 0..10 {
        first.wait(None);
    }
    assert_eq!(run_all(&mut second).len(), 1);
    first.wait(None);
    let stuck = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| second.wait(None)));
    assert!(stuck.is_err(), "both wait for nothing");
    // The world is usable after the panic.
    assert_eq!(run(&mut first, write(file, 0, 512, 2)), Ok(()));
    let stuck = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..2000 {
            first.wait(None);
        }
    }));
    assert!(stuck.is_err(), "one waits for nothing, and the other is never turned");
}

#[test]
fn a_failed_operation_has_no_effect_and_a_short_one_a_part() {
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[1; 4096]);
    let fault = world.inject(Fault::nth(1, Outcome::Fail(Errno::EIO)).of(Verb::Write));
    assert_eq!(run(&mut queue, write(file, 0, 512, 2)), Ok(()));
    assert_eq!(run(&mut queue, write(file, 512, 8192, 2)), Err(Errno::EIO));
    assert_eq!(contents(&world).len(), 4096);
    assert_eq!(&contents(&world)[512..], &[1; 3584]);
    assert_eq!(run(&mut queue, write(file, 512, 512, 2)), Ok(()));
    assert_eq!((world.hits(fault), world.count(Verb::Write)), (1, 3));
    let (mut none, mut some, mut all) = (0, 0, 0);
    for seed in 0..200 {
        let (world, _storage, file, mut queue) = open(seed, SimOptions::default(), &[1; 4096]);
        world.inject(Fault::nth(0, Outcome::Short(Errno::ENOSPC)));
        assert_eq!(run(&mut queue, write(file, 0, 4096, 2)), Err(Errno::ENOSPC));
        match contents(&world).chunks(512).filter(|sector| *sector == [2; 512]).count() {
            0 => none += 1,
            8 => all += 1,
            _ => some += 1,
        }
    }
    assert!(none > 5 && some > 50 && all > 5, "{none} none, {some} some, {all} all");
}

#[test]
fn a_failed_read_leaves_garbage() {
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[0; 4096]);
    world.inject(Fault::nth(0, Outcome::Fail(Errno::EIO)));
    queue.push(Token(0), read(file, 0, 512));
    let done = run_all(&mut queue).pop().expect("one completion");
    assert_eq!(done.result, Err(Errno::EIO));
    assert!(bytes_of(&done).iter().all(|byte| *byte != 0));
}

#[test]
fn delayed_operations_complete_late_and_hanging_ones_when_released() {
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[0; 4096]);
    let minute = Duration::from_secs(60);
    world.inject(Fault::nth(0, Outcome::Delay(minute)));
    world.inject(Fault::nth(2, Outcome::Hang));
    let start = world.now();
    for number in 0..3 {
        queue.push(Token(number), write(file, number * 512, 512, 1));
    }
    let mut done = Vec::new();
    queue.wait(None);
    queue.reap(&mut done);
    assert!(world.now() - start < minute);
    queue.wait(None);
    queue.reap(&mut done);
    assert!(world.now() - start >= minute);
    assert!(done.iter().map(|completion| completion.token.0).eq([1, 0]));
    queue.wait(Some(minute));
    assert_eq!(queue.in_flight(), 1);
    world.release_hung();
    done = run_all(&mut queue);
    assert_eq!((done[0].token, done[0].result), (Token(2), Ok(())));
    assert_eq!(contents(&world)[1024..1536], [1; 512]);
}

#[test]
fn a_delayed_operation_takes_effect_after_those_that_complete_meanwhile() {
    for seed in 0..50 {
        let (world, _storage, file, mut queue) = open(seed, SimOptions::default(), &[0; 512]);
        world.inject(Fault::nth(0, Outcome::Delay(Duration::from_secs(60))));
        queue.push(Token(0), write(file, 0, 512, 1));
        let mut done = Vec::new();
        for byte in 2..20 {
            queue.push(Token(byte), write(file, 0, 512, byte as u8));
            queue.wait(None);
            queue.reap(&mut done);
            assert_eq!(contents(&world), [byte as u8; 512]);
        }
        done.extend(run_all(&mut queue));
        assert_eq!(done.last().map(|completion| completion.token), Some(Token(0)));
        assert_eq!(contents(&world), [1; 512]);
    }
}

#[test]
fn dropping_a_queue_waits_for_operations_in_flight_but_not_for_hanging_ones() {
    let (world, storage, file, mut queue) = open(1, SimOptions::default(), &[0; 4096]);
    world.inject(Fault::nth(2, Outcome::Hang));
    for number in 0..8 {
        queue.push(Token(number), write(file, number * 512, 512, 1));
    }
    drop(queue);
    let found = contents(&world);
    let written = found.chunks(512).filter(|sector| **sector == [1; 512]).count();
    assert!(written >= 7, "{written} of 8");
    drop(storage);
    assert!(world.storage().open(Path::new("a"), &options(true)).is_ok());
}

#[test]
fn a_full_file_system_fails_writes_until_there_is_room() {
    for seed in 0..50 {
        let (world, _storage, file, mut queue) = open(seed, SimOptions::default(), &[1; 8 * 1024]);
        world.set_space(16 * KIB, Errno::EDQUOT);
        // Writes in place continue; writes past the end use the room that is left.
        assert_eq!(run(&mut queue, write(file, 0, 8192, 2)), Ok(()));
        assert_eq!(run(&mut queue, write(file, 8192, 16_384, 3)), Err(Errno::EDQUOT));
        assert_eq!(world.allocated(), 16 * KIB);
        let found = contents(&world);
        assert_eq!(found.len(), 16_384);
        assert!(found[8192..].iter().all(|byte| *byte == 3));
        assert_eq!(
            run(&mut queue, Operation::bare(file, Kind::Allocate { length: 4096 }, 65_536)),
            Err(Errno::EDQUOT)
        );
        assert_eq!(contents(&world).len(), 16_384);
        assert_eq!(
            run(&mut queue, Operation::bare(file, Kind::SetLength, 1 << 40)),
            Ok(()),
            "a hole needs none"
        );
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Punch { length: 4096 }, 0)), Ok(()));
        assert_eq!(run(&mut queue, Operation::bare(file, Kind::Allocate { length: 4096 }, 65_536)), Ok(()));
        assert_eq!(run(&mut queue, write(file, 0, 4096, 4)), Err(Errno::EDQUOT));
        assert_eq!(run(&mut queue, write(file, 65_536, 4096, 4)), Ok(()), "it was allocated ahead");
        world.set_space(1 << 30, Errno::ENOSPC);
        assert_eq!(run(&mut queue, write(file, 0, 4096, 5)), Ok(()));
        assert_eq!(run_read(&mut queue, file, 65_536, 4096), vec![4; 4096]);
    }
    // A huge claimed size costs little.
    let (world, _storage, file, mut queue) = open(1, SimOptions::default(), &[]);
    world.set_space(KIB, Errno::ENOSPC);
    let huge = Operation::bare(file, Kind::Allocate { length: 1 << 60 }, 0);
    assert_eq!(run(&mut queue, huge), Err(Errno::ENOSPC));
}
