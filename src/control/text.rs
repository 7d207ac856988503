//! JSON that is safe for any terminal and parser.

use std::fmt::Write as _;

use names::{Name, must_be_escaped};
use serde::Serialize;

/// A name as a JSON value. JSON has no bytes, so bytes that are not UTF-8 become U+FFFD. Never for a message: see
/// [`names::shown`].
pub fn json_name<N: Name + ?Sized>(name: &N) -> String {
    String::from_utf8_lossy(name.name_bytes()).into_owned()
}

/// A value as JSON on several lines. Characters that control a terminal or change the order of text become JSON
/// escapes, so a parser sees the same strings.
pub fn json(value: &impl Serialize) -> String {
    escaped(&serde_json::to_string_pretty(value).expect("the values have text keys and no odd numbers"))
}

/// As [`json`], on one line.
pub fn json_line(value: &impl Serialize) -> String {
    escaped(&serde_json::to_string(value).expect("the values have text keys and no odd numbers"))
}

/// JSON with a line end, and with escapes for what a terminal must not get.
fn escaped(plain: &str) -> String {
    let mut text = String::with_capacity(plain.len() + 1);
    for character in plain.chars() {
        // Line ends belong to the layout: those inside strings are escaped already.
        if character == '\n' || !must_be_escaped(character) {
            text.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            let _ = write!(text, "\\u{unit:04x}");
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_fit_for_a_terminal_and_says_the_same() {
        let name = "a\n\x1b[2J\u{9b}\u{202e}\u{e0041}\"é";
        let text = json(&[name]);
        assert!(text.chars().all(|character| character == '\n' || !must_be_escaped(character)), "{text}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).expect("JSON"), [name]);
        assert_eq!(json(&[json_name(b"a\xff".as_slice())]), "[\n  \"a\u{fffd}\"\n]\n");
        assert_eq!(json_line(&["a\nb"]), "[\"a\\nb\"]\n");
    }
}
