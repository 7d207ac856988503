//! One sample: one case on one running server.
//!
//! Owns the limits of the measured time. A case of fixed work ends with its final flush; if it gives space back, it
//! ends when the host has the space.

use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};
use strata_integration::image::allocated_bytes;
use strata_kit::Client;
use strata_kit::load::{self, Histogram, Limit, Mix, Order, Spec, Verify};

use super::case::{BLOCK, Case, Job, Unit};
use super::gallery::SEED;
use super::process::{Resident, cpu_seconds, machine_seconds};
use super::server::Server;
use super::touch::{self, Access, Touch};

/// Timeout until the space is given back to the host after the last flush.
const GIVE_BACK_PATIENCE: Duration = Duration::from_secs(15);
/// The share of the discarded bytes that must be given back: the image's metadata may use some of them again.
const GIVEN_BACK: f64 = 0.99;
/// The wait before measuring an idle server, until its start or its last request causes no more work.
const SETTLE: Duration = Duration::from_millis(300);

/// Durations of the measurements.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Of a load without a fixed amount of work.
    pub load: Duration,
    /// Of an idle server.
    pub rest: Duration,
}

/// The result of one turn.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The value in the case's unit.
    pub value: f64,
    /// Requests in the measured time, flushes included.
    pub requests: u64,
    /// The measured time in seconds.
    pub seconds: f64,
    /// CPU seconds of the server in the measured time.
    pub cpu: f64,
    /// CPU seconds per second of all processes but the server and the client, in the measured time.
    pub others: f64,
    /// Resident bytes of the server without the guest's memory, at the end of the measured time.
    pub resident: u64,
    /// Latency in nanoseconds: the median and the 99th percentile; `None` if requests are not timed one by one.
    pub latency: Option<[u64; 2]>,
    /// Bytes that the image occupies on the host after the server's end; `None` if the servers' amounts of work differ.
    pub host_bytes: Option<u64>,
    /// Problems found.
    pub problems: Vec<String>,
}

impl Sample {
    /// Requests per CPU second of the server; `None` if that has no meaning.
    pub fn per_cpu(&self) -> Option<f64> {
        // The kernel's clock has a resolution of 10 ms.
        (self.cpu >= 0.02 && self.requests > 0).then(|| self.requests as f64 / self.cpu)
    }
}

/// The work of a load in the measured time.
struct Work {
    requests: u64,
    bytes: u64,
    latency: Option<Histogram>,
    problems: Vec<String>,
}

/// The clocks at the start and at the end.
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

/// Takes a sample. The server serves `image` and has no connection yet.
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
    // The warm-up loads tables and touches buffers, equally for both servers.
    let warm_up = times.load.div_f64(5.0).max(Duration::from_millis(100));
    match case.job {
        Job::Timed { .. } => drop(load::run(client.queues(), &timed(size, case, warm_up)?)?),
        Job::Beside => drop(beside(&mut client, case, warm_up, Verify::Off)?),
        _ => {}
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
        Job::Beside => {
            let [reads, writes] = beside(&mut client, case, times.load, Verify::Off)?;
            let mut work = work_of(reads);
            work.problems.extend(load_problems(&writes));
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
        bail!("{} is not a timed case", case.name)
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

/// The load of a case with one request for every block of a disk of `size` bytes.
pub fn once(size: u64, case: &Case, verify: Verify, seed: u64) -> Result<Spec> {
    let Job::Once { mix, order, block, .. } = case.job else {
        bail!("{} is not a case over the whole disk", case.name)
    };
    let range = 0..size;
    let (depth, flush_every) = (case.depth, 0);
    Ok(Spec { depth, block_size: block, order, mix, flush_every, limit: Limit::Once, verify, range, seed })
}

/// The load of a case that writes to each cluster.
pub fn first_touch(case: &Case, size: u64, access: Access, time: Option<Duration>) -> Touch {
    let flush_every = if let Job::FirstTouch { flush_every } = case.job { flush_every } else { 0 };
    let clusters = size / case.cluster();
    let (cluster, depth) = (case.cluster(), case.depth);
    Touch { clusters, cluster, count: clusters, time, depth, shift: 0, flush_every, access }
}

fn run_load(client: &mut Client, spec: &Spec) -> Result<Work> {
    Ok(work_of(load::run(client.queues(), spec)?))
}

fn work_of(report: load::Report) -> Work {
    Work {
        requests: report.requests,
        bytes: report.bytes,
        problems: load_problems(&report),
        latency: Some(report.latency),
    }
}

/// The load of a case with a reader beside a writer: the reports of both.
pub fn beside(client: &mut Client, case: &Case, time: Duration, verify: Verify) -> Result<[load::Report; 2]> {
    let size = client.size();
    let reads = Spec {
        depth: 1,
        verify,
        seed: SEED,
        range: 0..size / 2,
        order: Order::Random,
        mix: Mix::READ,
        ..Spec::random_reads(size, time)
    };
    let writes = Spec { depth: case.depth, range: size / 2..size, mix: Mix::WRITE, ..reads.clone() };
    let (reader, writer) = client.queues().split_at_mut(1);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| load::run(writer, &writes));
        let read = load::run(reader, &reads)?;
        Ok([read, writing.join().expect("no panic")?])
    })
}

/// The problems in a load's report.
pub fn load_problems(report: &load::Report) -> Vec<String> {
    let mut problems = Vec::new();
    if report.errors > 0 {
        problems.push(format!("{} requests failed", report.errors));
    }
    if report.mismatches > 0 {
        let at = report.first_mismatch.unwrap_or_default();
        problems.push(format!("{} reads returned wrong data, one of them at {at}", report.mismatches));
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

/// The problems in the report of a load on each cluster.
pub fn touch_problems(touched: &touch::Touched) -> Vec<String> {
    let mut problems = Vec::new();
    if touched.errors > 0 {
        problems.push(format!("{} requests failed", touched.errors));
    }
    if touched.mismatches > 0 {
        problems.push(format!("{} reads returned wrong data", touched.mismatches));
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

/// Waits until the discarded bytes are given back to the host.
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
                "only {back} of {discarded} discarded bytes were given back within {GIVE_BACK_PATIENCE:?} of the flush"
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
