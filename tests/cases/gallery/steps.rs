//! Applies steps to an image of the gallery, and compares the results.
//!
//! Owns the steps that follow from a recipe, and the rules for correct service. It makes no image.

use crate::look::{Compression, L2, Look, Recipe, Snapshots};
use crate::make::{Made, Workshop, granule, size};
use disk::OpenError;
use disk::snapshot::{ChangeError, ChangeRefusal};
use proptest::strategy::{BoxedStrategy, Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use strata_kit::images::ImageError;
use strata_kit::model::{Geometry, Operation, sequences, sequences_of_parts};
use strata_kit::random::Random;
use strata_rig::bench::{Bench, Deed};
use strata_rig::{K, Rig};
use thiserror::Error;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request of the guest.
    Do(Operation),
    /// The disk is closed, examined by all tools, and opened again.
    Examine,
    /// A change of a snapshot, by us or by QEMU. `which` is taken modulo the number of snapshots.
    Change { deed: Deed, which: usize, ours: bool },
}

/// Why a trial could not start.
#[derive(Debug, Error)]
pub enum TrialError {
    /// QEMU's tools did not make it.
    #[error("it could not be made: {0}")]
    Make(#[from] ImageError),
    /// It cannot be opened.
    #[error("it could not be opened: {0}")]
    Open(#[from] OpenError),
}

/// All steps of a recipe, including the skipped ones.
pub fn steps(recipe: &Recipe) -> Vec<Step> {
    let look = &recipe.look;
    let random = &mut Random::new(recipe.seed ^ 0x5354_4550);
    let mut steps = Vec::new();
    if look.snapshots == Snapshots::Full {
        // One more snapshot than there is room for.
        let create = Step::Change { deed: Deed::Create, which: 0, ours: true };
        steps.extend(std::iter::repeat_n(create, look.refcount.snapshots_max() as usize + 1));
        steps.push(Step::Examine);
    }
    for operation in operations(recipe) {
        steps.push(Step::Do(operation));
        let kind = random.below(if look.snapshots == Snapshots::Nothing { 40 } else { 12 });
        let (which, ours) = (random.below(16) as usize, random.below(10) < 7);
        let change = |deed| Step::Change { deed, which, ours };
        match (kind, look.snapshots) {
            (0, _) => steps.push(Step::Examine),
            (1, Snapshots::Theirs | Snapshots::Later) => steps.push(change(Deed::Create)),
            (1 | 2, Snapshots::Full) | (2, Snapshots::Theirs | Snapshots::Later) => {
                steps.push(change(Deed::Apply));
            }
            (3, Snapshots::Theirs | Snapshots::Later | Snapshots::Full) => steps.push(change(Deed::Delete)),
            _ => {}
        }
    }
    steps
}

/// The guest's requests.
fn operations(recipe: &Recipe) -> Vec<Operation> {
    let look = &recipe.look;
    let cluster = look.cluster.bytes();
    let transfer_max = (4 * cluster).min(512 * K);
    let geometry = Geometry { size: size(look), cluster_size: cluster, transfer_max };
    let strategy: BoxedStrategy<Vec<Operation>> = match look.l2 {
        L2::Plain => sequences(geometry, 48).boxed(),
        L2::Extended => sequences_of_parts(geometry, granule(look), 48).boxed(),
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&recipe.seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let tree = strategy.new_tree(&mut runner).expect("nothing is filtered");
    let mut operations = tree.current();
    if look.l2 == L2::Extended && look.compression != Compression::Nothing {
        operations.iter_mut().for_each(|operation| widen(operation, cluster, geometry.size));
    }
    operations
}

/// Widens a discard to whole clusters. Parts of a compressed cluster cannot be discarded, and the model does not know
/// which clusters are compressed.
fn widen(operation: &mut Operation, cluster: u64, size: u64) {
    if let Operation::Discard { offset, length } = operation {
        let end = (*offset + *length).next_multiple_of(cluster).min(size);
        *offset -= *offset % cluster;
        *length = end - *offset;
    }
}

/// Makes the image of a recipe, serves it step by step, and compares.
///
/// # Errors
/// If it cannot be made or opened.
///
/// # Panics
/// If a comparison fails.
pub fn run(workshop: &Workshop, recipe: &Recipe) -> Result<(), TrialError> {
    let made = workshop.make(recipe)?;
    run_on(made, recipe)
}

/// As [`run`], on a finished image.
///
/// # Errors
/// If it cannot be opened.
///
/// # Panics
/// If a comparison fails.
pub fn run_on(mut made: Made, recipe: &Recipe) -> Result<(), TrialError> {
    // None of these images may be refused.
    Rig::open(&made.bench.image, &made.bench.options)?.close();
    let bench = &mut made.bench;
    // Compare the contents before the first step.
    bench.run(&[]);
    let mut waiting = Vec::new();
    let left = steps(recipe).into_iter().enumerate().filter(|(number, _)| !recipe.without.contains(number));
    for (number, step) in left {
        if let Step::Do(operation) = step {
            waiting.push(operation);
            continue;
        }
        if !waiting.is_empty() {
            bench.run(&waiting);
            waiting.clear();
        }
        match step {
            Step::Do(_) => {}
            Step::Examine => bench.examine_disk(&format!("after step {number}")),
            Step::Change { deed, which, ours } => change(bench, number, deed, which, ours),
        }
    }
    bench.run(&waiting);
    conclude(&made, &recipe.look);
    Ok(())
}

fn change(bench: &mut Bench, number: usize, deed: Deed, which: usize, ours: bool) {
    let name = match (deed, bench.snapshots.len()) {
        (Deed::Create, _) => format!("taken at {number}"),
        (_, 0) => return,
        (_, count) => bench.snapshots[which % count].0.clone(),
    };
    let done = if ours { try_ours(bench, deed, &name) } else { bench.try_theirs_aside(deed, &name).is_ok() };
    if done {
        return;
    }
    // One side found no room in a refcount. To apply a snapshot whose clusters the disk already has, QEMU needs room
    // and we do not.
    let other = if ours { bench.try_theirs_aside(deed, &name).is_ok() } else { try_ours(bench, deed, &name) };
    assert!(
        !other || (deed == Deed::Apply && !ours),
        "{deed:?} {name}: ours {ours} refuses, the other does not"
    );
}

/// False if there is no room in a refcount.
fn try_ours(bench: &mut Bench, deed: Deed, name: &str) -> bool {
    let before = std::fs::read(&bench.image).expect("image");
    match bench.try_ours(deed, name) {
        Ok(_) => {
            bench.note(deed, name);
            true
        }
        Err(ChangeError::Refused { source: ChangeRefusal::RefcountFull { .. }, .. }) => {
            assert!(std::fs::read(&bench.image).expect("image") == before, "a refusal wrote to the image");
            false
        }
        Err(error) => panic!("{deed:?} {name}: {error}"),
    }
}

/// Compares everything at the end.
fn conclude(made: &Made, look: &Look) {
    let bench = &made.bench;
    bench.examine_disk("at the end");
    let count = bench.snapshots.len();
    for (number, (name, contents)) in bench.snapshots.iter().enumerate() {
        // Of very many snapshots, test those at the ends and in the middle.
        if count > 5 && ![0, 1, count / 2, count - 1].contains(&number) {
            continue;
        }
        assert!(bench.read_snapshot(name) == *contents, "{name} reads otherwise");
        assert!(bench.theirs(name) == *contents, "qemu-img reads {name} otherwise");
    }
    if look.snapshots == Snapshots::Full && look.compression == Compression::Nothing {
        assert!(count as u64 <= look.refcount.snapshots_max());
    }
    for (path, before) in &made.below {
        assert!(std::fs::read(path).expect("a layer") == *before, "{} was changed", path.display());
    }
    if let Some(data) = &made.raw_view {
        // QEMU makes the file as long as whole clusters.
        let found = std::fs::read(data).expect("the data file");
        assert!(found.starts_with(&bench.contents), "the raw data file is not the disk");
    }
}
