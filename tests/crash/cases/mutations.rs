//! Shows that the crash machine detects each deliberate breakage of the write order, the quarantine and the cut. Prints
//! the time until detection.
//!
//! Needs the feature `mutations`: `cargo test -p strata-crash --features mutations --test mutations -- --nocapture`.
//! `STRATA_MUTATION=ReuseAtOnce` runs only one.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use engine::mutation::{self, Mutation};
use strata_crash::changes;
use strata_crash::overlaps;
use strata_crash::sequences::{self, exhaust_failing};
use strata_crash::shape::{Below, Data, Past, Shape, Start};
use strata_crash::tally::Tally;
use strata_crash::trial::{Tactic, starts, trial};
use strata_crash::walk::Walker;
use strata_crash::windows;
use strata_crash::{number, threads};

/// The detection of a breakage.
struct Catch {
    time: Duration,
    trials: u64,
    states: u64,
    how: String,
}

/// The slowest detection needed 210 trials when this was set. A limit in seconds would depend on the load of the
/// machine.
const TRIALS_MAX: u64 = 600;

/// Runs trials of all kinds by turns until one detects the mutation. None if the trials or the time run out first.
fn hunt(mutation: Mutation, starts: &[Start], time: Duration) -> Option<Catch> {
    let starts = &fitting(mutation, starts);
    let tally = Tally::new(time);
    let mut walker = Walker::new(&tally);
    let started = Instant::now();
    if matches!(mutation, Mutation::GuardBypassed | Mutation::MetadataWhereAimed) {
        // Detectable only on damaged images.
        let how = mutation::with(mutation, overlaps::try_all).err()?;
        return Some(Catch { time: started.elapsed(), trials: 1, states: 0, how });
    }
    if mutation == Mutation::ChangeUnmarks {
        // Detectable only if nothing is reserved after a change.
        let how = mutation::with(mutation, changes::leaks_are_found_after_all).err()?;
        return Some(Catch { time: started.elapsed(), trials: 1, states: 0, how });
    }
    if mutation == Mutation::ChangeKeepsNumber {
        // Detectable only if a journal waits.
        let how = mutation::with(mutation, changes::no_change_takes_what_a_journal_names).err()?;
        return Some(Catch { time: started.elapsed(), trials: 1, states: 0, how });
    }
    if matches!(mutation, Mutation::EarlyLinkFailureForgotten | Mutation::EarlyLinkLeft) {
        // Detectable only if nothing else is written to the same table afterwards.
        let mut fail = |start: &Start| mutation::with(mutation, || exhaust_failing(start, &mut walker)).err();
        let how = sequences::shapes().iter().find_map(|shape| fail(&shape.make()))?;
        return Some(Catch { time: started.elapsed(), trials: 1, states: tally.compared(), how });
    }
    for seed in 1..=TRIALS_MAX {
        if tally.is_over() {
            break;
        }
        let count = |requests| tally.count_run(requests);
        let mixed = match seed % 8 {
            0 => Tactic::Overtaken,
            2 | 5 => Tactic::Failures,
            4 => Tactic::Shortages,
            _ => Tactic::Any,
        };
        let tactic = telling(mutation).unwrap_or(mixed);
        let tried = mutation::with(mutation, || trial(starts, seed, tactic, &mut walker, count));
        if let Err(how) = tried {
            let how = how.lines().take(2).map(str::trim).collect::<Vec<_>>().join(" ");
            return Some(Catch { time: started.elapsed(), trials: seed, states: tally.compared(), how });
        }
    }
    None
}

/// The images on which trials reach what a mutation breaks. On most others nothing would be wrong.
fn fitting(mutation: Mutation, starts: &[Start]) -> Vec<Start> {
    let fits = |shape: &Shape| match mutation {
        Mutation::BitmapsMarkedLate => matches!(shape.past, Past::Bitmap { .. }),
        Mutation::HeaderFirst => shape.past == Past::Long,
        Mutation::DataFileNotSynced => shape.has_data_file(),
        Mutation::RawViewForgotten => shape.data == Data::ApartRaw,
        Mutation::CompressedTailKept | Mutation::CompressedReleasedTwice => {
            matches!(shape.past, Past::Compressed(_))
        }
        Mutation::AllSubclustersAllocated
        | Mutation::ZeroSubclustersKept
        | Mutation::SharedSubclustersForgotten
        | Mutation::SubclusterFreesCluster => shape.extended_l2,
        Mutation::EmptiedLate => shape.keeps_places,
        Mutation::OldTopWritten
        | Mutation::OverlayNotSynced
        | Mutation::OverlayNotNamed
        | Mutation::OldTopNotFlushed => shape.takes_overlays(),
        Mutation::RecordedLate | Mutation::TailBeforeCut | Mutation::ReplayCountsLate => {
            shape.keeps_journal()
        }
        Mutation::EarlyLinkBesideCut | Mutation::EarlyLinkBeforeCounts | Mutation::CutBesideEarlyLink => {
            shape.is_qcow2() && !shape.has_data_file() && shape.below == Below::Nothing
        }
        _ => true,
    };
    starts.iter().filter(|start| fits(&start.shape)).cloned().collect()
}

/// The only tactic that detects a mutation, if there is one. This holds for mutations of the handling of failed I/O, of
/// stopped queues, of early commits, and of changes of the disk size.
fn telling(mutation: Mutation) -> Option<Tactic> {
    use Mutation::{AbortedTakenForZero, FailedCutForgotten, FailedSyncIgnored, FailedWriteForgiven};
    match mutation {
        FailedSyncIgnored | FailedWriteForgiven | FailedCutForgotten | AbortedTakenForZero => {
            Some(Tactic::Failures)
        }
        Mutation::ClaimKeptByLeaver | Mutation::WaitNotGivenUp => Some(Tactic::Shortages),
        Mutation::RecordedLate | Mutation::TailBeforeCut | Mutation::ReplayCountsLate => Some(Tactic::Deaths),
        Mutation::ResizeKeepsLinks | Mutation::ResizeKeepsTail | Mutation::ResizeBaresBacking => {
            Some(Tactic::Sizes)
        }
        Mutation::LiveSizeFirst | Mutation::LiveGrowthKeepsOld => Some(Tactic::LiveSizes),
        Mutation::OldTopWritten
        | Mutation::OverlayNotSynced
        | Mutation::OverlayNotNamed
        | Mutation::OldTopNotFlushed => Some(Tactic::Overlays),
        Mutation::EarlyLinkBesideCut | Mutation::EarlyLinkBeforeCounts | Mutation::CutBesideEarlyLink => {
            Some(Tactic::Flushed)
        }
        _ => None,
    }
}

/// The named tests of QEMU's two mistakes must detect these two mutations, for every way of freeing a cluster.
#[test]
fn early_reuse_is_noticed_by_the_tests_of_the_windows() {
    let (start, compressed) = (windows::start(), windows::compressed());
    let ways = [
        (&start, windows::discard()),
        (&start, windows::unmap()),
        (&start, windows::written_anew()),
        (&compressed, windows::written_over()),
    ];
    // The first shows another address's data. The second shows, even earlier, a lowered count while the link still
    // exists. Compressed data is damaged either way.
    let signs =
        [(Mutation::ReuseAtOnce, "to SECTOR"), (Mutation::ReuseBeforeUnlink, "disagrees with refcount 0")];
    for (mutation, sign) in signs {
        for (start, free) in &ways {
            let tally = Tally::new(Duration::from_secs(600));
            let mut walker = Walker::new(&tally);
            let wrong = mutation::with(mutation, || windows::try_all(start, free, &mut walker));
            let compressed = matches!(start.shape.past, Past::Compressed(_));
            let sign = if compressed { "the compressed data is damaged" } else { sign };
            let seen = wrong.iter().any(|wrong| wrong.contains(sign));
            assert!(seen, "{mutation:?} shows no \"{sign}\": {:?}", wrong.first());
        }
    }
}

/// A crash within a change of a closed image detects every wrong order of its writes.
#[test]
fn every_breakage_of_a_change_is_noticed() {
    let starts = changes::starts();
    for mutation in [
        Mutation::SnapshotHeaderFirst,
        Mutation::SnapshotFlagsKept,
        Mutation::SnapshotLoweredFirst,
        Mutation::ResizeKeepsLinks,
        Mutation::ResizeKeepsTail,
        Mutation::ResizeBaresBacking,
    ] {
        let tally = Tally::new(Duration::from_secs(600));
        let noticed = mutation::with(mutation, || {
            let all = starts
                .iter()
                .flat_map(|start| changes::deeds(start).into_iter().map(move |deed| (start, deed)));
            all.filter_map(|(start, deed)| changes::crash_all(start, deed, &tally).err()).next()
        });
        assert!(noticed.is_some(), "{mutation:?} is not noticed");
    }
}

#[test]
fn every_deliberate_breakage_is_noticed() {
    let starts = starts();
    let only = std::env::var("STRATA_MUTATION").ok();
    let wanted = |mutation: &&Mutation| only.as_ref().is_none_or(|only| format!("{mutation:?}") == *only);
    let mutations: Vec<Mutation> = Mutation::ALL.iter().filter(wanted).copied().collect();
    assert!(!mutations.is_empty(), "there is no mutation {only:?}");
    let time = Duration::from_secs(number("STRATA_CRASH_SECONDS").unwrap_or(3600));
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(mutation) = mutations.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let line = match hunt(*mutation, &starts, time) {
                        None => (
                            false,
                            format!(
                                "{mutation:?}: NOT NOTICED in {TRIALS_MAX} trials or {} s",
                                time.as_secs()
                            ),
                        ),
                        Some(Catch { time, trials, states, how }) => {
                            let (seconds, name) = (time.as_secs_f64(), format!("{mutation:?}"));
                            let how: String = how.chars().take(110).collect();
                            let text = format!(
                                "{name:24} {seconds:7.3} s {trials:6} trials {states:8} states  {how}"
                            );
                            (true, text)
                        }
                    };
                    println!("{}", line.1);
                    lines.lock().expect("no panic under this lock").push(line);
                }
            });
        }
    });
    let lines = lines.into_inner().expect("no panic under this lock");
    let missed: Vec<&str> =
        lines.iter().filter(|(caught, _)| !caught).map(|(_, line)| line.as_str()).collect();
    assert_eq!(lines.len(), mutations.len());
    assert!(missed.is_empty(), "{} of {} not noticed:\n{}", missed.len(), lines.len(), missed.join("\n"));
}
