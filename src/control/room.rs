//! What all requests share: the daemon, its events, and how much may be under way.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::info;

use crate::bounds::{COMMANDS_MAX, STREAMS_MAX};
use crate::events::Hub;
use crate::failure::{Failure, Kind};
use crate::refusal::Refusal;
use crate::stopped::Stopped;
use crate::subject::Subject;

/// What all requests share.
#[derive(Clone)]
pub struct Room {
    pub subject: Arc<dyn Subject>,
    pub hub: Arc<Hub>,
    /// Says when the daemon ends.
    pub stopped: Stopped,
    commands: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

/// The process that sent a request.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// None if it is in another process namespace, or the host does not say.
    pub pid: Option<i32>,
    pub uid: Option<u32>,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.pid, self.uid) {
            (Some(pid), Some(uid)) => write!(f, "pid {pid}, uid {uid}"),
            (None, Some(uid)) => write!(f, "an unknown process, uid {uid}"),
            _ => f.write_str("an unknown process"),
        }
    }
}

impl Room {
    /// With nothing under way.
    pub fn new(subject: Arc<dyn Subject>, hub: Arc<Hub>, stopped: Stopped) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Room { subject, hub, stopped, commands: semaphore(COMMANDS_MAX), streams: semaphore(STREAMS_MAX) }
    }

    /// Runs a command that does I/O on a thread of its own. It runs to its end, also if its client leaves.
    pub async fn run<T: Send + 'static>(
        &self,
        command: impl FnOnce(&dyn Subject) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Refusal> {
        let subject = Arc::clone(&self.subject);
        let permit = permit(&self.commands, "other commands are under way")?;
        let ran = tokio::task::spawn_blocking(move || {
            let result = command(&*subject);
            // The subject goes first: the daemon ends only when nobody has it.
            drop(subject);
            drop(permit);
            result
        });
        match ran.await {
            Ok(result) => Ok(result?),
            Err(_) => Err(Refusal::new(Kind::Host, "the command panicked: the log says where")),
        }
    }

    /// The right to one more stream of events, until dropped.
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        permit(&self.streams, "as many clients as may listen to events do so")
    }
}

fn permit(of: &Arc<Semaphore>, why: &str) -> Result<OwnedSemaphorePermit, Refusal> {
    Arc::clone(of).try_acquire_owned().map_err(|_| Refusal::new(Kind::Busy, why))
}

/// Logs a command, before it runs.
pub fn log_command(peer: Peer, command: &str) {
    info!("control: {command} ({peer})");
}
