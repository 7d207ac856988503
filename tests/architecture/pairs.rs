//! No two bare numbers in a tuple type: a struct or a range says which of them is which.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::circles::is_left_out;
use crate::{assert_none, read, relative, sources};

/// The lines of tuple types with two or more `u64`, test modules left out.
#[derive(Default)]
struct Pairs(Vec<usize>);

impl<'ast> Visit<'ast> for Pairs {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_left_out(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_type_tuple(&mut self, tuple: &'ast syn::TypeTuple) {
        let is_bare = |of: &&syn::Type| matches!(of, syn::Type::Path(path) if path.path.is_ident("u64"));
        if tuple.elems.iter().filter(is_bare).count() > 1 {
            self.0.push(tuple.span().start().line);
        }
        visit::visit_type_tuple(self, tuple);
    }
}

fn complaints(path: &str, text: &str) -> Vec<String> {
    let of_tests = path.contains("/tests/") || path.contains("tests.rs") || path.contains("loom_tests");
    if of_tests {
        return Vec::new();
    }
    let mut pairs = Pairs::default();
    pairs.visit_file(&syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}")));
    let complaint = |line| format!("{path}:{line}: two bare u64 in a tuple: use a range or a struct");
    pairs.0.into_iter().map(complaint).collect()
}

#[test]
fn numbers_in_tuples_have_types() {
    let files = sources(&["src"]);
    assert_none(files.iter().flat_map(|path| complaints(&relative(path), &read(path))).collect());
}

#[test]
fn the_rule_of_pairs_can_fail() {
    let complain = |text: &str| complaints("src/disk/x.rs", text).len();
    assert_eq!(complain("pub fn f() -> (u64, u64) { (1, 2) }"), 1);
    assert_eq!(complain("struct A { b: Vec<(HostOffset, u64, u64)> }"), 1);
    assert_eq!(complain("fn f(_: (HostOffset, u64), _: (u64, u32)) {}"), 0);
    assert_eq!(complain("#[cfg(test)]\nmod tests { fn f() -> (u64, u64) { (1, 2) } }"), 0);
    assert_eq!(complaints("src/disk/tests/x.rs", "fn f() -> (u64, u64) { (1, 2) }").len(), 0);
}
