//! The turn that verifies the data and does not count: its contents describe themselves.
//!
//! Reads are checked as they complete. After a server has ended, QEMU's daemon reads its writes back from the
//! image. So the server's memory cannot hide a fault.

use anyhow::{Result, bail};
use std::path::Path;
use std::time::Duration;
use strata_integration::daemon::Program;
use strata_kit::load::{self, Limit, Mix, Order, Spec, Verify};
use strata_kit::{Client, Status};

use super::case::{BLOCK, Case, Image, Job};
use super::gallery::SEED;
use super::measure::{beside, first_touch, load_problems, once, touch_problems};
use super::server::Server;
use super::touch::{self, Access, Touch};

/// The seed of the writes of a server under test; older data has [`SEED`].
const NEW_SEED: u64 = 2;
/// A seed that no write uses, so that a check for it accepts zero blocks only.
const NO_SEED: u64 = 3;
/// Duration of the checked reads.
const READING: Duration = Duration::from_millis(400);
/// Duration of first writes with a flush each.
const FLUSHING: Duration = Duration::from_millis(400);
/// Bytes of a full image to overwrite: few, because one request at a time or one flush per request is slow.
const OVERWRITTEN: [(usize, u64); 2] = [(1, 8 << 20), (32, 64 << 20)];

/// The contents that the image must have.
#[derive(Debug)]
pub enum Expectation {
    /// Nothing was written.
    Nothing,
    /// The first bytes are new, all others as before.
    Overwritten(u64),
    /// All bytes are new.
    New,
    /// All bytes are zero.
    Zero,
    /// Some blocks are new, their neighbours as before.
    Touched(Touch),
}

/// Runs the case with contents that can be checked. Returns the problems and the contents that the image must have.
pub fn exercise(server: &Server, case: &Case) -> Result<(Vec<String>, Expectation)> {
    match case.job {
        Job::RestMemory | Job::IdleCpu => return Ok((Vec::new(), Expectation::Nothing)),
        _ => {}
    }
    let mut client = server.connect(case)?;
    let size = client.size();
    let (mut problems, expectation) = match case.job {
        Job::Timed { mix, order, block, .. } if mix == Mix::READ || mix.read > 0 => {
            // Writes of the mix use the image's own stamps, so every read has one correct result.
            let spec = Spec { mix, order, block_size: block, ..reading(case, size) };
            (run(&mut client, &spec)?, Expectation::Nothing)
        }
        Job::Timed { mix, block, flush_every, .. } => {
            let length = overwritten(case).min(size);
            let spec = Spec {
                mix,
                block_size: block,
                flush_every,
                order: Order::RandomOnce,
                limit: Limit::Once,
                verify: Verify::Stamped,
                range: 0..length,
                seed: NEW_SEED,
                ..reading(case, size)
            };
            (run(&mut client, &spec)?, Expectation::Overwritten(length))
        }
        Job::Once { mix, .. } => {
            let spec = once(size, case, Verify::Stamped, NEW_SEED)?;
            let found = if mix == Mix::WRITE { Expectation::New } else { Expectation::Zero };
            (run(&mut client, &spec)?, found)
        }
        Job::FirstTouch { flush_every } => {
            let time = (flush_every != 0).then_some(FLUSHING);
            let touch = first_touch(case, size, Access::WriteStamped(NEW_SEED), time);
            let touched = touch::run(client.queue(0), &touch)?;
            let done = Touch { count: touched.clusters, time: None, flush_every: 0, ..touch };
            (touch_problems(&touched), Expectation::Touched(done))
        }
        Job::Beside => {
            // The writes use the image's own stamps, so every read has one correct result.
            let reports = beside(&mut client, case, READING, Verify::Stamped)?;
            (reports.iter().flat_map(load_problems).collect(), Expectation::Nothing)
        }
        Job::RestMemory | Job::IdleCpu => (Vec::new(), Expectation::Nothing),
    };
    let flushed = client.flush()?;
    if flushed != Status::Ok {
        problems.push(format!("the final flush failed: {flushed:?}"));
    }
    client.close()?;
    Ok((problems, expectation))
}

/// Reads the image through another server. Returns the problems.
pub fn judge(program: &Program, image: &Path, case: &Case, expectation: &Expectation) -> Result<Vec<String>> {
    if matches!(expectation, Expectation::Nothing) {
        return Ok(Vec::new());
    }
    let server = Server::of_image(program, image, case)?;
    let mut client = server.connect_with(1, 8, 65536)?;
    let size = client.size();
    let mut problems = match expectation {
        Expectation::Nothing => Vec::new(),
        Expectation::Overwritten(length) => {
            let mut problems = run(&mut client, &whole(0..*length, Verify::Stamped, NEW_SEED))?;
            if *length < size {
                problems.extend(run(&mut client, &whole(*length..size, Verify::Stamped, SEED))?);
            }
            problems
        }
        Expectation::New => run(&mut client, &whole(0..size, Verify::Stamped, NEW_SEED))?,
        Expectation::Zero => run(&mut client, &whole(0..size, Verify::StampedOrZero, NO_SEED))?,
        Expectation::Touched(touch) => {
            let before =
                if case.image == Image::OverFull { Access::ReadStamped(SEED) } else { Access::ReadZero };
            let passes =
                [(0, Access::ReadStamped(NEW_SEED)), (1, before), (touch.cluster / 4096 - 1, before)];
            let mut problems = Vec::new();
            for (shift, access) in passes {
                let pass = Touch { shift, access, depth: 8, ..*touch };
                problems.extend(touch_problems(&touch::run(client.queue(0), &pass)?));
            }
            problems
        }
    };
    client.close()?;
    server.stop()?;
    problems.iter_mut().for_each(|problem| problem.push_str(" (read back by the rival)"));
    Ok(problems)
}

fn overwritten(case: &Case) -> u64 {
    let found = OVERWRITTEN.iter().find(|(depth, _)| case.depth <= *depth);
    found.map_or(OVERWRITTEN[1].1, |(_, bytes)| *bytes)
}

fn reading(case: &Case, size: u64) -> Spec {
    // Blocks never written read as zero; blocks written meanwhile do not.
    let verify = if case.image == Image::FreshExtended { Verify::StampedOrZero } else { Verify::Stamped };
    Spec { depth: case.depth, block_size: BLOCK, verify, seed: SEED, ..Spec::random_reads(size, READING) }
}

/// Reads everything in a range once, in order.
fn whole(range: std::ops::Range<u64>, verify: Verify, seed: u64) -> Spec {
    Spec {
        depth: 8,
        block_size: 65536,
        order: Order::Sequential,
        limit: Limit::Once,
        verify,
        range,
        seed,
        ..Spec::random_reads(0, Duration::ZERO)
    }
}

fn run(client: &mut Client, spec: &Spec) -> Result<Vec<String>> {
    if spec.blocks() == 0 {
        bail!("no request fits in {:?}", spec.range);
    }
    Ok(load_problems(&load::run(client.queues(), spec)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::chosen;
    use crate::bench::gallery::{Gallery, Place, Sizes};
    use strata_integration::daemon::{Backend, Profile};
    use strata_integration::image::write_pattern;
    use strata_kit::images::find_tool;

    /// Shows that the check can fail: one cluster of an image is changed, and the check must report it.
    #[test]
    fn a_changed_cluster_is_reported() -> Result<()> {
        let tools = ["qemu-storage-daemon", "qemu-img", "qemu-io"];
        if tools.into_iter().any(|tool| find_tool(tool).is_none()) {
            return Ok(());
        }
        let rival = Backend::QemuStorageDaemon.program(Profile::Release)?;
        let sizes = Sizes { full: 16 << 20, allocated: 16 << 20, fresh: 16 << 20, sequential: 16 << 20 };
        let mut gallery = Gallery::open(Place::Disk, sizes)?;
        for name in
            ["overwrite-32", "first-4k", "first-4k-backing", "first-64k-seq", "discard", "write-zeroes"]
        {
            let case = chosen(&[name.to_owned()])[0];
            let specimen = gallery.specimen_with_data(&case)?;
            let server = Server::of_image(&rival, &specimen.path, &case)?;
            let (problems, expectation) = exercise(&server, &case)?;
            server.stop()?;
            assert!(problems.is_empty(), "{name}: {problems:?}");
            let verdict = judge(&rival, &specimen.path, &case, &expectation)?;
            assert!(verdict.is_empty(), "{name}: {verdict:?}");
            // A cluster in the middle; first touches are in the first blocks of a cluster.
            write_pattern(&specimen.path, "qcow2", 8 << 20, 65536, 0x5a)?;
            let verdict = judge(&rival, &specimen.path, &case, &expectation)?;
            assert!(!verdict.is_empty(), "{name}: the changed cluster is not reported");
        }
        Ok(())
    }

    #[test]
    fn reads_of_wrong_data_are_reported() -> Result<()> {
        if find_tool("qemu-storage-daemon").is_none() || find_tool("qemu-img").is_none() {
            return Ok(());
        }
        let rival = Backend::QemuStorageDaemon.program(Profile::Release)?;
        let sizes = Sizes { full: 1 << 20, allocated: 1 << 20, fresh: 1 << 20, sequential: 1 << 20 };
        let mut gallery = Gallery::open(Place::Disk, sizes)?;
        let read = chosen(&["read-32".to_owned()])[0];
        let copy = gallery.specimen(&chosen(&["overwrite-32".to_owned()])[0])?;
        write_pattern(&copy.path, "qcow2", 4096, 512, 0x5a)?;
        let server = Server::of_image(&rival, &copy.path, &read)?;
        let (problems, _) = exercise(&server, &read)?;
        server.stop()?;
        assert!(problems.iter().any(|problem| problem.contains("wrong data")), "{problems:?}");
        Ok(())
    }
}
