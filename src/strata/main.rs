//! The program `strata`: hands its command line to the library of the same name.
#![forbid(unsafe_code)]

use std::process::ExitCode;

// Cargo unites features: building the program together with tests that use tiny bounds would enable them here, too.
const _: () = assert!(
    !disk::bounds::ARE_TINY && !vhost_blk::bounds::ARE_TINY,
    "the feature tiny-bounds is for tests: build the program without it"
);

fn main() -> ExitCode {
    strata::run(std::env::args_os())
}
