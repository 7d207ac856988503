//! Tests both escapes by property: shown text cannot control a terminal, and a pasted command names exactly the file.
#![allow(clippy::disallowed_types, reason = "a shell reads the quoted names back")]

use std::io::Write as _;
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, Stdio};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[test]
fn terminals_get_no_orders() {
    for (name, text) in [
        ("a\x1b[2Jb\u{9b}c\nd é", "a\\u{1b}[2Jb\\u{9b}c\\nd é"),
        ("a\\nb", "a\\\\nb"),
        ("x\u{202e}y\u{2066}\u{200b}", "x\\u{202e}y\\u{2066}\\u{200b}"),
        ("ordinary name", "ordinary name"),
    ] {
        assert_eq!(shown(name).to_string(), text);
    }
    assert_eq!(shown(b"\xff\xc3".as_slice()).to_string(), "\\xff\\xc3");
    assert_eq!(one_line("a\\n\nb").to_string(), "a\\n\\nb");
}

#[test]
fn commands_stay_plain_where_names_are() {
    let command = ShellCommand::new("strata check").path(Path::new("/var/vm.qcow2"));
    assert_eq!(command.to_string(), "strata check /var/vm.qcow2");
    let command = ShellCommand::new("strata check").path(Path::new("x;reboot"));
    assert_eq!(command.to_string(), "strata check 'x;reboot'");
    assert_eq!(ShellCommand::new("strata check").path("-r").to_string(), "strata check ./-r");
    assert_eq!(ShellCommand::new("x").name("it's").words("-F FORMAT").to_string(), "x 'it'\\''s' -F FORMAT");
    assert_eq!(ShellCommand::new("x").joined("--o ", "a b", "=FILE").to_string(), "x '--o a b=FILE'");
    assert_eq!(ShellCommand::new("x").name("a\n").to_string(), "eval \"$(printf 'x \\047a\\012\\047')\"");
    assert_eq!(ShellCommand::new("x").name("").to_string(), "x ''");
}

/// Names of any bytes but zero, which no file name has; special bytes come often.
fn any_name() -> impl Strategy<Value = Vec<u8>> {
    let odd = prop::sample::select(b"\n\r\t\x1b\x7f'\"\\%$`;&| -*?[~#=!\xc2\x9b\xff".to_vec());
    vec(prop_oneof![odd, 1u8..=255], 1..24)
}

fn is_fit_for_a_terminal(text: &str) -> bool {
    !text.chars().any(must_be_escaped)
}

/// The output of a POSIX shell that runs the commands; their program `show` prints its arguments.
fn run_in_shell(commands: &[String]) -> Vec<u8> {
    let mut script = b"show() { for word; do printf '%s\\000' \"$word\"; done; }\n".to_vec();
    for command in commands {
        script.extend_from_slice(command.as_bytes());
        script.push(b'\n');
    }
    let mut shell = Command::new("sh");
    shell.env("LC_ALL", "C").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = shell.spawn().expect("there is a shell");
    process.stdin.take().expect("piped").write_all(&script).expect("the shell reads");
    let output = process.wait_with_output().expect("the shell ends");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    output.stdout
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_is_shown_is_fit_for_a_terminal(name in any_name()) {
        let text = shown(&name).to_string();
        prop_assert!(is_fit_for_a_terminal(&text), "{text:?}");
        let foreign = String::from_utf8_lossy(&name).into_owned();
        prop_assert!(is_fit_for_a_terminal(&one_line(&foreign).to_string()));
    }

    #[test]
    fn different_names_look_different(one in any_name(), other in any_name()) {
        prop_assert_eq!(one == other, shown(&one).to_string() == shown(&other).to_string());
    }

    #[test]
    fn a_shell_reads_the_names_back(names in vec(any_name(), 16)) {
        let (mut commands, mut expected) = (Vec::new(), Vec::new());
        for name in &names {
            let path = OsString::from_vec(name.clone());
            let command = ShellCommand::new("show").name(name).path(&path).joined("--option=", name, "=FILE");
            commands.push(command.to_string());
            expected.extend_from_slice(&[name, b"\0".as_slice()].concat());
            let lead = if name.starts_with(b"-") { "./" } else { "" };
            expected.extend_from_slice(&[lead.as_bytes(), name, b"\0--option=", name, b"=FILE\0"].concat());
        }
        prop_assert!(commands.iter().all(|command| is_fit_for_a_terminal(command)));
        prop_assert_eq!(run_in_shell(&commands), expected);
    }
}
