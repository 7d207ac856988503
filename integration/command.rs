//! Runs a program to its end and reports failures.
//!
//! Owns the wording of a helper program's failure, and the search for programs. It never runs a program in the
//! background: `daemon` and `machine` do.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Runs `command`, which must exit with code 0, and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = capture(command)?;
    if !output.status.success() {
        bail!("{}", failure(command, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command` and accepts any exit code: only a program that cannot be started is an error.
pub fn capture(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("cannot start {}", shown(command)))
}

/// Describes a failed run: the command line, the exit status and the last lines of output.
pub fn failure(command: &Command, output: &Output) -> String {
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    format!("{} ended with {}:\n{}", shown(command), output.status, tail(&String::from_utf8_lossy(said), 20))
}

/// The command line as a user could type it.
pub fn shown(command: &Command) -> String {
    words(command).join(" ")
}

/// The command line with a line for each option.
pub fn shown_in_lines(command: &Command) -> String {
    let mut text = String::new();
    for word in words(command) {
        let separator = match (text.is_empty(), word.starts_with('-')) {
            (true, _) => "",
            (false, true) => " \\\n    ",
            (false, false) => " ",
        };
        text.push_str(separator);
        text.push_str(&word);
    }
    text
}

fn words(command: &Command) -> Vec<String> {
    std::iter::once(command.get_program()).chain(command.get_args()).map(quoted).collect()
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// The path of a program. Searches the folders of administrators' tools too, which a user's PATH often lacks.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// The program of a target, from cargo's messages with `--message-format json-render-diagnostics`. For a `bin` it is
/// the program itself and not its unit tests.
pub fn built_program(messages: &str, kind: &str, name: &str) -> Option<PathBuf> {
    let is_it = |message: &Value| {
        let unit_tests = kind == "bin" && message["profile"]["test"] == true;
        message["target"]["kind"][0] == kind && message["target"]["name"] == name && !unit_tests
    };
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages.filter(is_it).find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_accepts_a_command_line_as_shown() {
        let mut command = Command::new("qemu-io");
        command.args(["-c", "write -P 0x11 0 64k", "it's.qcow2"]);
        assert_eq!(shown(&command), r"qemu-io -c 'write -P 0x11 0 64k' 'it'\''s.qcow2'");
        let lines = "qemu-io \\\n    -c 'write -P 0x11 0 64k' 'it'\\''s.qcow2'";
        assert_eq!(shown_in_lines(&command), lines);
    }

    #[test]
    fn a_program_is_distinguished_from_its_unit_tests_and_other_targets() {
        let message = |kind: &str, name: &str, test: bool, path: &str| {
            format!(
                r#"{{"target":{{"kind":["{kind}"],"name":"{name}"}},"profile":{{"test":{test}}},"executable":{path}}}"#
            )
        };
        let messages = [
            "no JSON".to_owned(),
            message("lib", "a", false, "null"),
            message("bin", "a", true, r#""/deps/a-1""#),
            message("bin", "b", false, r#""/b""#),
            message("bin", "a", false, r#""/a""#),
            message("bench", "c", true, r#""/deps/c-1""#),
        ]
        .join("\n");
        assert_eq!(built_program(&messages, "bin", "a"), Some(PathBuf::from("/a")));
        assert_eq!(built_program(&messages, "bench", "c"), Some(PathBuf::from("/deps/c-1")));
        assert_eq!(built_program(&messages, "bin", "c"), None);
        assert_eq!(built_program(&messages, "lib", "a"), None);
    }

    #[test]
    fn the_tail_is_at_most_the_whole_text() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a", 5), "a");
    }
}
