//! The turns of a case: each server on an equal image, one after the other, again and again.
//!
//! Owns the order and what happens between two turns: the server's end, the check of its image. The first turn looks
//! whether the data is right and is not counted. A server that fails loses its turn, not the run.

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

/// Cores that others may use on a quiet machine.
const QUIET: f64 = 0.15;

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The daemon that is tried.
    Subject,
    /// The one it is compared with.
    Rival,
    /// The daemon that is tried, without the chain, in cases that have one.
    Unchained,
    /// A bare loop on the file, where that is comparable.
    Bare,
    /// The stock rust-vmm backend on a raw file, where that is comparable.
    Stock,
    /// The null device behind Strata's session, where that is comparable.
    Null,
}

/// The programs and how to use them.
pub struct Rules {
    /// The daemon that is tried.
    pub subject: Program,
    /// The one it is compared with.
    pub rival: Program,
    /// Reads back what either wrote: QEMU's, whoever takes part.
    pub judge: Program,
    /// Turns that count.
    pub turns: usize,
    /// How long to measure.
    pub times: Times,
    /// Measure the two limits and the stock backend as well.
    pub limits: bool,
    /// Virtual bytes of the null device.
    pub null_bytes: u64,
    /// How long the client polls for completions before it sleeps.
    pub client_polls: Duration,
    /// How long to wait for a quiet machine before a turn; then it goes on all the same.
    pub patience: Duration,
}

/// One side's turns: none where a turn failed.
#[derive(Clone, Debug)]
pub struct Row {
    /// Whose.
    pub side: Side,
    /// Turn by turn.
    pub samples: Vec<Option<Sample>>,
    /// What was not as it should be, the turn before it all included.
    pub problems: Vec<String>,
}

/// What a case brought.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case.
    pub case: Case,
    /// The sides.
    pub rows: Vec<Row>,
}

impl Rules {
    /// Runs a case. `say` hears how it goes.
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
            // Who comes first finds the disk rested, or the host's caches cold: forth in one turn and back in the next.
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
        // Larger blocks that are not moved would only be larger numbers.
        if limit.is_some_and(|pattern| pattern.block == BLOCK) {
            sides.push(Side::Null);
        }
        sides
    }

    /// Waits until others leave the machine alone. It looks at them before a turn only: samples are never chosen by
    /// what they brought.
    fn await_quiet(&self, say: &mut dyn FnMut(&str)) {
        const LOOK: Duration = Duration::from_millis(200);
        let deadline = Instant::now() + self.patience;
        while Instant::now() < deadline {
            let Ok(before) = machine_seconds() else { return };
            std::thread::sleep(LOOK);
            let busy = machine_seconds().unwrap_or(before) - before;
            if busy / LOOK.as_secs_f64() <= QUIET {
                return;
            }
        }
        if !self.patience.is_zero() {
            say("others use the machine, and still do after the wait");
        }
    }

    /// Turn 0 is the one that is verified and not counted.
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
            // The other sides do what another case verifies, or nothing that could be verified.
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
        // Where time decides, the faster one writes more: its image cannot be compared.
        if case.fixed_work() {
            sample.host_bytes = Some(image::allocated_bytes(&specimen.path)?);
        }
        sample.problems.extend(check(&specimen.path)?);
        Ok(())
    }

    /// On the very file that the servers work on, or a copy of it, as one file may lie better on its disk than another.
    /// To the loop it is a file like any other: writes make it useless as an image.
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

    /// The stock backend on a raw file as large as the image's disk.
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

/// A complaint unless the image is clean: after an orderly end nothing may be lost either.
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

/// How to write a value and its likes.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    divisor: f64,
    digits: usize,
    /// What the numbers count.
    pub suffix: &'static str,
}

impl Scale {
    /// For values of about this size.
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

    /// The bare number.
    pub fn number(self, value: f64) -> String {
        format!("{:.*}", self.digits, value / self.divisor)
    }
}
