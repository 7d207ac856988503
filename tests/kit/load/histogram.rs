//! A histogram of latencies: fixed size, a relative error below 1/32, cheap to add to.

/// Steps between two powers of two.
const STEPS: usize = 32;
/// Powers of two covered: up to about 18 minutes in nanoseconds; longer values count in the last bucket.
const POWERS: usize = 36;

/// Counts of values, in nanoseconds by convention.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram.
    pub fn new() -> Self {
        Self { counts: vec![0; STEPS * (POWERS + 1)].into(), total: 0, sum: 0, max: 0 }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    /// Adds another histogram's counts.
    pub fn add(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The largest value.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The mean, 0 without values.
    pub fn mean(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.sum as f64 / self.total as f64 }
    }

    /// An upper bound for this fraction (0 to 1) of all values: the upper end of its bucket; 0 without values.
    pub fn percentile(&self, fraction: f64) -> u64 {
        let wanted = (self.total as f64 * fraction.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_end(index).min(self.max);
            }
        }
        self.max
    }
}

/// Values below [`STEPS`] have a bucket each; every power of two above is cut into [`STEPS`] buckets.
fn bucket(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let power = value.ilog2() as usize - STEPS.ilog2() as usize;
    let step = (value >> power) as usize - STEPS;
    (STEPS * (power + 1) + step).min(STEPS * (POWERS + 1) - 1)
}

fn upper_end(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let (power, step) = (bucket / STEPS - 1, bucket % STEPS);
    ((STEPS + step + 1) as u64) * (1 << power) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_a_bucket_that_is_tight() {
        let mut before = 0;
        for value in (0..100_000).chain((17..40).map(|power| (1u64 << power) + 12345)) {
            let bucket = bucket(value);
            assert!(bucket >= before, "buckets are in order");
            before = bucket;
            let end = upper_end(bucket);
            assert!(end >= value && end - value <= value / STEPS as u64, "{value} in a bucket up to {end}");
        }
    }

    #[test]
    fn percentiles_are_those_of_the_values() {
        let mut histogram = Histogram::new();
        (1..=1000).for_each(|value| histogram.record(value));
        for (fraction, exact) in [(0.5, 500), (0.99, 990), (1.0, 1000)] {
            let found = histogram.percentile(fraction);
            assert!(found >= exact && found <= exact + exact / 32, "{found} for {exact}");
        }
        assert_eq!((histogram.count(), histogram.max()), (1000, 1000));
        assert!((histogram.mean() - 500.5).abs() < 1e-9);
        assert_eq!(Histogram::new().percentile(0.99), 0);
        histogram.record(u64::MAX);
        assert_eq!(histogram.max(), u64::MAX);
    }
}
