//! Logs: their destination and their level.

use std::io::IsTerminal;
use std::sync::OnceLock;

use clap::ValueEnum;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, SubscriberBuilder};
use tracing_subscriber::registry::{LookupSpan, Registry};

/// The format with which the log was started.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Replaces the filter of the log.
static REPLACE: OnceLock<Box<dyn Fn(EnvFilter) -> bool + Send + Sync>> = OnceLock::new();

/// The default log level.
const DEFAULT: &str = "info";

/// How lines of the log look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// A JSON object a line
    Json,
}

/// A level, or a filter as in `RUST_LOG`: `debug`, `warn,vhost_blk=debug`.
#[derive(Clone, Debug)]
pub struct LogLevel(String);

/// Why a text is no filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a level is one of off, error, warn, info, debug and trace; a filter is a list such as warn,vhost_blk=debug"
)]
pub struct LogLevelError;

impl std::fmt::Display for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for LogLevel {
    type Err = LogLevelError;

    fn from_str(text: &str) -> Result<Self, LogLevelError> {
        // A word by itself would be taken for a module name, and a misspelt level would silence all other modules.
        let mut words = text.split(',').map(str::trim).filter(|part| !part.contains(['=', '[']));
        if text.is_empty() || words.any(|word| word.parse::<LevelFilter>().is_err()) {
            return Err(LogLevelError);
        }
        parse(text).map_err(|_| LogLevelError)?;
        Ok(LogLevel(text.to_owned()))
    }
}

/// The filter that a text stands for. Values of fields are compared as they are, and are no regular expressions: those
/// of `tracing-subscriber` become automata whose size has no bound, and a client of the control socket writes them.
fn parse(text: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().with_regex(false).parse(text)
}

/// Sends logs to the standard error. Text lines have a time stamp, and colours on a terminal unless `NO_COLOR` is
/// set. The journal adds times itself, and gets priorities.
pub fn start(level: Option<&LogLevel>, format: LogFormat) {
    let from_environment = || std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let _ = FORMAT.set(format);
    let wanted = level.map(|level| level.0.clone()).or_else(from_environment);
    let parsed = wanted.as_deref().map(parse);
    let (filter, wrong) = match parsed {
        Some(Ok(filter)) => (filter, false),
        Some(Err(_)) => (EnvFilter::new(DEFAULT), true),
        None => (EnvFilter::new(DEFAULT), false),
    };
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    // A log reader that has closed the pipe must not end the program. The subscriber would print its own failure to
    // the standard error, and that panics. The result is ignored: no other code sets a subscriber.
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .log_internal_errors(false);
    match format {
        LogFormat::Json => install(subscriber.json().flatten_event(true).with_ansi(false)),
        LogFormat::Text if is_journal() => {
            let plain = tracing_subscriber::fmt::format().without_time().with_target(false).with_ansi(false);
            install(subscriber.event_format(Journal(plain)));
        }
        LogFormat::Text => install(subscriber),
    }
    if wrong {
        tracing::warn!("RUST_LOG is no filter; logging at level {DEFAULT}");
    }
}

/// Logs by `builder` from now on, so that its filter can be replaced.
fn install<N, E, W>(builder: SubscriberBuilder<N, E, EnvFilter, W>)
where
    N: for<'a> FormatFields<'a> + Send + Sync + 'static,
    E: FormatEvent<Registry, N> + Send + Sync + 'static,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let builder = builder.with_filter_reloading();
    let handle = builder.reload_handle();
    let _ = REPLACE.set(Box::new(move |filter| handle.reload(filter).is_ok()));
    let _ = builder.try_init();
}

/// Logs at another level from now on. False if the log was not started.
pub fn change(level: &LogLevel) -> bool {
    let Ok(filter) = parse(&level.0) else { return false };
    REPLACE.get().is_some_and(|replace| replace(filter))
}

/// The error that ends the program, as a line of the log, if the log is for programs. Whatever the log's level is, this
/// line is in it. False: the error is to be told to people.
pub fn tell_last_error(message: &str, hint: Option<&str>) -> bool {
    if FORMAT.get() != Some(&LogFormat::Json) {
        return false;
    }
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(Level::ERROR)
        .with_writer(std::io::stderr)
        .with_target(false)
        .log_internal_errors(false)
        .json()
        .flatten_event(true)
        .with_ansi(false)
        .finish();
    tracing::subscriber::with_default(subscriber, || tracing::error!(hint, "{message}"));
    true
}

/// The prefix of a line for people on the standard error: a priority, if the journal reads it.
pub fn error_prefix() -> &'static str {
    if is_journal() { "<3>" } else { "" }
}

/// Whether the standard error is the journal's. JOURNAL_STREAM (systemd.exec(5)) names its device and inode, because
/// a program started by a service may have another standard error.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let stat = rustix::fs::fstat(std::io::stderr());
    stat.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Lines with sd-daemon(3) priorities.
struct Journal<F>(F);

impl<S, N, F> FormatEvent<S, N> for Journal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        text.lines().try_for_each(|line| writeln!(writer, "<{priority}>{}", line.trim_start()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_levels_and_filters_are_refused() {
        for right in ["info", "DEBUG", "off", "warn,vhost_blk=debug"] {
            assert!(right.parse::<LogLevel>().is_ok(), "{right}");
        }
        for wrong in ["", "loud", "warn,loud", "strata=loud", "a=b=c"] {
            assert!(wrong.parse::<LogLevel>().is_err(), "{wrong}");
        }
    }
    /// An unclosed group is no regular expression. As one it would be refused, and large ones would take all memory.
    #[test]
    fn values_in_filters_are_no_regular_expressions() {
        for filter in ["[{x=(}]=info", "[{x=a(b|c)*[}]=debug"] {
            assert!(filter.parse::<LogLevel>().is_ok(), "{filter}");
        }
        let states = "(a|b)*a".to_owned() + &"(a|b)".repeat(12);
        let level: LogLevel = format!("[{{x={states}}}]=info").parse().expect("a filter");
        assert!(parse(&level.0).expect("a filter").to_string().contains(&states));
    }
}
