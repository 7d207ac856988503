//! `strata ctl`: asks or commands a daemon by its control socket.
//!
//! Owns which request a command is. The tables for people are in `tables`.

mod tables;

use std::io::{self, Write as _};

use control::api::{Chain, DiskState, Event, LogLevel, Ping, Resize, Snapshot, SnapshotMode, Stats, Version};
use control::client::{Client, ClientError, Method};
use serde::de::DeserializeOwned;

use crate::cli::{CtlArgs, CtlCommand};
use crate::error::ProgramError;
use crate::text::{json, json_name, print};

/// Runs the command.
///
/// # Errors
/// When the daemon cannot be reached, refuses or fails, or the answer cannot be printed.
pub fn run(options: &CtlArgs) -> Result<(), ProgramError> {
    let failed = |source| ProgramError::Ctl { socket: options.socket.clone(), source };
    let mut client = Client::connect(&options.socket).map_err(failed)?;
    if matches!(options.command, CtlCommand::Events) {
        return client.events(Lines::printer(options.json)).map_err(failed);
    }
    let text = answer(&mut client, options).map_err(failed)?;
    print(&text).map_err(ProgramError::Print)
}

/// The text to print.
fn answer(client: &mut Client, options: &CtlArgs) -> Result<String, ClientError> {
    let as_json = options.json;
    match &options.command {
        CtlCommand::Ping => shown(client, "/v1/ping", as_json, |ping: &Ping| format!("pid {}\n", ping.pid)),
        CtlCommand::Version => {
            shown(client, "/v1/version", as_json, |of: &Version| format!("{}\n", of.version))
        }
        CtlCommand::Disk => shown(client, "/v1/disk", as_json, |disk: &DiskState| tables::disk(disk)),
        CtlCommand::Chain => shown(client, "/v1/chain", as_json, |chain: &Chain| tables::chain(chain)),
        CtlCommand::Stats => shown(client, "/v1/stats", as_json, |stats: &Stats| tables::stats(stats)),
        CtlCommand::Metrics => text(client, "/v1/metrics"),
        CtlCommand::Api => text(client, "/v1/openapi.json"),
        CtlCommand::LogLevel { level } => {
            let body = json(&LogLevel { level: level.to_string() });
            done(client, Method::PUT, "/v1/disk/log-level", Some(body))
        }
        CtlCommand::Resize { size, force } => {
            let body = json(&Resize { size: size.0, force: *force });
            let bytes = client.request(Method::PUT, "/v1/disk/size", Some(body))?;
            show(&bytes, as_json, tables::resized)
        }
        CtlCommand::Flush => done(client, Method::POST, "/v1/disk/flush", None),
        CtlCommand::Snapshot { overlay } => {
            // Relative to this process, not to the daemon.
            let overlay = std::path::absolute(overlay).unwrap_or_else(|_| overlay.clone());
            let wanted = Snapshot { overlay: json_name(&overlay), mode: SnapshotMode::default() };
            let bytes = client.request(Method::POST, "/v1/disk/snapshots", Some(json(&wanted)))?;
            show(&bytes, as_json, tables::snapshot)
        }
        CtlCommand::Pause => done(client, Method::POST, "/v1/disk/pause", None),
        CtlCommand::Resume => done(client, Method::POST, "/v1/disk/resume", None),
        CtlCommand::Shutdown => done(client, Method::POST, "/v1/shutdown", None),
        CtlCommand::Events => Ok(String::new()),
    }
}

/// An answer as JSON, or as `table` shows it. Both are made anew from what was understood, so that no daemon can send
/// anything that a terminal must not get.
fn shown<T: DeserializeOwned + serde::Serialize>(
    client: &mut Client,
    path: &'static str,
    as_json: bool,
    table: impl FnOnce(&T) -> String,
) -> Result<String, ClientError> {
    show(&client.request(Method::GET, path, None)?, as_json, table)
}

fn show<T: DeserializeOwned + serde::Serialize>(
    bytes: &[u8],
    as_json: bool,
    table: impl FnOnce(&T) -> String,
) -> Result<String, ClientError> {
    let wrong = |_| ClientError::Answer(200);
    if as_json {
        // Also fields of a later version are passed on.
        return Ok(json(&serde_json::from_slice::<serde_json::Value>(bytes).map_err(wrong)?));
    }
    Ok(table(&serde_json::from_slice(bytes).map_err(wrong)?))
}

/// An answer that is text already.
fn text(client: &mut Client, path: &'static str) -> Result<String, ClientError> {
    let bytes = client.request(Method::GET, path, None)?;
    let text = String::from_utf8(bytes).map_err(|_| ClientError::Answer(200))?;
    let control = |character: char| character != '\n' && names::must_be_escaped(character);
    if text.contains(control) { Err(ClientError::Answer(200)) } else { Ok(text) }
}

fn done(
    client: &mut Client,
    method: Method,
    path: &'static str,
    body: Option<String>,
) -> Result<String, ClientError> {
    client.request(method, path, body).map(|_| String::new())
}

/// Prints events as they come, line by line.
struct Lines {
    json: bool,
    begun: Vec<u8>,
}

impl Lines {
    /// A longer line is no event.
    const LENGTH_MAX: usize = 64 << 10;

    fn printer(json: bool) -> impl FnMut(&[u8]) -> bool {
        let mut lines = Lines { json, begun: Vec::new() };
        move |bytes| lines.take(bytes)
    }

    /// False if nobody reads the output any more, or what comes are no events.
    fn take(&mut self, bytes: &[u8]) -> bool {
        self.begun.extend_from_slice(bytes);
        while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.begun.drain(..=end).collect();
            let Ok(event) = serde_json::from_slice::<Event>(&line) else { continue };
            let text = if self.json { control::text::json_line(&event) } else { tables::event(&event) };
            if io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()).is_err() {
                return false;
            }
        }
        self.begun.len() <= Self::LENGTH_MAX
    }
}
