//! Text that came from outside, made fit for a terminal.

/// The text with its control characters written as escapes: names in images are untrusted, and a terminal obeys.
pub fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

/// As [`printable`], on one line.
pub fn one_line(text: &str) -> String {
    printable(text).replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_get_no_orders() {
        assert_eq!(printable("a\x1b[2Jb\u{9b}c\nd é"), "a\\u{1b}[2Jb\\u{9b}c\nd é");
        assert_eq!(one_line("a\nb\r"), "a\\nb\\r");
    }
}
