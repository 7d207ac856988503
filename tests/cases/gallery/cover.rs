//! Chooses the looks of the gallery. Every possible pair of values occurs at least once. Of the triples, as many occur
//! as the number of images allows.
//!
//! Owns the choice, which depends only on a seed and the axes.

use std::collections::BTreeSet;

use strata_kit::random::Random;

use crate::look::{AXES, Choice, Look};

/// The number of looks drawn for each one chosen.
const TRIED: usize = 60;

/// Two or three values, each as its axis and its index in the axis.
type Pair = [(usize, usize); 2];
type Triple = [(usize, usize); 3];

/// The chosen looks, and how much of the axes they cover.
pub struct Choices {
    pub looks: Vec<Look>,
    /// The number of possible pairs; all are covered.
    pub pairs: usize,
    pub triples_covered: usize,
}

/// Chooses `count` looks, or as many as the pairs need.
pub fn choose(seed: u64, count: usize) -> Choices {
    let random = &mut Random::new(seed);
    let mut open: BTreeSet<Pair> = possible_pairs();
    let pairs = open.len();
    let mut looks = Vec::new();
    let mut triples = BTreeSet::new();
    while looks.len() < count || !open.is_empty() {
        let wanted = open.iter().nth(random.below(open.len().max(1) as u64) as usize).copied();
        let tried: Vec<Choice> = (0..TRIED).filter_map(|_| draw(random, wanted)).collect();
        let gain = |choice: &Choice| match wanted {
            Some(_) => pairs_of(choice).filter(|pair| open.contains(pair)).count(),
            None => triples_of(choice).filter(|triple| !triples.contains(triple)).count(),
        };
        let best = tried.iter().max_by_key(|choice| gain(choice)).copied();
        // A pair that no random draw hits gets its own simplest look.
        let Some(best) = best.or_else(|| wanted.and_then(completed)) else { continue };
        for pair in pairs_of(&best) {
            open.remove(&pair);
        }
        triples.extend(triples_of(&best));
        looks.push(Look::of(&best));
    }
    Choices { looks, pairs, triples_covered: triples.len() }
}

/// A random look with this pair; none if that look is impossible.
fn draw(random: &mut Random, wanted: Option<Pair>) -> Option<Choice> {
    let mut choice: Choice =
        std::array::from_fn(|axis| random.below(AXES[axis].values.len() as u64) as usize);
    // Values that exclude many others are drawn less often.
    for name in ["version", "data", "preallocation"] {
        if random.below(2) == 0 {
            choice[AXES.iter().position(|axis| axis.name == name).expect("an axis")] = 0;
        }
    }
    put(&mut choice, wanted.as_ref().map_or(&[], |pair| &pair[..]));
    Look::of(&choice).is_possible().then_some(choice)
}

fn put(choice: &mut Choice, values: &[(usize, usize)]) {
    for (axis, place) in values {
        choice[*axis] = *place;
    }
}

/// The simplest look with this pair, with at most one other value that is not the simplest.
fn completed(pair: Pair) -> Option<Choice> {
    let others =
        (0..AXES.len()).flat_map(|axis| (0..AXES[axis].values.len()).map(move |place| (axis, place)));
    let with = |other: (usize, usize)| {
        let mut choice = [0; AXES.len()];
        put(&mut choice, &[other]);
        put(&mut choice, &pair);
        choice
    };
    others.map(with).find(|choice| Look::of(choice).is_possible())
}

/// Every possible pair.
pub fn possible_pairs() -> BTreeSet<Pair> {
    let values =
        || (0..AXES.len()).flat_map(|axis| (0..AXES[axis].values.len()).map(move |place| (axis, place)));
    let pairs = values().flat_map(|a| values().filter(move |b| a.0 < b.0).map(move |b| [a, b]));
    pairs.filter(|pair| completed(*pair).is_some()).collect()
}

/// The pairs of a look.
pub fn pairs_of(choice: &Choice) -> impl Iterator<Item = Pair> + '_ {
    let value = |axis: usize| (axis, choice[axis]);
    (0..AXES.len()).flat_map(move |a| (a + 1..AXES.len()).map(move |b| [value(a), value(b)]))
}

fn triples_of(choice: &Choice) -> impl Iterator<Item = Triple> + '_ {
    let value = |axis: usize| (axis, choice[axis]);
    pairs_of(choice).flat_map(move |[a, b]| (b.0 + 1..AXES.len()).map(move |c| [a, b, value(c)]))
}
