//! Tests of the states after a crash: the promise of an fdatasync, every subset of the rest, tears, lengths, overlaps.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use storage::{AlignedBuf, FileId, IoQueue, Kind, OpenOptions, Operation, Part, Storage, Token};

/// A world with one file "a" and a queue.
struct Rig {
    world: SimWorld,
    file: FileId,
    queue: SimQueue,
}

impl Rig {
    fn new(seed: u64, bytes: &[u8]) -> Self {
        let world = SimWorld::new(seed, SimOptions::default());
        world.add_file("a", bytes);
        let storage = world.storage();
        let options = OpenOptions { writable: true, direct: true, lock_timeout: Duration::ZERO };
        let (file, _) = storage.open(Path::new("a"), &options).expect("a file that is there");
        let queue = storage.queue(64).expect("a queue");
        Rig { world, file, queue }
    }

    fn push_write(&mut self, offset: u64, length: usize, byte: u8) {
        let mut buffer = AlignedBuf::new(length);
        buffer.as_mut_slice().fill(byte);
        let mut operation = Operation::bare(self.file, Kind::Write, offset);
        operation.parts.push(Part::Owned(buffer));
        self.queue.push(Token(0), operation);
    }

    fn push(&mut self, kind: Kind, offset: u64) {
        self.queue.push(Token(0), Operation::bare(self.file, kind, offset));
    }

    /// Waits for all operations; true if all succeeded.
    fn finish(&mut self) -> bool {
        let mut done = Vec::new();
        while self.queue.in_flight() > 0 {
            self.queue.wait(None);
            self.queue.reap(&mut done);
        }
        done.iter().all(|completion| completion.result.is_ok())
    }

    fn write(&mut self, offset: u64, length: usize, byte: u8) {
        self.push_write(offset, length, byte);
        assert!(self.finish());
    }

    fn run(&mut self, kind: Kind, offset: u64) -> bool {
        self.push(kind, offset);
        self.finish()
    }

    fn images(&self, moment: Moment, limits: &CrashLimits) -> Vec<Vec<u8>> {
        let history = self.world.history();
        let mut replay = Replay::new(&history);
        replay.advance_to(moment);
        let plans = replay.plans(limits, CrashScope::All, &mut Random::new(1));
        plans.iter().map(|plan| bytes(&replay.image(plan))).collect()
    }

    /// The states after a crash now, without tears.
    fn whole(&self) -> BTreeSet<Vec<u8>> {
        let limits = CrashLimits { tears: 0, ..CrashLimits::default() };
        self.images(self.world.moment(), &limits).into_iter().collect()
    }

    /// The states after a crash now, with many tears.
    fn torn(&self) -> BTreeSet<Vec<u8>> {
        let limits = CrashLimits { tears: 2000, ..CrashLimits::default() };
        self.images(self.world.moment(), &limits).into_iter().collect()
    }
}

fn bytes(image: &Image) -> Vec<u8> {
    image.file(Path::new("a")).expect("the file").to_bytes()
}

/// The first byte of each sector.
fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

fn sector_sets(images: &BTreeSet<Vec<u8>>) -> BTreeSet<Vec<u8>> {
    images.iter().map(|image| sectors(image)).collect()
}

#[test]
fn each_write_that_is_not_synced_may_be_kept_or_lost() {
    for seed in 0..20 {
        let mut rig = Rig::new(seed, &[0; 2048]);
        for sector in 0..4 {
            rig.write(sector * 512, 512, 1);
        }
        let images = sector_sets(&rig.whole());
        assert_eq!(images.len(), 16);
        assert!(images.contains(&vec![0, 0, 0, 0]) && images.contains(&vec![0, 1, 0, 1]));
        assert!(rig.run(Kind::Sync, 0));
        assert_eq!(sector_sets(&rig.torn()), [vec![1; 4]].into());
    }
}

#[test]
fn an_fdatasync_covers_only_operations_completed_before_its_push() {
    let mut lost = 0;
    for seed in 0..100 {
        let mut rig = Rig::new(seed, &[0; 1024]);
        rig.write(0, 512, 1);
        rig.push_write(512, 512, 1);
        rig.push(Kind::Sync, 0);
        assert!(rig.finish());
        let images = sector_sets(&rig.whole());
        assert_eq!(images, [vec![1, 0], vec![1, 1]].into(), "in flight when the fdatasync was pushed");
        lost += usize::from(images.contains(&vec![1, 0]));
        // While it is in flight it promises nothing.
        let history = rig.world.history();
        let mut replay = Replay::new(&history);
        let mut promised = false;
        while replay.advance() {
            let least = sectors(&bytes(replay.durable()));
            assert!(!promised || least[0] == 1, "a promise is kept for good");
            promised = least[0] == 1;
        }
        assert!(promised);
    }
    assert_eq!(lost, 100);
}

#[test]
fn an_fdatasync_of_one_file_covers_no_other() {
    let mut rig = Rig::new(4, &[0; 512]);
    rig.world.add_file("b", &[0; 512]);
    rig.write(0, 512, 1);
    let other = rig.world.storage();
    let options = OpenOptions { writable: true, direct: true, lock_timeout: Duration::ZERO };
    let (file, _) = other.open(Path::new("b"), &options).expect("a file that is there");
    let mut queue = other.queue(1).expect("a queue");
    queue.push(Token(0), Operation::bare(file, Kind::Sync, 0));
    drop(queue);
    assert_eq!(rig.whole().len(), 2);
}

#[test]
fn any_of_overlapping_writes_may_be_the_last_one_kept() {
    let mut rig = Rig::new(1, &[0; 1024]);
    rig.write(0, 1024, 1);
    rig.write(0, 512, 2);
    rig.write(512, 512, 3);
    let expected = [[0, 0], [1, 1], [2, 0], [2, 1], [0, 3], [1, 3], [2, 3]];
    assert_eq!(sector_sets(&rig.whole()), expected.iter().map(|image| image.to_vec()).collect());
    // Torn, each sector is any of its own values.
    assert_eq!(sector_sets(&rig.torn()).len(), 9);
}

#[test]
fn an_earlier_effect_never_undoes_a_durable_one() {
    let (mut first_wins, mut second_wins) = (0, 0);
    for seed in 0..300 {
        // Both are in flight together, but the first does not end before the fdatasync.
        let mut rig = Rig::new(seed, &[0; 512]);
        rig.world.inject(Fault::nth(0, Outcome::Hang));
        rig.push_write(0, 512, 1);
        rig.push_write(0, 512, 2);
        let mut done = Vec::new();
        while done.is_empty() {
            rig.queue.wait(None);
            rig.queue.reap(&mut done);
        }
        let seen = sectors(&bytes(&rig.world.image()))[0];
        rig.push(Kind::Sync, 0);
        while done.len() < 2 {
            rig.queue.wait(None);
            rig.queue.reap(&mut done);
        }
        let images = sector_sets(&rig.whole());
        assert!(images.contains(&vec![2]) && !images.contains(&vec![0]), "{images:?}");
        let history = rig.world.history();
        let first_happened = history.events.iter().any(
            |event| matches!(event, history::Event::Effect { operation: 0, bytes, .. } if !bytes.is_empty()),
        );
        match (first_happened, images.contains(&vec![1])) {
            (true, false) => {
                assert_eq!(seen, 2);
                second_wins += 1;
            }
            // It is still to happen, or has happened after the second, or even after the fdatasync.
            (_, true) => first_wins += 1,
            (false, false) => panic!("what is in flight may still happen"),
        }
    }
    assert!(first_wins > 20 && second_wins > 20, "{first_wins} {second_wins}");
}

#[test]
fn writes_are_torn_at_sectors_and_punches_and_zeroes_too() {
    let mut rig = Rig::new(1, &[7; 4096]);
    rig.write(512, 1536, 1);
    let torn = sector_sets(&rig.torn());
    assert_eq!(torn.len(), 8, "three sectors: each old or new");
    for kind in [Kind::Punch { length: 1536 }, Kind::Zero { length: 1536 }] {
        let mut rig = Rig::new(1, &[7; 4096]);
        assert!(rig.run(kind, 512));
        let torn = sector_sets(&rig.torn());
        assert_eq!(torn.len(), 8);
        assert!(torn.contains(&vec![7, 0, 7, 0, 7, 7, 7, 7]));
    }
}

#[test]
fn a_longer_file_is_kept_or_lost_apart_from_its_bytes() {
    let mut rig = Rig::new(1, &[7; 512]);
    rig.write(512, 512, 1);
    let images = sector_sets(&rig.whole());
    assert_eq!(images, [vec![7], vec![7, 0], vec![7, 1]].into());
    assert!(rig.run(Kind::Sync, 0));
    assert_eq!(sector_sets(&rig.whole()), [vec![7, 1]].into());
    assert!(rig.run(Kind::SetLength, 2048));
    assert_eq!(sector_sets(&rig.whole()), [vec![7, 1], vec![7, 1, 0, 0]].into());
    assert!(rig.run(Kind::Allocate { length: 512 }, 2048));
    assert_eq!(sector_sets(&rig.whole()), [vec![7, 1], vec![7, 1, 0, 0], vec![7, 1, 0, 0, 0]].into());
}

#[test]
fn a_shorter_file_loses_what_was_past_its_end_and_growing_shows_zeros() {
    let mut rig = Rig::new(1, &[7; 1536]);
    assert!(rig.run(Kind::SetLength, 512));
    assert!(rig.run(Kind::SetLength, 1024));
    rig.write(1024, 512, 2);
    let expected = [vec![7, 7, 7], vec![7, 7, 2], vec![7], vec![7, 0], vec![7, 0, 0], vec![7, 0, 2]]
        .into_iter()
        .collect();
    assert_eq!(sector_sets(&rig.whole()), expected);
    assert!(rig.run(Kind::Sync, 0));
    assert_eq!(sector_sets(&rig.torn()), [vec![7, 0, 2]].into());
}

#[test]
fn bytes_that_are_durable_keep_the_length_that_covers_them() {
    for seed in 0..200 {
        // The growth is in flight while a write into the grown part completes and is synced.
        let mut rig = Rig::new(seed, &[7; 512]);
        rig.world.inject(Fault::nth(0, Outcome::Delay(Duration::from_secs(1))));
        rig.push(Kind::SetLength, 4096);
        rig.push_write(1024, 512, 1);
        let mut done = Vec::new();
        while done.is_empty() {
            rig.queue.wait(None);
            rig.queue.reap(&mut done);
        }
        rig.push(Kind::Sync, 0);
        while done.len() < 2 {
            rig.queue.wait(None);
            rig.queue.reap(&mut done);
        }
        for image in rig.torn() {
            assert!(image.len() == 1536 || image.len() == 4096, "{} bytes", image.len());
            assert_eq!(image[1024..1536], [1; 512]);
        }
    }
}

#[test]
fn the_effect_of_a_failed_operation_is_open_until_synced() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let mut rig = Rig::new(seed, &[0; 1024]);
        rig.world.inject(Fault::nth(0, Outcome::Short(Errno::EIO)));
        rig.push_write(0, 1024, 1);
        assert!(!rig.finish());
        let found = sectors(&bytes(&rig.world.image()));
        let images = sector_sets(&rig.torn());
        assert!(images.contains(&vec![0, 0]) && images.contains(&found));
        assert!(images.iter().all(|image| image[0] <= found[0] && image[1] <= found[1]));
        assert!(rig.run(Kind::Sync, 0));
        assert_eq!(sector_sets(&rig.torn()), [found.clone()].into());
        seen.insert(found);
    }
    assert_eq!(seen.len(), 4);
}

#[test]
fn a_failed_fdatasync_leaves_each_operation_durable_lost_or_open() {
    let mut after = BTreeMap::new();
    for seed in 0..200 {
        let mut rig = Rig::new(seed, &[0; 512]);
        rig.write(0, 512, 1);
        rig.world.inject(Fault::nth(0, Outcome::Fail(Errno::EIO)).of(Verb::Sync));
        assert!(!rig.run(Kind::Sync, 0));
        assert_eq!(sectors(&bytes(&rig.world.image())), [1], "reads see it");
        let failed: Vec<_> = sector_sets(&rig.whole()).into_iter().flatten().collect();
        assert!(rig.run(Kind::Sync, 0));
        let synced: Vec<_> = sector_sets(&rig.whole()).into_iter().flatten().collect();
        *after.entry((failed, synced)).or_insert(0) += 1;
    }
    let expected = [(vec![0], vec![0]), (vec![1], vec![1]), (vec![0, 1], vec![1])];
    assert!(after.keys().cloned().eq([expected[0].clone(), expected[2].clone(), expected[1].clone()]));
    assert!(after.values().all(|count| *count > 30), "{after:?}");
}

#[test]
fn a_hanging_operation_may_reach_the_disk_at_any_time() {
    let mut rig = Rig::new(1, &[0; 512]);
    rig.world.inject(Fault::nth(0, Outcome::Hang));
    rig.push_write(0, 512, 1);
    rig.queue.submit();
    while rig.world.step() {}
    rig.push_write(0, 512, 2);
    rig.push(Kind::Sync, 0);
    rig.queue.submit();
    while rig.world.step() {}
    rig.push(Kind::Sync, 0);
    rig.queue.submit();
    while rig.world.step() {}
    let history = rig.world.history();
    let happened =
        history.events.iter().any(|event| matches!(event, history::Event::Effect { operation: 0, .. }));
    let expected: BTreeSet<Vec<u8>> = if happened { [vec![2]].into() } else { [vec![1], vec![2]].into() };
    assert_eq!(sector_sets(&rig.whole()), expected);
}

#[test]
fn many_open_operations_are_sampled_with_all_the_plain_cases() {
    let mut rig = Rig::new(1, &[0; 40 * 512]);
    for sector in 0..40 {
        rig.push_write(sector * 512, 512, 1);
    }
    assert!(rig.finish());
    let images = sector_sets(&rig.whole());
    assert!(images.contains(&vec![0; 40]) && images.contains(&vec![1; 40]));
    for sector in 0..40 {
        let one = |inside: u8, outside: u8| {
            (0..40).map(|other| if other == sector { inside } else { outside }).collect::<Vec<u8>>()
        };
        let prefix: Vec<u8> = (0..40).map(|other| u8::from(other < sector)).collect();
        assert!(images.contains(&one(1, 0)) && images.contains(&one(0, 1)) && images.contains(&prefix));
    }
    assert!(images.len() > 150, "{} states", images.len());
    let limits = CrashLimits::default();
    assert_eq!(rig.images(rig.world.moment(), &limits), rig.images(rig.world.moment(), &limits));
}

#[test]
fn the_new_crashes_of_all_instants_are_all_the_crashes() {
    for seed in 0..20 {
        let mut rig = Rig::new(seed, &[0; 4096]);
        for round in 0..3u8 {
            for number in 0..5 {
                rig.push_write(u64::from(number) * 512, 512, round * 5 + number + 1);
            }
            rig.push(Kind::SetLength, 4096 + 512 * u64::from(round));
            assert!(rig.finish());
            assert!(rig.run(Kind::Sync, 0));
        }
        let history = rig.world.history();
        let limits = CrashLimits { exhaustive: 12, samples: 0, tears: 0 };
        let collect = |scope: CrashScope| {
            let (mut replay, mut random) = (Replay::new(&history), Random::new(1));
            let (mut states, mut tried) = (BTreeSet::new(), 0);
            while replay.advance_to_change() {
                for plan in replay.plans(&limits, scope, &mut random) {
                    tried += 1;
                    states.insert(replay.image(&plan).hash());
                }
            }
            assert_eq!(replay.moment(), history.end());
            (states, tried)
        };
        let ((all, all_tried), (new, new_tried)) = (collect(CrashScope::All), collect(CrashScope::New));
        assert!(all == new, "{} of {} states", new.len(), all.len());
        assert!(new_tried * 3 < all_tried * 2, "{new_tried} of {all_tried}");
    }
}

#[test]
fn a_plan_can_be_described() {
    let mut rig = Rig::new(1, &[0; 512]);
    rig.write(512, 1024, 1);
    rig.push(Kind::Punch { length: 512 }, 0);
    assert!(rig.finish());
    let history = rig.world.history();
    let mut replay = Replay::new(&history);
    replay.advance_to(history.end());
    assert_eq!(replay.open_count(), 3);
    let text = replay.describe(&replay.everything());
    assert!(
        text.contains("Write 0x200+0x400 of a: kept") && text.contains("Punch 0x0+0x200 of a: kept"),
        "{text}"
    );
    assert!(text.contains("its length kept"), "{text}");
    let text = replay.describe(&CrashPlan::nothing());
    assert!(text.contains("Write 0x200+0x400 of a: lost") && text.contains("its length lost"), "{text}");
    assert_eq!(bytes(&replay.image(&CrashPlan::nothing())).len(), 512);
    assert_eq!(replay.image(&replay.everything()).hash(), rig.world.image().hash());
}

/// The values that a simple model allows for each sector, from the pushed, completed and synced writes.
#[derive(Clone, Default)]
struct Allowed {
    durable: u8,
    open: Vec<u8>,
}

#[test]
fn random_runs_leave_only_what_a_simple_model_allows_and_all_of_it() {
    const SECTORS: usize = 8;
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut rig = Rig::new(seed, &[0; SECTORS * 512]);
        let mut allowed = vec![Allowed::default(); SECTORS];
        let mut checkpoints = Vec::new();
        let mut value = 0;
        for _ in 0..6 {
            // Sectors of one round do not overlap, and each round completes: so its values come in order.
            for (sector, allowed) in allowed.iter_mut().enumerate() {
                if random.chance(1, 3) {
                    value += 1;
                    rig.push_write(sector as u64 * 512, 512, value);
                    allowed.open.push(value);
                }
            }
            assert!(rig.finish());
            checkpoints.push((rig.world.moment(), allowed.clone()));
            if random.chance(1, 2) {
                assert!(rig.run(Kind::Sync, 0));
                for allowed in &mut allowed {
                    allowed.durable = allowed.open.last().copied().unwrap_or(allowed.durable);
                    allowed.open.clear();
                }
                checkpoints.push((rig.world.moment(), allowed.clone()));
            }
        }
        let limits = CrashLimits { samples: 300, tears: 50, ..CrashLimits::default() };
        for (moment, allowed) in checkpoints {
            let images = rig.images(moment, &limits);
            for (sector, allowed) in allowed.iter().enumerate() {
                let found: BTreeSet<u8> = images.iter().map(|image| sectors(image)[sector]).collect();
                let expected: BTreeSet<u8> = allowed.open.iter().copied().chain([allowed.durable]).collect();
                assert_eq!(found, expected, "sector {sector} at {moment:?}, seed {seed}");
            }
            let whole = images.iter().all(|image| image.chunks(512).all(|s| s.iter().all(|b| *b == s[0])));
            assert!(whole, "no sector is torn");
        }
    }
}

#[test]
fn a_crashed_world_continues_from_its_image() {
    let mut rig = Rig::new(1, &[0; 1024]);
    rig.write(0, 512, 1);
    assert!(rig.run(Kind::Sync, 0));
    rig.write(512, 512, 2);
    let history = rig.world.history();
    let mut replay = Replay::new(&history);
    replay.advance_to(history.end());
    let crashed = SimWorld::from_image(replay.image(&CrashPlan::nothing()), 2, SimOptions::default());
    assert_eq!(crashed.moment(), Moment(0));
    assert_eq!(sectors(&bytes(&crashed.image())), [1, 0]);
    let storage = crashed.storage();
    let options = OpenOptions { writable: true, direct: true, lock_timeout: Duration::ZERO };
    let (file, info) = storage.open(Path::new("a"), &options).expect("a file that is there");
    assert_eq!(info.length, 1024);
    let mut queue = storage.queue(4).expect("a queue");
    queue.push(Token(0), Operation::bare(file, Kind::SetLength, 512));
    drop(queue);
    assert_eq!(sectors(&bytes(&crashed.image())), [1]);
    // The crashed world, its record and its other images are unchanged.
    assert_eq!(sectors(&bytes(&rig.world.image())), [1, 2]);
    assert_eq!(sectors(&bytes(&replay.image(&replay.everything()))), [1, 2]);
    assert_eq!(sectors(&bytes(history.start())), [0, 0]);
}
