//! QEMU's monitor (QMP): one command at a time over a unix socket.
//!
//! Owns the connection. It never starts or ends QEMU.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Timeout until QEMU listens, and for each answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Interval between two looks at a migration.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A connection to a monitor.
pub struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the monitor of a QEMU that was just started.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
                Err(error) => return Err(error).with_context(|| path.display().to_string()),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { lines: BufReader::new(stream) };
        let greeting = monitor.next()?;
        ensure!(greeting.get("QMP").is_some(), "QEMU's greeting is {greeting}");
        monitor.run("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and returns its result. Events meanwhile are left out.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.lines.get_mut(), "{request}").with_context(|| command.to_owned())?;
        loop {
            let mut answer = self.next().with_context(|| command.to_owned())?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Migrates the guest to the QEMU that listens at `uri`, and waits until it runs there.
    pub fn migrate(&mut self, uri: &str) -> Result<Migrated> {
        self.run("migrate", json!({"uri": uri}))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.run("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => {
                    let downtime = state["downtime"].as_u64().context("query-migrate names no downtime")?;
                    let passes = state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
                    return Ok(Migrated { downtime: Duration::from_millis(downtime), passes });
                }
                Some("failed" | "cancelled") => bail!("the migration failed: {state}"),
                _ if Instant::now() > deadline => {
                    bail!("the migration takes more than {PATIENCE:?}: {state}")
                }
                _ => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).with_context(|| line.clone())
    }
}

/// A migration that has ended well.
#[derive(Clone, Copy, Debug)]
pub struct Migrated {
    /// How long no processor of the guest ran, as QEMU counts it.
    pub downtime: Duration,
    /// Passes over the guest's memory.
    pub passes: u64,
}
