//! The program `strata` as a library: from a command line to an exit code.
//!
//! Owns which command runs and how its result is reported. Knows no format and no protocol: it connects a disk to a
//! vhost-user session and shows people what happens. `main.rs` only calls it, so that tests reach its parts.
#![forbid(unsafe_code)]

mod capabilities;
mod check;
mod cli;
mod control_door;
mod ctl;
#[doc(hidden)]
pub mod device;
mod device_queue;
mod device_watch;
mod error;
mod gate;
mod handover;
mod held;
mod help;
mod hint;
mod info;
mod limits;
mod listen;
mod log;
mod notify;
mod report;
mod resize;
mod resizer;
mod serve;
mod shutdown;
mod signals;
mod size;
mod snapshot;
mod steering;
mod text;
mod top_pointer;
mod watchdog;

use std::ffi::OsString;
use std::process::ExitCode;

use crate::cli::Command;

/// Runs the command that the arguments name, the program's own name first, and reports how it ended. Wrong usage and
/// requests for help end the process.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = cli::parse(arguments);
    let asks_capabilities = match &cli.command {
        Some(Command::Serve(serve)) => cli.print_capabilities || serve.print_capabilities,
        _ => cli.print_capabilities,
    };
    if asks_capabilities {
        return capabilities::print();
    }
    log::start(cli.log_level.as_ref(), cli.log_format);
    if let Err(error) = signals::outlive() {
        report::show(&error);
        return ExitCode::FAILURE;
    }
    let mut ended_with = ExitCode::SUCCESS;
    let ended = match &cli.command {
        Some(Command::Serve(options)) => serve::run(options),
        Some(Command::Info(options)) => info::run(options),
        Some(Command::Check(options)) => check::run(options).map(|code| ended_with = code),
        Some(Command::Snapshot(options)) => snapshot::run(options),
        Some(Command::Resize(options)) => resize::run(options),
        Some(Command::Ctl(options)) => ctl::run(options),
        None => cli::exit_without_command(),
    };
    match ended {
        Ok(()) => ended_with,
        Err(error) => {
            report::show(&error);
            if cli.command.as_ref().is_some_and(Command::prints_json) {
                // If printing fails, the exit code still tells.
                let _ = text::print(&report::failure(&error).json());
            }
            ExitCode::from(error.exit_code())
        }
    }
}
