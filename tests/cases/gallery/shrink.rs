//! Simplifies a failing recipe for as long as it fails.

use std::collections::BTreeSet;

use crate::look::{AXES, Look, Recipe};

/// The simplest recipe found that also fails. `steps` returns how many steps a recipe has; at most `tries` recipes are
/// tried.
pub fn shrink(
    failing: &Recipe,
    tries: usize,
    steps: impl Fn(&Recipe) -> usize,
    mut fails: impl FnMut(&Recipe) -> bool,
) -> Recipe {
    let mut best = failing.clone();
    let mut left = tries;
    let mut is_worse = |candidate: &Recipe| {
        left = left.saturating_sub(1);
        left > 0 && candidate.look.is_possible() && fails(candidate)
    };
    loop {
        let before = best.clone();
        // Steps come first: each later try is then quicker.
        let mut piece = steps(&best).next_power_of_two();
        while piece > 0 {
            for first in (0..steps(&best)).step_by(piece) {
                let more: BTreeSet<usize> = (first..(first + piece).min(steps(&best))).collect();
                if more.is_subset(&best.without) {
                    continue;
                }
                let without = best.without.union(&more).copied().collect();
                let candidate = Recipe { without, ..best.clone() };
                if is_worse(&candidate) {
                    best = candidate;
                }
            }
            piece /= 2;
        }
        for axis in 0..AXES.len() {
            for place in 0..best.look.choice()[axis] {
                let mut choice = best.look.choice();
                choice[axis] = place;
                let candidate = Recipe { look: Look::of(&choice), ..best.clone() };
                if is_worse(&candidate) {
                    best = candidate;
                    break;
                }
            }
        }
        if best == before {
            return best;
        }
    }
}
