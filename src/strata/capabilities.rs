//! What this backend can do, in the form of QEMU's conventions for backend programs.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

/// The optional parts of the block backend conventions that the program supports.
const FEATURES: [&str; 2] = ["read-only", "blk-file"];

#[derive(Serialize)]
struct Capabilities {
    r#type: &'static str,
    features: [&'static str; 2],
}

/// One line of JSON.
fn json() -> String {
    let capabilities = Capabilities { r#type: "block", features: FEATURES };
    serde_json::to_string(&capabilities).expect("two strings and a list of strings are JSON")
}

/// Prints the capabilities. Fails only if they cannot be written.
pub fn print() -> ExitCode {
    match writeln!(std::io::stdout(), "{}", json()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_is_that_of_the_conventions() {
        assert_eq!(json(), r#"{"type":"block","features":["read-only","blk-file"]}"#);
    }
}
