//! Signals that must not end a command in the middle of its work. What ends `strata serve` is in `shutdown`.

use std::io::Write as _;
use std::sync::Arc;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::{emulate_default_handler, signal_name};

use crate::error::ProgramError;

fn failed(source: std::io::Error) -> ProgramError {
    ProgramError::Host { step: "setting signal handlers up", source }
}

/// Survives, in every command, the signals that would end it and that say nothing about it:
///
/// - SIGXFSZ: a write past the limit of file sizes (`ulimit -f`, a unit's LimitFSIZE) then fails with EFBIG. Left alone it
///   would end a daemon, which any guest could bring about, or a change of an image in its middle.
/// - SIGUSR1 and SIGUSR2, which people send to ask how far a program is.
///
/// Rust's runtime ignores SIGPIPE, so a write to a pipe that nobody reads fails too.
///
/// # Errors
/// When the host refuses a handler.
pub fn outlive() -> Result<(), ProgramError> {
    for signal in [SIGXFSZ, SIGUSR1, SIGUSR2] {
        // Nobody asks whether it came. A handler is not inherited by other programs, as an ignored signal is.
        signal_hook::flag::register(signal, Arc::default()).map_err(failed)?;
    }
    Ok(())
}

/// From now on SIGINT, SIGTERM and SIGHUP let a change of an image come to its end; a second one ends the command at once.
/// The image survives that, but clusters may be leaked.
///
/// # Errors
/// When the host refuses a handler or a thread.
pub fn finish_first() -> Result<(), ProgramError> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let wait = move || {
        let mut coming = signals.forever();
        let name = coming.next().and_then(signal_name).unwrap_or("a signal");
        let text =
            format!("strata: {name}: the change goes on to its end; a second signal ends it at once\n");
        let _ = std::io::stderr().write_all(text.as_bytes());
        if let Some(signal) = coming.next() {
            let _ = emulate_default_handler(signal);
        }
    };
    let started = thread::Builder::new().name("strata-signals".to_owned()).spawn(wait);
    started.map(drop).map_err(|source| ProgramError::Host { step: "starting a thread", source })
}
