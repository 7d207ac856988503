//! One sample: one case on one server that runs.
//!
//! Owns what is inside the measured time and what is not. A case of fixed work is over when its final flush is, and,
//! where it gives space back, when the host has it.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};
use strata_integration::image::allocated_bytes;
use strata_tests::Client;
use strata_tests::load::{self, Histogram, Limit, Mix, Order, Spec, Verify};

use super::case::{BLOCK, Case, Job, Unit};
use super::gallery::SEED;
use super::process::{Resident, cpu_seconds, machine_seconds};
use super::server::Server;
use super::touch::{self, Access, Touch};

/// How long the host may wait for its space after the last flush.
const GIVE_BACK_PATIENCE: Duration = Duration::from_secs(15);
/// The share of what was discarded that must be given back: metadata of the image may take some anew.
const GIVEN_BACK: f64 = 0.99;
/// Before a server at rest is looked at: by then it has no more to do for its start or its last request.
const SETTLE: Duration = Duration::from_millis(300);

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A load that has no end of its own.
    pub load: Duration,
    /// A server at rest.
    pub rest: Duration,
}

/// What one turn brought.
#[derive(Clone, Debug)]
pub struct Sample {
    /// In the case's unit.
    pub value: f64,
    /// Requests in the measured time, flushes included.
    pub requests: u64,
    /// The measured time in seconds.
    pub seconds: f64,
    /// CPU seconds of the server in it.
    pub cpu: f64,
    /// CPU seconds of anybody but the server and the client in it, in seconds per second.
    pub others: f64,
    /// Resident bytes of the server without the guest's memory, at its end.
    pub resident: u64,
    /// Nanoseconds at the median and at 99 of 100 requests; none where no request is counted by itself.
    pub latency: Option<[u64; 2]>,
    /// Bytes that the image takes on the host after the server's end; none where the work is not the same
    /// for every server.
    pub host_bytes: Option<u64>,
    /// What was not as it should be.
    pub problems: Vec<String>,
}

impl Sample {
    /// Requests for each CPU second of the server; none where that means nothing.
    pub fn per_cpu(&self) -> Option<f64> {
        // The kernel's clock moves in hundredths of a second.
        (self.cpu >= 0.02 && self.requests > 0).then(|| self.requests as f64 / self.cpu)
    }
}

/// What a load did in the measured time.
struct Work {
    requests: u64,
    bytes: u64,
    latency: Option<Histogram>,
    problems: Vec<String>,
}

/// Reads the clocks at the begin and at the end.
struct Meter {
    pid: u32,
    start: Instant,
    server: f64,
    client: f64,
    machine: f64,
}

struct Reading {
    seconds: f64,
    cpu: f64,
    others: f64,
}

impl Meter {
    fn begin(pid: u32) -> Result<Self> {
        let (server, client, machine) =
            (cpu_seconds(pid)?, cpu_seconds(std::process::id())?, machine_seconds()?);
        Ok(Self { pid, start: Instant::now(), server, client, machine })
    }

    fn end(&self) -> Result<Reading> {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu = cpu_seconds(self.pid)? - self.server;
        let client = cpu_seconds(std::process::id())? - self.client;
        let all = machine_seconds()? - self.machine;
        Ok(Reading { seconds, cpu, others: ((all - cpu - client) / seconds).max(0.0) })
    }
}

/// Takes a sample. The server serves `image`, and nobody is connected to it yet.
pub fn sample(server: &mut Server, case: &Case, image: &Path, times: Times) -> Result<Sample> {
    match case.job {
        Job::RestMemory => at_rest(server),
        Job::IdleCpu => idle(server, case, times),
        _ => loaded(server, case, image, times),
    }
}

fn loaded(server: &mut Server, case: &Case, image: &Path, times: Times) -> Result<Sample> {
    let mut client = server.connect(case)?;
    let size = client.size();
    if let Job::Timed { .. } = case.job {
        // Tables are loaded and buffers touched, for both servers alike.
        let warm_up = times.load.div_f64(5.0).max(Duration::from_millis(100));
        load::run(client.queues(), &timed(size, case, warm_up)?)?;
    }
    let before = allocated_bytes(image)?;
    let meter = Meter::begin(server.pid())?;
    let work = match case.job {
        Job::Timed { .. } => run_load(&mut client, &timed(size, case, times.load)?)?,
        Job::Once { given_back, .. } => {
            let mut work = run_load(&mut client, &once(size, case, Verify::Off, SEED)?)?;
            final_flush(&mut client, &mut work)?;
            if given_back {
                await_space(server, image, before, size, &mut work)?;
            }
            work
        }
        Job::FirstTouch { flush_every } => {
            let time = (flush_every != 0).then_some(times.load);
            let touch = first_touch(case, size, Access::Write, time);
            let mut work = run_touch(&mut client, &touch)?;
            final_flush(&mut client, &mut work)?;
            work
        }
        Job::RestMemory | Job::IdleCpu => bail!("{} has no load", case.name),
    };
    let reading = meter.end()?;
    let resident = Resident::of(server.pid())?.own();
    client.close().context("closing the session")?;
    Ok(summed_up(case, work, &reading, resident))
}

fn summed_up(case: &Case, work: Work, reading: &Reading, resident: u64) -> Sample {
    let value = match case.unit() {
        Unit::Throughput => work.bytes as f64 / 1e6 / reading.seconds,
        _ => work.requests as f64 / reading.seconds,
    };
    Sample {
        value,
        requests: work.requests,
        seconds: reading.seconds,
        cpu: reading.cpu,
        others: reading.others,
        resident,
        latency: work.latency.map(|latency| [latency.percentile(0.5), latency.percentile(0.99)]),
        host_bytes: None,
        problems: work.problems,
    }
}

/// The load of a timed case on a disk of `size` bytes.
fn timed(size: u64, case: &Case, time: Duration) -> Result<Spec> {
    let Job::Timed { mix, order, block, flush_every } = case.job else {
        bail!("{} is not measured by time", case.name)
    };
    Ok(Spec {
        depth: case.depth,
        block_size: block,
        order,
        mix,
        flush_every,
        limit: Limit::Duration(time),
        verify: Verify::Off,
        range: 0..size,
        seed: SEED,
    })
}

/// The load of a case that asks for every block of a disk of `size` bytes once.
pub fn once(size: u64, case: &Case, verify: Verify, seed: u64) -> Result<Spec> {
    let Job::Once { mix, order, block, .. } = case.job else {
        bail!("{} does not go over the disk once", case.name)
    };
    let range = 0..size;
    let (depth, flush_every) = (case.depth, 0);
    Ok(Spec { depth, block_size: block, order, mix, flush_every, limit: Limit::Once, verify, range, seed })
}

/// The load of a case that writes into each cluster.
pub fn first_touch(case: &Case, size: u64, access: Access, time: Option<Duration>) -> Touch {
    let flush_every = if let Job::FirstTouch { flush_every } = case.job { flush_every } else { 0 };
    let clusters = size / case.cluster();
    let (cluster, depth) = (case.cluster(), case.depth);
    Touch { clusters, cluster, count: clusters, time, depth, shift: 0, flush_every, access }
}

fn run_load(client: &mut Client, spec: &Spec) -> Result<Work> {
    let report = load::run(client.queues(), spec)?;
    Ok(Work {
        requests: report.requests,
        bytes: report.bytes,
        problems: load_problems(&report),
        latency: Some(report.latency),
    })
}

/// What a load's report has to complain of.
pub fn load_problems(report: &load::Report) -> Vec<String> {
    let mut problems = Vec::new();
    if report.errors > 0 {
        problems.push(format!("{} requests failed", report.errors));
    }
    if report.mismatches > 0 {
        let at = report.first_mismatch.unwrap_or_default();
        problems.push(format!("{} reads brought wrong data, one of them at {at}", report.mismatches));
    }
    problems
}

fn run_touch(client: &mut Client, touch: &Touch) -> Result<Work> {
    let touched = touch::run(client.queue(0), touch)?;
    Ok(Work {
        requests: touched.requests,
        bytes: touched.clusters * u64::from(BLOCK),
        problems: touch_problems(&touched),
        latency: Some(touched.latency),
    })
}

/// What a first touch has to complain of.
pub fn touch_problems(touched: &touch::Touched) -> Vec<String> {
    let mut problems = Vec::new();
    if touched.errors > 0 {
        problems.push(format!("{} requests failed", touched.errors));
    }
    if touched.mismatches > 0 {
        problems.push(format!("{} reads brought wrong data", touched.mismatches));
    }
    problems
}

fn final_flush(client: &mut Client, work: &mut Work) -> Result<()> {
    let status = client.flush().context("the final flush")?;
    if !status.is_ok() {
        work.problems.push(format!("the final flush failed: {status:?}"));
    }
    Ok(())
}

/// Waits until the host has back what was discarded.
fn await_space(
    server: &mut Server,
    image: &Path,
    before: u64,
    discarded: u64,
    work: &mut Work,
) -> Result<()> {
    let enough = (discarded as f64 * GIVEN_BACK) as u64;
    let deadline = Instant::now() + GIVE_BACK_PATIENCE;
    loop {
        let back = before.saturating_sub(allocated_bytes(image)?);
        if back >= enough {
            return Ok(());
        }
        if Instant::now() > deadline {
            work.problems.push(format!(
                "{back} of {discarded} discarded bytes were given back {GIVE_BACK_PATIENCE:?} after the flush"
            ));
            return Ok(());
        }
        server.pause(Duration::from_micros(200))?;
    }
}

fn at_rest(server: &mut Server) -> Result<Sample> {
    let meter = Meter::begin(server.pid())?;
    server.pause(SETTLE)?;
    let resident = Resident::of(server.pid())?;
    Ok(of_rest(resident.total as f64, &meter.end()?, resident.own()))
}

fn idle(server: &mut Server, case: &Case, times: Times) -> Result<Sample> {
    let mut client = server.connect(case)?;
    let spec = Spec {
        mix: Mix::READ,
        order: Order::Random,
        depth: case.depth,
        ..Spec::random_reads(client.size(), Duration::from_millis(200))
    };
    load::run(client.queues(), &spec)?;
    server.pause(SETTLE)?;
    let meter = Meter::begin(server.pid())?;
    server.pause(times.rest)?;
    let reading = meter.end()?;
    let resident = Resident::of(server.pid())?.own();
    client.close().context("closing the session")?;
    Ok(of_rest(reading.cpu / reading.seconds, &reading, resident))
}

fn of_rest(value: f64, reading: &Reading, resident: u64) -> Sample {
    Sample {
        value,
        requests: 0,
        seconds: reading.seconds,
        cpu: reading.cpu,
        others: reading.others,
        resident,
        latency: None,
        host_bytes: None,
        problems: Vec::new(),
    }
}
