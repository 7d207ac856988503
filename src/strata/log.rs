//! Logs: where they go and how much of them.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What is logged when nobody says otherwise.
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

impl std::str::FromStr for LogLevel {
    type Err = LogLevelError;

    fn from_str(text: &str) -> Result<Self, LogLevelError> {
        // A word by itself would be taken for the name of a module, and a misspelt level would silence the rest.
        let mut words = text.split(',').map(str::trim).filter(|part| !part.contains(['=', '[']));
        if text.is_empty() || words.any(|word| word.parse::<LevelFilter>().is_err()) {
            return Err(LogLevelError);
        }
        EnvFilter::builder().parse(text).map_err(|_| LogLevelError)?;
        Ok(LogLevel(text.to_owned()))
    }
}

/// Sends logs to the standard error. As text they have a time stamp, and on a terminal colours unless `NO_COLOR` is set. The
/// journal has times itself, and gets priorities.
pub fn start(level: Option<&LogLevel>, format: LogFormat) {
    let from_environment = || std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let wanted = level.map(|level| level.0.clone()).or_else(from_environment);
    let parsed = wanted.as_deref().map(|text| EnvFilter::builder().parse(text));
    let (filter, wrong) = match parsed {
        Some(Ok(filter)) => (filter, false),
        Some(Err(_)) => (EnvFilter::new(DEFAULT), true),
        None => (EnvFilter::new(DEFAULT), false),
    };
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    // A reader of the log that is gone must not end us: told of its own failure, the subscriber would print that to the
    // standard error in turn, and that panics. The result: nobody else has set a subscriber up.
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .log_internal_errors(false);
    let _ = match format {
        LogFormat::Json => subscriber.json().flatten_event(true).with_ansi(false).try_init(),
        LogFormat::Text if is_journal() => {
            let plain = tracing_subscriber::fmt::format().without_time().with_target(false).with_ansi(false);
            subscriber.event_format(Journal(plain)).try_init()
        }
        LogFormat::Text => subscriber.try_init(),
    };
    if wrong {
        tracing::warn!("RUST_LOG is no filter; logging at level {DEFAULT}");
    }
}

/// What a line for people on the standard error begins with: a priority, if the journal reads it.
pub fn error_prefix() -> &'static str {
    if is_journal() { "<3>" } else { "" }
}

/// Whether the standard error is the journal's: it says so by device and inode (systemd.exec(5), JOURNAL_STREAM), as a
/// program that was started by a service may have another one.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let stat = rustix::fs::fstat(std::io::stderr());
    stat.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Lines with the priorities of sd-daemon(3).
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
    fn levels_and_filters_are_told_from_nonsense() {
        for right in ["info", "DEBUG", "off", "warn,vhost_blk=debug"] {
            assert!(right.parse::<LogLevel>().is_ok(), "{right}");
        }
        for wrong in ["", "loud", "warn,loud", "strata=loud", "a=b=c"] {
            assert!(wrong.parse::<LogLevel>().is_err(), "{wrong}");
        }
    }
}
