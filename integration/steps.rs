//! Progress for a person: named steps with times, on a terminal with a spinner, else as plain lines.
//!
//! Owns how steps are written and whether colours are used (`NO_COLOR`, or no terminal: none). It never decides what
//! a step does.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Whether and how text is coloured.
#[derive(Clone, Copy, Debug)]
pub struct Colours {
    on: bool,
}

impl Colours {
    /// Colours when standard output is a terminal and nobody asked for none (<https://no-color.org>).
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

/// How long a step took.
#[derive(Clone, Debug)]
pub struct StepTime {
    /// Its name.
    pub name: String,
    /// From its start to its end.
    pub took: Duration,
}

/// A run of steps.
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
    /// No step yet.
    pub fn new() -> Self {
        // the spinner is drawn on standard error, the results go to standard output
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { colours: Colours::of_stdout(), terminal, done: Vec::new() }
    }

    /// Runs one step. Its failure is told where it happens and handed on.
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

    /// How to colour what goes with the steps.
    pub fn colours(&self) -> Colours {
        self.colours
    }
}

/// The step that runs now.
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

    /// What it is at: shown beside the spinner, or as a line.
    pub fn now(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("{}: {text}", self.name)),
            None => println!("    {text}"),
        }
    }

    /// A result worth keeping on the screen.
    pub fn keep(&self, text: &str) {
        match &self.spinner {
            Some(spinner) => spinner.println(format!("    {text}")),
            None => println!("    {text}"),
        }
    }
}
