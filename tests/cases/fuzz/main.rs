//! Every fuzz target, without a fuzzer: on data from images of QEMU's tools, on earlier findings, and on random
//! mutations of both.
//!
//! - `STRATA_FUZZ_SECONDS=n` sets the processor time of all targets together.
//! - `STRATA_FUZZ_ONLY=file` reruns one input. Its name begins with its target.
//! - `STRATA_FUZZ_CORPUS=folder` writes the seeds there for cargo-fuzz.
//!
//! README.md has more.

mod mutate;
mod seeds;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread::{available_parallelism, current, scope};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, TestRunner};
use storage_sim::Random;
use strata_kit::Qemu;

use strata_fuzz_targets::{TARGETS, Target, target};

/// Inputs of each target if no time is set.
const RUNS: u64 = 400;

/// The number in an environment variable.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Earlier findings: one folder for each target.
fn findings(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/findings").join(target.name);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("the folder can be listed").path());
    paths.map(|path| (path.clone(), std::fs::read(path).expect("an input"))).collect()
}

/// Runs an input, and retains it if it is a finding. The input is in a file meanwhile, because some findings end the
/// program.
fn run(target: &Target, input: &[u8], what: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    std::fs::create_dir_all(&folder).expect("a folder for findings");
    let now = folder.join(format!("{}-now-{}-{:?}", target.name, std::process::id(), current().id()));
    std::fs::write(&now, input).expect("an input is kept");
    let panic = catch_unwind(AssertUnwindSafe(|| target.run(input))).err();
    if let Some(panic) = panic {
        let path = folder.join(format!("{}-{:016x}", target.name, hash(input)));
        std::fs::rename(&now, &path).expect("a finding is kept");
        eprintln!("{what}: again with STRATA_FUZZ_ONLY={}", path.display());
        std::panic::resume_unwind(panic);
    }
    std::fs::remove_file(&now).expect("it is no finding");
}

fn hash(input: &[u8]) -> u64 {
    input
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn findings_are_mended() {
    if let Some(path) = std::env::var_os("STRATA_FUZZ_ONLY").map(PathBuf::from) {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        let (name, _) = name.split_once('-').unwrap_or((&name, ""));
        return target(name).run(&std::fs::read(&path).expect("an input"));
    }
    for target in TARGETS {
        for (path, input) in findings(target) {
            run(target, &input, &path.display().to_string());
        }
    }
}

#[test]
fn every_target_survives_random_mutations_of_its_seeds() {
    if std::env::var_os("STRATA_FUZZ_ONLY").is_some() {
        return;
    }
    let Some(qemu) = Qemu::find() else { return };
    let seeds = seeds::all(&qemu);
    if let Some(folder) = std::env::var_os("STRATA_FUZZ_CORPUS") {
        return write_corpus(Path::new(&folder), &seeds);
    }
    let seconds = number("STRATA_FUZZ_SECONDS");
    let by_clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    // The same inputs every time, unless a time is set.
    let seed = number("STRATA_FUZZ_SEED").unwrap_or(if seconds.is_some() { by_clock } else { 1 });
    let each = seconds.map(|seconds| Duration::from_secs(seconds) / TARGETS.len() as u32);
    for target in TARGETS {
        let mut pool: Vec<Vec<u8>> = findings(target).into_iter().map(|(_, input)| input).collect();
        pool.extend(seeds.iter().filter(|(name, _)| *name == target.name).map(|(_, input)| input.clone()));
        assert!(!pool.is_empty(), "{} has no seed", target.name);
        for input in &pool {
            run(target, input, "a seed");
        }
        let runs = match each {
            Some(time) => mutate_on_all_processors(target, &pool, seed, time),
            None => mutate_while(target, &pool, &mut Random::new(seed), |runs| runs < RUNS),
        };
        println!("{}: {runs} inputs made of {} seeds, from seed {seed} on", target.name, pool.len());
    }
}

/// Runs mutated seeds for this much processor time, spread over all processors. Returns the number of inputs.
fn mutate_on_all_processors(target: &Target, pool: &[Vec<u8>], seed: u64, time: Duration) -> u64 {
    let threads = available_parallelism().map_or(1, |threads| threads.get() as u32);
    let until = Instant::now() + time / threads;
    scope(|scope| {
        let run = |thread: u32| {
            let mut random = Random::new(seed ^ (u64::from(thread) << 32));
            mutate_while(target, pool, &mut random, |_| Instant::now() < until)
        };
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        running.into_iter().map(|thread| thread.join().expect("no finding")).sum()
    })
}

/// Runs mutated seeds as long as `more` returns true for the number of runs so far. Returns the number of inputs.
fn mutate_while(target: &Target, pool: &[Vec<u8>], random: &mut Random, more: impl Fn(u64) -> bool) -> u64 {
    let mut runs = 0;
    while more(runs) {
        let [one, other] = [(); 2].map(|()| &pool[random.below(pool.len() as u64) as usize]);
        let input = mutate::mutated(one, other, random);
        run(target, &input, "a mutated seed");
        runs += 1;
    }
    runs
}

/// Descriptors in the format of the target `ring`. Most belong to valid chains.
fn descriptors(count: usize) -> impl Strategy<Value = Vec<u8>> {
    // Flags: 1 for NEXT, 2 for WRITE, 4 for INDIRECT.
    let flags = prop_oneof![6 => Just(1_u8), 6 => Just(3), 6 => Just(2), 2 => Just(0), 3 => Just(4), 1 => any::<u8>()];
    let next = prop_oneof![8 => Just(None), 1 => any::<u8>().prop_map(Some)];
    let one = (0..0x6000_u16, any::<u16>(), flags, next);
    proptest::collection::vec(one, count).prop_map(|list| {
        let bytes = list.into_iter().enumerate().map(|(index, (place, length, flags, next))| {
            let next = next.unwrap_or((index + 1) as u8);
            [&place.to_be_bytes()[..], &length.to_be_bytes(), &[flags, next]].concat()
        });
        bytes.collect::<Vec<_>>().concat()
    })
}

#[test]
fn rings_agree_with_virtio_queue() {
    let sizes = prop_oneof![Just(2_u8), Just(3), Just(4)];
    let inputs = (sizes, 0..4_u8, any::<u32>()).prop_flat_map(|(order, features, start)| {
        let rounds = proptest::collection::vec(any::<u8>(), 0..200);
        (descriptors(2 << order), descriptors(48), rounds).prop_map(move |(ring, tables, rounds)| {
            let how = order | features << 3;
            [&[how][..], &start.to_be_bytes(), &ring, &tables, &rounds].concat()
        })
    });
    let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&inputs, |input| {
            run(target("ring"), &input, "a generated ring");
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

fn write_corpus(folder: &Path, seeds: &seeds::Seeds) {
    for (name, input) in seeds {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(format!("seed-{:016x}", hash(input))), input).expect("a seed");
    }
}

#[test]
fn every_target_is_also_one_of_cargo_fuzz() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).expect("the package for cargo-fuzz");
    let manifest: toml::Table = manifest.parse().expect("TOML");
    let programs = manifest["bin"].as_array().expect("programs").iter();
    let programs: Vec<&str> = programs.filter_map(|program| program.get("name")?.as_str()).collect();
    let targets: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(programs, targets);
    for name in targets {
        let program = folder.join(format!("fuzz_targets/{name}.rs"));
        let text = std::fs::read_to_string(&program).expect("a program");
        assert!(text.contains(&format!("target(\"{name}\")")), "{} runs another", program.display());
    }
}
