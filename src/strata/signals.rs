//! Signals that must not end a command in the middle of its work. `shutdown` owns the signals that end `strata
//! serve`.

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

/// Makes every command survive signals that would end it by default without being meant for it:
///
/// - SIGXFSZ: a write past the file size limit (`ulimit -f`, a unit's LimitFSIZE) then fails with EFBIG. By default
///   it would end a daemon, which any guest could provoke, or an image change half way.
/// - SIGUSR1 and SIGUSR2, which people send to see a program's progress.
///
/// Rust's runtime ignores SIGPIPE, so a write to a pipe without a reader fails too.
///
/// # Errors
/// When the host refuses a handler.
pub fn outlive() -> Result<(), ProgramError> {
    for signal in [SIGXFSZ, SIGUSR1, SIGUSR2] {
        // The flag is never read. Unlike an ignored signal, a handler is not inherited by other programs.
        signal_hook::flag::register(signal, Arc::default()).map_err(failed)?;
    }
    Ok(())
}

/// From now on the first SIGINT, SIGTERM or SIGHUP lets an image change finish; a second one ends the command at
/// once. The image survives that, but clusters may be leaked.
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
