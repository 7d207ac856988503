//! The turns of a case: in each turn every server runs once, on an equal image.
//!
//! Owns the order, and the steps between two turns: the server's end and the check of its image. The first turn
//! verifies the data and does not count. A server's failure invalidates its turn, not the run.

use anyhow::{Context, Result};
use std::path::Path;
use std::time::{Duration, Instant};
use strata_integration::daemon::Program;
use strata_integration::image::{self, Health};

use super::bare;
use super::case::{BLOCK, Case, Unit};
use super::gallery::{Gallery, Specimen};
use super::measure::{Sample, Times, sample};
use super::process::machine_seconds;
use super::server::Server;
use super::verify::{exercise, judge};

/// Cores that other processes may use on a quiet machine.
const QUIET: f64 = 0.15;

/// The participants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The daemon to measure.
    Subject,
    /// The daemon to compare with.
    Rival,
    /// The daemon to measure, without the chain, in cases that have one.
    Unchained,
    /// A bare loop on the file, if that is comparable.
    Bare,
    /// The stock rust-vmm backend on a raw file, if that is comparable.
    Stock,
    /// The null device behind Strata's session, if that is comparable.
    Null,
}

/// The programs and how to use them.
pub struct Rules {
    /// The daemon to measure.
    pub subject: Program,
    /// The daemon to compare with.
    pub rival: Program,
    /// The daemon that reads back the data of both: always QEMU's.
    pub judge: Program,
    /// Measured turns.
    pub turns: usize,
    /// Durations of the measurements.
    pub times: Times,
    /// True to measure the two limits and the stock backend too.
    pub limits: bool,
    /// Virtual bytes of the null device.
    pub null_bytes: u64,
    /// How long the client busy-polls for completions before it sleeps.
    pub client_polls: Duration,
    /// The longest wait for a quiet machine before a turn; after it the turn starts anyway.
    pub patience: Duration,
}

/// One side's turns.
#[derive(Clone, Debug)]
pub struct Row {
    /// The side.
    pub side: Side,
    /// Its samples turn by turn; `None` if a turn failed.
    pub samples: Vec<Option<Sample>>,
    /// Its problems, those of the verifying turn included.
    pub problems: Vec<String>,
}

/// The results of a case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case.
    pub case: Case,
    /// The sides.
    pub rows: Vec<Row>,
}

impl Rules {
    /// Runs a case. Reports progress to `say`.
    pub fn run(&self, gallery: &mut Gallery, case: &Case, say: &mut dyn FnMut(&str)) -> Outcome {
        let mut outcome = Outcome { case: *case, rows: Vec::new() };
        outcome.rows = self
            .sides(case)
            .into_iter()
            .map(|side| Row { side, samples: Vec::new(), problems: Vec::new() })
            .collect();
        for turn in 0..=self.turns {
            if turn > 0 {
                self.await_quiet(say);
            }
            // The first side has a rested disk but cold host caches, so the order is reversed in every other turn.
            let sides = outcome.rows.len();
            for place in 0..sides {
                let side = if turn % 2 == 0 { place } else { sides - 1 - place };
                self.take_turn(gallery, case, turn, &mut outcome.rows[side], say);
            }
        }
        outcome
    }

    fn sides(&self, case: &Case) -> Vec<Side> {
        let mut sides = vec![Side::Subject, Side::Rival];
        if case.without_chain().is_some() {
            sides.push(Side::Unchained);
        }
        let limit = case.limit().filter(|_| self.limits);
        if limit.is_some() && bare::available() {
            sides.push(Side::Bare);
        }
        if limit.is_some() {
            sides.push(Side::Stock);
        }
        // The null device moves no data, so larger blocks would only give larger numbers.
        if limit.is_some_and(|pattern| pattern.block == BLOCK) {
            sides.push(Side::Null);
        }
        sides
    }

    /// Waits until the machine is quiet. It checks before a turn only: samples are never selected by their results.
    fn await_quiet(&self, say: &mut dyn FnMut(&str)) {
        const INTERVAL: Duration = Duration::from_millis(200);
        let deadline = Instant::now() + self.patience;
        while Instant::now() < deadline {
            let Ok(before) = machine_seconds() else { return };
            std::thread::sleep(INTERVAL);
            let busy = machine_seconds().unwrap_or(before) - before;
            if busy / INTERVAL.as_secs_f64() <= QUIET {
                return;
            }
        }
        if !self.patience.is_zero() {
            say("other processes still use the machine after the wait");
        }
    }

    /// Runs one side's turn. Turn 0 verifies the data and does not count.
    fn take_turn(
        &self,
        gallery: &mut Gallery,
        case: &Case,
        turn: usize,
        row: &mut Row,
        say: &mut dyn FnMut(&str),
    ) {
        let result = match row.side {
            Side::Subject | Side::Rival if turn == 0 => {
                self.verified(gallery, case, row.side).map(|problems| {
                    row.problems.extend(problems);
                    None
                })
            }
            // The work of the other sides is verified in another case, or cannot be verified.
            _ if turn == 0 => Ok(None),
            Side::Subject => self.measured(gallery, case, &self.subject).map(Some),
            Side::Rival => self.measured(gallery, case, &self.rival).map(Some),
            Side::Unchained => self.unchained(gallery, case).map(Some),
            Side::Bare => self.bare(gallery, case).map(Some),
            Side::Stock => self.stock(gallery, case).map(Some),
            Side::Null => self.null(case).map(Some),
        };
        let sample = result.unwrap_or_else(|error| {
            row.problems.push(format!("turn {turn}: {error:#}"));
            None
        });
        if let Some(sample) = &sample {
            say(&format!("turn {turn}, {:?}: {}", row.side, shown(case.unit(), sample.value)));
            row.problems.extend(sample.problems.iter().map(|problem| format!("turn {turn}: {problem}")));
        }
        if turn > 0 {
            row.samples.push(sample);
        }
    }

    fn program(&self, side: Side) -> &Program {
        if side == Side::Subject { &self.subject } else { &self.rival }
    }

    fn verified(&self, gallery: &mut Gallery, case: &Case, side: Side) -> Result<Vec<String>> {
        let specimen = gallery.specimen_with_data(case)?;
        let server = Server::of_image(self.program(side), &specimen.path, case)?;
        let (mut problems, expectation) = exercise(&server, case)?;
        problems.extend(server.complaints());
        server.stop()?;
        problems.extend(check(&specimen.path)?);
        problems.extend(judge(&self.judge, &specimen.path, case, &expectation)?);
        Ok(problems.into_iter().map(|problem| format!("turn 0: {problem}")).collect())
    }

    fn measured(&self, gallery: &mut Gallery, case: &Case, program: &Program) -> Result<Sample> {
        let specimen = gallery.specimen(case)?;
        let mut server = Server::of_image(program, &specimen.path, case)?;
        server.set_client_polls(self.client_polls);
        let mut sample = sample(&mut server, case, &specimen.path, self.times)?;
        sample.problems.extend(server.complaints());
        server.stop()?;
        self.look_at(&specimen, case, &mut sample)?;
        Ok(sample)
    }

    fn unchained(&self, gallery: &mut Gallery, case: &Case) -> Result<Sample> {
        let same = case.without_chain().context("a case without a chain")?;
        self.measured(gallery, &same, &self.subject)
    }

    fn look_at(&self, specimen: &Specimen, case: &Case, sample: &mut Sample) -> Result<()> {
        // In a timed case the faster server writes more, so the images' sizes cannot be compared.
        if case.fixed_work() {
            sample.host_bytes = Some(image::allocated_bytes(&specimen.path)?);
        }
        sample.problems.extend(check(&specimen.path)?);
        Ok(())
    }

    /// Runs the bare loop on the servers' own file or a copy of it: the location of a file on its disk affects its
    /// speed. The loop's writes destroy the image.
    fn bare(&self, gallery: &mut Gallery, case: &Case) -> Result<Sample> {
        let pattern = case.limit().context("a case with a limit")?;
        let specimen = gallery.specimen(case)?;
        let bare = bare::run(&specimen.path, &pattern, self.times.load)?;
        let seconds = self.times.load.as_secs_f64();
        let value = match case.unit() {
            Unit::Throughput => bare.rate * f64::from(pattern.block) / 1e6,
            _ => bare.rate,
        };
        Ok(Sample {
            value,
            requests: (bare.rate * seconds) as u64,
            seconds,
            cpu: bare.cpu * seconds,
            others: 0.0,
            resident: 0,
            latency: None,
            host_bytes: None,
            problems: Vec::new(),
        })
    }

    /// Runs the stock backend on a raw file of the size of the image's disk.
    fn stock(&self, gallery: &mut Gallery, case: &Case) -> Result<Sample> {
        let file = gallery.raw()?;
        let mut server = Server::of_stock(&file, case)?;
        server.set_client_polls(self.client_polls);
        let sample = sample(&mut server, case, &file, self.times)?;
        server.stop()?;
        Ok(sample)
    }

    fn null(&self, case: &Case) -> Result<Sample> {
        let mut server = Server::of_null(self.null_bytes, case)?;
        server.set_client_polls(self.client_polls);
        let sample = sample(&mut server, case, Path::new("/dev/null"), self.times)?;
        server.stop()?;
        Ok(sample)
    }
}

/// Returns a problem unless the image is clean: after SIGTERM there may be no leaks either.
fn check(image: &Path) -> Result<Option<String>> {
    Ok(match image::check_by_qemu(image).context("qemu-img check")? {
        Health::Clean => None,
        Health::Leaks(clusters) => Some(format!("qemu-img check: {clusters} clusters leaked")),
        Health::Broken(text) => Some(format!("qemu-img check: {text}")),
    })
}

/// A value with its unit.
pub fn shown(unit: Unit, value: f64) -> String {
    let scale = Scale::of(unit, value);
    format!("{} {}", scale.number(value), scale.suffix)
}

/// The format of values of similar size.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    divisor: f64,
    digits: usize,
    /// The unit.
    pub suffix: &'static str,
}

impl Scale {
    /// The scale for values of about this size.
    pub fn of(unit: Unit, value: f64) -> Self {
        let (divisor, digits, suffix) = match unit {
            Unit::Rate if value >= 1e6 => (1e6, 2, "M/s"),
            Unit::Rate if value >= 1e4 => (1e3, 0, "k/s"),
            Unit::Rate => (1e3, 2, "k/s"),
            Unit::Throughput => (1.0, 0, "MB/s"),
            Unit::Memory => (f64::from(1 << 20), 1, "MiB"),
            Unit::Cpu => (0.01, 3, "%"),
        };
        Self { divisor, digits, suffix }
    }

    /// The number without its unit.
    pub fn number(self, value: f64) -> String {
        format!("{:.*}", self.digits, value / self.divisor)
    }
}
