//! The benchmark's cases: their names, their load on the disk, and the selection by name.
//!
//! Owns the list. It never runs a load and knows no server.

use super::bare::Pattern;
use strata_kit::load::{Mix, Order};

/// Bytes of the common request.
pub const BLOCK: u32 = 4096;
/// Bytes of a cluster in images without extended L2 entries.
pub const CLUSTER: u64 = 65536;
/// Bytes of a cluster with extended L2 entries, so that a subcluster has [`BLOCK`] bytes.
pub const CLUSTER_EXTENDED: u64 = 131_072;

/// The image at the start of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// Every cluster allocated, in order.
    Full,
    /// Every cluster allocated, none written: large, for requests that change tables only.
    Allocated,
    /// Nothing allocated.
    Fresh,
    /// Nothing allocated, extended L2 entries.
    FreshExtended,
    /// Nothing allocated, over a full qcow2 image.
    OverFull,
    /// This number of empty overlays over a full qcow2 image.
    Chain(usize),
}

/// The load of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Requests for a fixed time, after a short warm-up with the same requests.
    Timed {
        /// The kind of requests.
        mix: Mix,
        /// Their order.
        order: Order,
        /// Bytes per request.
        block: u32,
        /// Writes per flush, 0 for no flush.
        flush_every: u64,
    },
    /// One request for every block of the disk, then a flush.
    Once {
        /// The kind of requests.
        mix: Mix,
        /// Their order.
        order: Order,
        /// Bytes per request.
        block: u32,
        /// True if the time includes the wait until the space is given back to the host.
        given_back: bool,
    },
    /// One write of [`BLOCK`] bytes into each cluster, the clusters in a random order, then a flush.
    FirstTouch {
        /// Writes per flush, 0 for no flush.
        flush_every: u64,
    },
    /// Random reads of [`BLOCK`] bytes on the first queue, one at a time, beside random overwrites on the second, as many in
    /// flight as the case has. Only the reads count. They use the two halves of the disk.
    Beside,
    /// No load: the server's memory before a frontend connects.
    RestMemory,
    /// No load, with a frontend connected after a short load: the server's CPU time.
    IdleCpu,
}

/// The unit of a case's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Requests per second, the load's flushes included.
    Rate,
    /// 10⁶ bytes per second.
    Throughput,
    /// Bytes; less is better.
    Memory,
    /// CPU seconds per second; less is better.
    Cpu,
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name, for `--case`.
    pub name: &'static str,
    /// The image.
    pub image: Image,
    /// The load.
    pub job: Job,
    /// Number of queues.
    pub queues: usize,
    /// Requests in flight per queue.
    pub depth: usize,
}

impl Case {
    /// The unit of its value.
    pub fn unit(&self) -> Unit {
        match self.job {
            Job::Timed { block, .. } if block > BLOCK => Unit::Throughput,
            Job::Once { block, mix, .. } if block > BLOCK && mix == Mix::WRITE => Unit::Throughput,
            Job::RestMemory => Unit::Memory,
            Job::IdleCpu => Unit::Cpu,
            _ => Unit::Rate,
        }
    }

    /// True if it changes its image, so that each turn needs a new image.
    pub fn writes(&self) -> bool {
        match self.job {
            Job::Timed { mix, .. } => mix != Mix::READ,
            Job::Once { .. } | Job::FirstTouch { .. } | Job::Beside => true,
            Job::RestMemory | Job::IdleCpu => false,
        }
    }

    /// True if every server does the same amount of work, whatever its speed.
    pub fn fixed_work(&self) -> bool {
        matches!(self.job, Job::Once { .. } | Job::FirstTouch { flush_every: 0 })
    }

    /// Bytes of its largest request.
    pub fn block(&self) -> u32 {
        match self.job {
            Job::Timed { block, .. } | Job::Once { block, .. } => block,
            _ => BLOCK,
        }
    }

    /// Bytes of a cluster of its image.
    pub fn cluster(&self) -> u64 {
        if self.image == Image::FreshExtended { CLUSTER_EXTENDED } else { CLUSTER }
    }

    /// The bare loop with comparable work, if there is one: reads or writes of allocated clusters, no flush.
    pub fn limit(&self) -> Option<Pattern> {
        let Job::Timed { mix, order, block, flush_every: 0 } = self.job else { return None };
        let sequential = match order {
            Order::Sequential => true,
            Order::Random => false,
            _ => return None,
        };
        let plain = self.image == Image::Full && (mix == Mix::READ || mix == Mix::WRITE);
        let write = mix == Mix::WRITE;
        plain.then_some(Pattern { write, sequential, block, jobs: self.queues, depth: self.depth })
    }

    /// The same load without a chain, for cases that measure the cost of a chain.
    pub fn without_chain(&self) -> Option<Case> {
        let chain = matches!(self.image, Image::Chain(_)) && self.unit() == Unit::Rate;
        chain.then_some(Case { image: Image::Full, ..*self })
    }
}

const fn timed(mix: Mix, flush_every: u64) -> Job {
    Job::Timed { mix, order: Order::Random, block: BLOCK, flush_every }
}

const fn sequential(mix: Mix) -> Job {
    Job::Timed { mix, order: Order::Sequential, block: 131_072, flush_every: 0 }
}

/// Every cluster of a full image once, at random.
const fn clusters(mix: Mix, given_back: bool) -> Job {
    Job::Once { mix, order: Order::RandomOnce, block: CLUSTER as u32, given_back }
}

const READ: Job = timed(Mix::READ, 0);
const OVERWRITE: Job = timed(Mix::WRITE, 0);
const MIX: Job = timed(Mix { read: 70, write: 30, ..Mix::NONE }, 0);
const FIRST: Job = Job::FirstTouch { flush_every: 0 };
const FIRST_LARGE: Job =
    Job::Once { mix: Mix::WRITE, order: Order::Sequential, block: CLUSTER as u32, given_back: false };
const DISCARD: Mix = Mix { discard: 1, ..Mix::NONE };
const ZEROES: Mix = Mix { write_zeroes: 1, ..Mix::NONE };
const ZEROES_UNMAP: Mix = Mix { write_zeroes_unmap: 1, ..Mix::NONE };

const fn case(name: &'static str, image: Image, job: Job, queues: usize, depth: usize) -> Case {
    Case { name, image, job, queues, depth }
}

/// Every case, in the order of the table.
pub const CASES: &[Case] = &[
    case("read-1", Image::Full, READ, 1, 1),
    case("read-32", Image::Full, READ, 1, 32),
    case("read-2x32", Image::Full, READ, 2, 32),
    case("read-1-beside-256", Image::Full, Job::Beside, 2, 256),
    case("overwrite-1", Image::Full, OVERWRITE, 1, 1),
    case("overwrite-32", Image::Full, OVERWRITE, 1, 32),
    case("mix-70-30", Image::Full, MIX, 1, 32),
    case("seq-read-128k", Image::Full, sequential(Mix::READ), 1, 8),
    case("seq-write-128k", Image::Full, sequential(Mix::WRITE), 1, 8),
    case("first-4k", Image::Fresh, FIRST, 1, 32),
    case("first-4k-backing", Image::OverFull, FIRST, 1, 32),
    case("first-4k-extended-l2", Image::FreshExtended, FIRST, 1, 32),
    case("mix-extended-l2", Image::FreshExtended, MIX, 1, 32),
    case("first-64k-seq", Image::Fresh, FIRST_LARGE, 1, 32),
    case("chain-1-depth-1", Image::Chain(1), READ, 1, 1),
    case("chain-1-depth-32", Image::Chain(1), READ, 1, 32),
    case("chain-8-depth-1", Image::Chain(8), READ, 1, 1),
    case("chain-8-depth-32", Image::Chain(8), READ, 1, 32),
    case("chain-64-depth-1", Image::Chain(64), READ, 1, 1),
    case("chain-64-depth-32", Image::Chain(64), READ, 1, 32),
    case("flush-overwrite", Image::Full, timed(Mix::WRITE, 1), 1, 1),
    case("flush-allocating", Image::Fresh, Job::FirstTouch { flush_every: 1 }, 1, 1),
    case("discard", Image::Full, clusters(DISCARD, true), 1, 32),
    case("write-zeroes", Image::Allocated, clusters(ZEROES, false), 1, 32),
    case("write-zeroes-unmap", Image::Full, clusters(ZEROES_UNMAP, false), 1, 32),
    case("rss-rest", Image::Full, Job::RestMemory, 2, 32),
    case("rss-rest-chain-64", Image::Chain(64), Job::RestMemory, 2, 32),
    case("idle-cpu", Image::Full, Job::IdleCpu, 2, 32),
];

/// The cases whose name matches one of the patterns; all cases without a pattern.
pub fn chosen(patterns: &[String]) -> Vec<Case> {
    let wanted = |case: &&Case| patterns.is_empty() || patterns.iter().any(|text| matches(text, case.name));
    CASES.iter().filter(wanted).copied().collect()
}

/// True if a name matches a pattern, in which `*` stands for any text.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name) in
            [("*", "x"), ("a*", "abc"), ("*c", "abc"), ("a*c", "abc"), ("abc", "abc"), ("*b*", "abc")]
        {
            assert!(matches(pattern, name), "{pattern} does not match {name}");
        }
        for (pattern, name) in [("a", "ab"), ("*b", "abc"), ("ab*bc", "abc"), ("a*x*c", "abc"), ("", "a")] {
            assert!(!matches(pattern, name), "{pattern} matches {name}");
        }
    }

    #[test]
    fn names_are_unique_and_all_are_selected_without_a_pattern() {
        let names: BTreeSet<&str> = CASES.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), CASES.len());
        assert_eq!(chosen(&[]).len(), CASES.len());
        assert_eq!(chosen(&["chain-*".to_owned()]).len(), 6);
        assert!(chosen(&["nothing".to_owned()]).is_empty());
    }

    #[test]
    fn reads_and_writes_of_allocated_clusters_have_a_limit() {
        let limited: Vec<&str> =
            CASES.iter().filter(|case| case.limit().is_some()).map(|case| case.name).collect();
        let random = ["read-1", "read-32", "read-2x32", "overwrite-1", "overwrite-32"];
        assert_eq!(limited, [&random[..], &["seq-read-128k", "seq-write-128k"]].concat());
    }

    #[test]
    fn chains_are_compared_with_the_same_load_on_one_image() {
        for case in CASES {
            let same = CASES.iter().find(|other| {
                other.image == Image::Full
                    && other.job == case.job
                    && other.depth == case.depth
                    && other.queues == 1
            });
            let chain = case.name.starts_with("chain-");
            assert_eq!(case.without_chain().is_some(), chain, "{}", case.name);
            assert!(!chain || same.is_some(), "{}", case.name);
        }
    }
}
