//! The gallery: some hundred images of every kind that qemu-img and qemu-io make. Each is served in-process with reads,
//! writes, zeroes, discards and changes of snapshots. The results are compared with a model, both checkers and QEMU's
//! reads.
//!
//! A failing image is simplified, and its report has the line that makes it again:
//! `STRATA_GALLERY_ONLY="cluster=512 seed=7" cargo test -p strata-tests --test gallery`. `STRATA_GALLERY_SEED` makes
//! another gallery, `STRATA_GALLERY_IMAGES` a larger one.

mod cover;
mod kept;
mod look;
mod make;
mod shrink;
mod steps;

use std::any::Any;
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use strata_kit::Qemu;

use crate::cover::{choose, pairs_of, possible_pairs};
use crate::look::{Cluster, Look, Recipe, Version};
use crate::make::Workshop;
use crate::shrink::shrink;
use crate::steps::{TrialError, run, run_on, steps};

/// The least number of images in the gallery.
const IMAGES: usize = 320;
/// The number of failures that are simplified; the run ends after them.
const FAILURES_MAX: usize = 3;
/// The most recipes tried to simplify a failing one.
const SHRINK_TRIES: usize = 200;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Serves one image. An error describes the fault.
fn try_one(workshop: &Workshop, recipe: &Recipe) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(|| run(workshop, recipe))) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(words(&*panic)),
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words").to_owned()
}

/// Describes a failure, simplified.
fn report(workshop: &Workshop, recipe: &Recipe, error: &str) -> String {
    // An image that cannot be made is a fault of the gallery, so no simpler image counts for it.
    let fails = |recipe: &Recipe| {
        !matches!(
            catch_unwind(AssertUnwindSafe(|| run(workshop, recipe))),
            Ok(Ok(()) | Err(TrialError::Make(_)))
        )
    };
    let least = shrink(recipe, SHRINK_TRIES, |recipe| steps(recipe).len(), fails);
    let last = try_one(workshop, &least).err().unwrap_or_else(|| "it fails now and then".to_owned());
    format!("{recipe}\n  {error}\nmade simpler:\n    (\"\", \"{least}\"),\n  {last}")
}

/// Serves images on all processors and returns the first failures.
fn serve_all(workshop: &Workshop, recipes: &[Recipe]) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let failed = || failures.lock().expect("no holder panics");
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(recipe) = recipes.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = try_one(workshop, recipe) {
                        // Print now: a simpler recipe may take long to find.
                        eprintln!("{recipe}\n  {error}");
                        let simpler = report(workshop, recipe, &error);
                        failed().push(simpler);
                    }
                    if failed().len() >= FAILURES_MAX {
                        break;
                    }
                }
            });
        }
    });
    failures.into_inner().expect("no holder panics")
}

#[test]
fn every_image_is_served_right() {
    let Some(qemu) = Qemu::find() else { return };
    let start = Instant::now();
    let workshop = Workshop::new(qemu);
    if let Ok(line) = std::env::var("STRATA_GALLERY_ONLY") {
        let recipe = line.parse().expect("a recipe");
        println!("{:#?}", steps(&recipe));
        run(&workshop, &recipe).expect("it is served");
        return;
    }
    let seed = number("STRATA_GALLERY_SEED").unwrap_or(1);
    let images = number("STRATA_GALLERY_IMAGES").map_or(IMAGES, |images| images as usize);
    let choices = choose(seed, images);
    let recipe = |(place, look): (usize, &Look)| Recipe {
        look: *look,
        seed: seed * 1_000_000 + place as u64,
        without: BTreeSet::new(),
    };
    let recipes: Vec<Recipe> = choices.looks.iter().enumerate().map(recipe).collect();
    let failures = serve_all(&workshop, &recipes);
    assert!(failures.is_empty(), "\n{}", failures.join("\n\n"));
    println!(
        "{} images in {:.0?}, with all {} pairs of values and {} triples",
        recipes.len(),
        start.elapsed(),
        choices.pairs,
        choices.triples_covered
    );
}

#[test]
fn recipes_that_failed_once_pass() {
    let Some(qemu) = Qemu::find() else { return };
    let workshop = Workshop::new(qemu);
    for (what, line) in kept::KEPT {
        let recipe = line.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
        try_one(&workshop, &recipe).unwrap_or_else(|error| panic!("{what}: {line}: {error}"));
    }
}

#[test]
fn every_two_values_meet() {
    let choices = choose(7, 0);
    let met: BTreeSet<_> =
        choices.looks.iter().flat_map(|look| pairs_of(&look.choice()).collect::<Vec<_>>()).collect();
    assert_eq!(met, possible_pairs());
    assert!(choices.looks.iter().all(Look::is_possible));
    assert!(choices.looks.len() < 300, "{} looks for the pairs alone", choices.looks.len());
}

#[test]
fn a_line_makes_its_recipe_again() {
    let looks = choose(3, 300).looks;
    for (place, look) in looks.into_iter().enumerate() {
        let without = (0..place % 4).map(|step| step * 7).collect();
        let recipe = Recipe { look, seed: place as u64 * 977, without };
        assert_eq!(recipe.to_string().parse(), Ok(recipe.clone()));
        assert_eq!(steps(&recipe), steps(&recipe.clone()));
    }
    for wrong in ["cluster=3K", "colour=red", "seed=x", "without=-1", "cluster"] {
        let error = wrong.parse::<Recipe>().expect_err("no recipe");
        assert_eq!(error.word, wrong);
    }
}

#[test]
fn a_failure_is_made_as_simple_as_it_can_be() {
    let start: Recipe = "version=3 cluster=1K refcount=64 lazy=on below=deep size=odd snapshots=later seed=3"
        .parse()
        .expect("a recipe");
    // This failure needs small clusters, snapshots, and the 17th step with the 23rd.
    let fails = |recipe: &Recipe| {
        recipe.look.cluster.bytes() < 4096
            && recipe.look.version == Version::V3
            && recipe.look.snapshots != look::Snapshots::Nothing
            && ![17, 23].iter().any(|step| recipe.without.contains(step))
    };
    let mut tries = 0;
    let least = shrink(
        &start,
        1000,
        |_| 50,
        |recipe| {
            tries += 1;
            fails(recipe)
        },
    );
    assert_eq!(least.look.cluster, Cluster::B512);
    let without: BTreeSet<usize> = (0..50).filter(|step| ![17, 23].contains(step)).collect();
    assert_eq!(least, Recipe { without, .."cluster=512 snapshots=theirs seed=3".parse().expect("a recipe") });
    assert!(tries < 200, "{tries} tries");
}

/// If one byte of the guest's data is changed in the image, the trial must fail.
#[test]
fn a_changed_image_does_not_pass() {
    let Some(qemu) = Qemu::find() else { return };
    let workshop = Workshop::new(qemu);
    let recipe: Recipe = "cluster=4K seed=5".parse().expect("a recipe");
    assert_eq!(try_one(&workshop, &recipe), Ok(()));
    let made = workshop.make(&recipe).expect("an image");
    let map = workshop.qemu.map(&made.bench.image, strata_kit::images::Format::Qcow2).expect("a map");
    let place = map.iter().find_map(|extent| extent.offset.filter(|_| extent.data)).expect("some data");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&made.bench.image).expect("the image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], place).expect("a byte");
    let failed =
        catch_unwind(AssertUnwindSafe(|| run_on(made, &recipe))).expect_err("it is not what was made");
    assert!(words(&*failed).contains("the disk equals the model"), "{}", words(&*failed));
}
