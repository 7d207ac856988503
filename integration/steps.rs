//! Progress for the user: named steps with times, with a spinner on a terminal, else as plain lines.
//!
//! Owns the output of steps and the use of colours (none with `NO_COLOR` or without a terminal). It never decides what
//! a step does.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Colours text, or leaves it plain.
#[derive(Clone, Copy, Debug)]
pub struct Colours {
    on: bool,
}

impl Colours {
    /// Colours if standard output is a terminal and `NO_COLOR` is not set (<https://no-color.org>).
    pub fn of_stdout() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { on: std::io::stdout().is_terminal() && !unwanted }
    }

    /// No colours.
    pub fn none() -> Self {
        Self { on: false }
    }

    /// `text` in an ANSI style such as `32` (green) or `1` (bold).
    pub fn paint(self, style: &str, text: &str) -> String {
        if self.on { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The duration of a step.
#[derive(Clone, Debug)]
pub struct StepTime {
    /// Its name.
    pub name: String,
    /// The time from its start to its end.
    pub took: Duration,
}

/// A sequence of steps.
pub struct Steps {
    colours: Colours,
    terminal: bool,
    done: Vec<StepTime>,
}

impl Default for Steps {
    fn default() -> Self {
        Self::new()
    }
}

impl Steps {
    /// An empty sequence.
    pub fn new() -> Self {
        // The spinner is drawn on standard error; results go to standard output.
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { colours: Colours::of_stdout(), terminal, done: Vec::new() }
    }

    /// Runs one step. Prints its result, and returns its error with the step's name.
    pub fn run<T>(&mut self, name: &str, work: impl FnOnce(&Line) -> Result<T>) -> Result<T> {
        let line = Line::start(name, self.terminal);
        let started = Instant::now();
        let result = work(&line);
        let took = started.elapsed();
        if let Some(spinner) = &line.spinner {
            spinner.finish_and_clear();
        }
        let (style, mark) = if result.is_ok() { ("32", "✓") } else { ("31", "✗") };
        let time = self.colours.paint("2", &format!("{:.1} s", took.as_secs_f64()));
        println!("{} {name}  {time}", self.colours.paint(style, mark));
        self.done.push(StepTime { name: name.to_owned(), took });
        result.with_context(|| format!("{name} failed"))
    }

    /// The steps so far.
    pub fn times(&self) -> &[StepTime] {
        &self.done
    }

    /// The colours for further output.
    pub fn colours(&self) -> Colours {
        self.colours
    }
}

/// The running step.
pub struct Line {
    spinner: Option<ProgressBar>,
    name: String,
}

impl Line {
    fn start(name: &str, terminal: bool) -> Self {
        if !terminal {
            println!("… {name}");
            return Self { spinner: None, name: name.to_owned() };
        }
        let spinner = ProgressBar::new_spinner();
        let style =
            ProgressStyle::with_template("{spinner} {msg}  {elapsed}").expect("the template is right");
        spinner.set_style(style);
        spinner.set_message(name.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(120));
        Self { spinner: Some(spinner), name: name.to_owned() }
    }

    /// Shows the step's progress, next to the spinner or as a line.
    pub fn now(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("{}: {text}", self.name)),
            None => println!("    {text}"),
        }
    }

    /// Prints a line that stays on the screen.
    pub fn keep(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => spinner.println(format!("    {text}")),
            None => println!("    {text}"),
        }
    }
}
