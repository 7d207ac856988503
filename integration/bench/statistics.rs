//! Medians, extremes and ratios of a few samples. It computes no other statistics.

/// The median and the extremes of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The median; for an even number of values the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Summary {
    /// The summary of some values; `None` without values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, min, max })
    }

    /// The summary of the ratios of two rows of values, turn by turn; turns with a missing value do not count.
    pub fn of_ratios(above: &[Option<f64>], below: &[Option<f64>]) -> Option<Self> {
        let pairs = above.iter().zip(below).filter_map(|(above, below)| Some(((*above)?, (*below)?)));
        Self::of(pairs.filter(|(_, below)| *below > 0.0).map(|(above, below)| above / below))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value() {
        let summary = Summary::of([3.0, 1.0, 2.0, f64::NAN]).expect("three values");
        assert_eq!(summary, Summary { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Summary::of([1.0, 2.0]).map(|summary| summary.median), Some(1.5));
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn ratios_are_computed_pair_by_pair() {
        let above = [Some(2.0), None, Some(9.0), Some(8.0)];
        let below = [Some(1.0), Some(1.0), Some(3.0), Some(0.0)];
        assert_eq!(Summary::of_ratios(&above, &below), Some(Summary { median: 2.5, min: 2.0, max: 3.0 }));
    }
}
