//! The walks of docs/architecture.md: each hop names a file and functions in it, and all of them exist.

use std::collections::BTreeSet;

use syn::visit::{self, Visit};

/// The heading of the section that holds the walks; each walk is a subsection.
const HEADING: &str = "## Four walks";

/// The functions of a source file, methods by their own names.
#[derive(Default)]
struct Functions(BTreeSet<String>);

impl<'ast> Visit<'ast> for Functions {
    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.0.insert(signature.ident.to_string());
        visit::visit_signature(self, signature);
    }
}

/// The parts of a line that stand in backquotes.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// What is wrong with the walks of `text`; `source` gives a file's text, if there is such a file.
fn complaints(text: &str, source: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let section = text.split(HEADING).nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let walks: Vec<&str> = section.split("\n### ").skip(1).collect();
    let mut complaints = Vec::new();
    if walks.len() != 4 {
        complaints.push(format!("{} walks instead of 4", walks.len()));
    }
    for walk in walks {
        let title = walk.lines().next().unwrap_or_default();
        let hops =
            walk.lines().filter(|line| code_spans(line).next().is_some_and(|span| span.ends_with(".rs")));
        let mut count = 0;
        for hop in hops {
            count += 1;
            let mut spans = code_spans(hop);
            let path = spans.next().unwrap_or_default();
            let Some(syntax) = source(path).and_then(|text| syn::parse_file(&text).ok()) else {
                complaints.push(format!("{title}: there is no {path}"));
                continue;
            };
            let mut functions = Functions::default();
            functions.visit_file(&syntax);
            let names: Vec<&str> = spans.map(|span| span.rsplit("::").next().unwrap_or(span)).collect();
            if names.is_empty() {
                complaints.push(format!("{title}: the hop in {path} names no function"));
            }
            let missing = names.into_iter().filter(|name| !functions.0.contains(*name));
            complaints.extend(missing.map(|name| format!("{title}: {path} has no function {name}")));
        }
        if count < 3 {
            complaints.push(format!("{title}: {count} hops"));
        }
    }
    complaints
}

#[test]
fn walks_name_functions_that_exist() {
    let text = crate::read(&crate::root().join("docs/architecture.md"));
    crate::assert_none(complaints(&text, |path| std::fs::read_to_string(crate::root().join(path)).ok()));
}

#[test]
fn the_walk_rule_can_fail() {
    let source =
        |path: &str| (path == "a.rs").then(|| "struct A; impl A { fn go(&self) {} } fn stop() {}".into());
    let walk = |hop: &str| format!("\n### One\n\n1. `a.rs` `A::go`\n2. `a.rs` `stop`\n3. {hop}\n");
    let text = |hop: &str| format!("# X\n{HEADING}\n{}\n## Else\n### Five\n", walk(hop).repeat(4));
    crate::assert_none(complaints(&text("`a.rs`, `stop` and `go`"), source));
    for hop in ["`b.rs` `go`", "`a.rs` `gone`", "`a.rs` alone"] {
        assert_eq!(complaints(&text(hop), source).len(), 4, "{hop}");
    }
    assert_eq!(complaints("", source).len(), 1);
    assert_eq!(complaints(&text("none").replacen("### One", "#### One", 1), source).len(), 4);
}
