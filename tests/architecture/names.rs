//! Names reach people through the crate `names` only: nothing else in src makes text of a path or of foreign bytes.

use proc_macro2::{TokenStream, TokenTree};

/// Functions that make text of a name without escapes.
const BARE: &[&str] = &["display", "from_utf8_lossy", "to_string_lossy", "escape_debug"];
/// Files in which a lossy text is a value and no message.
const LOSSY_VALUES: &[&str] = &["src/control/text.rs", "src/qcow2/extension.rs"];

/// Every call of a function of `BARE`, macros and attributes included, up to the first `#[cfg(test)]` of each level.
fn calls(tokens: TokenStream, found: &mut Vec<(usize, String)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) if group.stream().to_string() == "cfg (test)" => return,
            TokenTree::Group(group) => calls(group.stream(), found),
            TokenTree::Ident(name) if BARE.contains(&name.to_string().as_str()) => {
                if matches!(tokens.get(at + 1), Some(TokenTree::Group(_))) {
                    found.push((name.span().start().line, name.to_string()));
                }
            }
            _ => {}
        }
    }
}

fn complaints(path: &str, text: &str) -> Vec<String> {
    let of_tests = path.contains("/tests/") || path.ends_with("tests.rs");
    if of_tests || path.contains("/sim/") || path.contains("_sim/") || path.starts_with("src/names/") {
        return Vec::new();
    }
    let mut found = Vec::new();
    calls(text.parse().unwrap_or_else(|error| panic!("{path}: {error}")), &mut found);
    let is_value = |name: &str| name.contains("lossy") && LOSSY_VALUES.contains(&path);
    let bare = found.into_iter().filter(|(_, name)| !is_value(name));
    bare.map(|(line, name)| format!("{path}:{line}: {name} of a name: use names::shown or ShellCommand"))
        .collect()
}

#[test]
fn names_are_shown_by_one_crate() {
    let files = crate::sources(&["src"]);
    crate::assert_none(
        files.iter().flat_map(|path| complaints(&crate::relative(path), &crate::read(path))).collect(),
    );
}

#[test]
fn the_name_rule_can_fail() {
    let complain = |path: &str, text: &str| complaints(path, text).len();
    assert_eq!(complain("src/disk/x.rs", "fn f() { warn!(path = %path.display()) }"), 1);
    assert_eq!(complain("src/disk/x.rs", "#[error(\"{}\", String::from_utf8_lossy(name))] struct E;"), 1);
    assert_eq!(complain("src/disk/x.rs", "// path.display()\nconst A: &str = \"path.display()\";"), 0);
    assert_eq!(complain("src/disk/x.rs", "#[cfg(test)]\nmod tests { fn f() { path.display() } }"), 0);
    assert_eq!(complain("src/control/text.rs", "fn f() { String::from_utf8_lossy(name) }"), 0);
    assert_eq!(complain("src/control/text.rs", "fn f() { path.display() }"), 1);
}
