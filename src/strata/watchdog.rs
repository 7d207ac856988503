//! Pings the service manager's watchdog (sd_watchdog_enabled(3)) as long as the daemon gets on.
//!
//! The ping comes after a look at the threads that do the work, not from a thread that is always well. It is
//! withheld while one of them has been in one step for a whole interval, and then the manager restarts the daemon.
//! A thread that waits for requests, for messages or for the disk is well.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use vhost_blk::Pulse;

use crate::error::ProgramError;
use crate::notify;

/// The interval that the service manager asks for, if it has a watchdog for this process.
fn interval() -> Option<Duration> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>());
    asked(number("WATCHDOG_USEC")?.ok()?, number("WATCHDOG_PID").map(Result::ok), std::process::id())
}

/// `pid` is the process that is meant: none if it is not named, a bad number if that makes no sense.
fn asked(microseconds: u64, pid: Option<Option<u64>>, own: u32) -> Option<Duration> {
    let ours = pid.is_none_or(|pid| pid == Some(u64::from(own)));
    (ours && microseconds > 0).then(|| Duration::from_micros(microseconds))
}

/// Pings from its own thread until it is dropped.
pub struct Watchdog {
    _until_dropped: Sender<()>,
}

impl Watchdog {
    /// Starts to ping if the service manager asks for it.
    ///
    /// # Errors
    /// When the host refuses a thread.
    pub fn start(pulse: Arc<Pulse>) -> Result<Option<Self>, ProgramError> {
        let Some(interval) = interval() else { return Ok(None) };
        let (sender, ended) = mpsc::channel();
        let ping = move || {
            let mut patience = Patience::new(interval);
            let mut well = true;
            while ended.recv_timeout(interval / 2) == Err(RecvTimeoutError::Timeout) {
                let stuck = patience.stuck(&pulse.steps(), Instant::now());
                match stuck {
                    Some(thread) if well => {
                        warn!("the watchdog is not pinged: {} is stuck in one step", name(thread));
                    }
                    None if !well => info!("the watchdog is pinged again"),
                    _ => {}
                }
                well = stuck.is_none();
                if well {
                    notify::send(notify::WATCHDOG);
                }
            }
        };
        thread::Builder::new()
            .name("strata-watchdog".to_owned())
            .spawn(ping)
            .map_err(|source| ProgramError::Host { step: "starting a thread", source })?;
        Ok(Some(Watchdog { _until_dropped: sender }))
    }
}

/// The name of a thread by its number in [`Pulse::steps`].
fn name(thread: usize) -> String {
    match thread {
        0 => "the session's thread".to_owned(),
        queue => format!("strata-q{}", queue - 1),
    }
}

/// Since when each thread has been in its step.
struct Patience {
    interval: Duration,
    seen: Vec<(Option<u32>, Instant)>,
}

impl Patience {
    fn new(interval: Duration) -> Self {
        Patience { interval, seen: Vec::new() }
    }

    /// The first thread that has been in one step for the whole interval.
    fn stuck(&mut self, steps: &[Option<u32>], now: Instant) -> Option<usize> {
        self.seen.resize(steps.len(), (None, now));
        for (seen, step) in self.seen.iter_mut().zip(steps) {
            if seen.0 != *step {
                *seen = (*step, now);
            }
        }
        let late = |(step, since): &(Option<u32>, Instant)| {
            step.is_some() && now.saturating_duration_since(*since) >= self.interval
        };
        self.seen.iter().position(late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_of_another_process_is_not_ours() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(asked(1_000_000, None, 7), second);
        assert_eq!(asked(1_000_000, Some(Some(7)), 7), second);
        assert_eq!(asked(1_000_000, Some(Some(8)), 7), None);
        assert_eq!(asked(1_000_000, Some(None), 7), None);
        assert_eq!(asked(0, None, 7), None);
    }

    #[test]
    fn only_a_thread_in_one_step_for_an_interval_is_stuck() {
        let second = Duration::from_secs(1);
        let mut patience = Patience::new(2 * second);
        let began = Instant::now();
        let mut at = |seconds, steps: &[Option<u32>]| patience.stuck(steps, began + seconds * second);
        assert_eq!(at(0, &[None, Some(1), Some(1)]), None);
        assert_eq!(at(1, &[None, Some(1), Some(3)]), None);
        assert_eq!(at(2, &[None, Some(1), Some(5)]), Some(1));
        assert_eq!(at(3, &[None, Some(3), Some(5)]), None, "the first went on, the second is not late yet");
        assert_eq!(at(9, &[None, None, None]), None, "waiting is no step, however long it lasts");
        assert_eq!(at(20, &[None, None, None]), None);
        assert_eq!(at(21, &[Some(1), None, None]), None);
        assert_eq!(at(23, &[Some(1), None, None]), Some(0));
    }
}
