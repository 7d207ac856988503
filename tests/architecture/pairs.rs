//! No two bare numbers side by side, in a tuple type or among parameters: a type of its own or a range says which of
//! them is which.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::circles::is_left_out;
use crate::{assert_none, read, relative, sources};

/// Functions that take two numbers of one kind, or make the type that tells them apart.
const ARITHMETIC: &[(&str, &str)] = &[
    // One bound for the product and one for a test.
    ("bounds.rs", "bound"),
    ("bounds.rs", "loom"),
    // The range itself.
    ("src/disk/range.rs", "new"),
    ("src/disk/range.rs", "between"),
];

/// The lines of tuple types with two or more `u64`, and the lines and names of functions with two `u64` parameters side
/// by side. Test modules are left out, and functions whose signature a trait gives.
#[derive(Default)]
struct Pairs {
    tuples: Vec<usize>,
    functions: Vec<(usize, String)>,
}

fn is_bare(of: &syn::Type) -> bool {
    matches!(of, syn::Type::Path(path) if path.path.is_ident("u64"))
}

impl Pairs {
    fn function(&mut self, signature: &syn::Signature) {
        let bare: Vec<bool> = signature
            .inputs
            .iter()
            .map(|input| matches!(input, syn::FnArg::Typed(parameter) if is_bare(&parameter.ty)))
            .collect();
        if bare.windows(2).any(|two| two == [true, true]) {
            self.functions.push((signature.ident.span().start().line, signature.ident.to_string()));
        }
    }
}

impl<'ast> Visit<'ast> for Pairs {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_left_out(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_type_tuple(&mut self, tuple: &'ast syn::TypeTuple) {
        if tuple.elems.iter().filter(|of| is_bare(of)).count() > 1 {
            self.tuples.push(tuple.span().start().line);
        }
        visit::visit_type_tuple(self, tuple);
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig);
        visit::visit_item_fn(self, function);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let of_type = item.trait_.is_none();
        let functions = item.items.iter().filter_map(|item| match item {
            syn::ImplItem::Fn(function) if of_type && !is_left_out(&function.attrs) => Some(&function.sig),
            _ => None,
        });
        functions.for_each(|signature| self.function(signature));
        visit::visit_item_impl(self, item);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        self.function(&function.sig);
        visit::visit_trait_item_fn(self, function);
    }
}

fn complaints(path: &str, text: &str) -> Vec<String> {
    let of_tests = path.contains("/tests/") || path.contains("tests.rs") || path.contains("loom_tests");
    if of_tests {
        return Vec::new();
    }
    let mut pairs = Pairs::default();
    pairs.visit_file(&syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}")));
    let tuple = |line| format!("{path}:{line}: two bare u64 in a tuple: use a range or a struct");
    let is_arithmetic = |name: &str| ARITHMETIC.iter().any(|(file, of)| path.ends_with(file) && name == *of);
    let mixed = pairs.functions.into_iter().filter(|(_, name)| !is_arithmetic(name));
    let function =
        |(line, name)| format!("{path}:{line}: {name} takes two bare u64 side by side: use a type");
    pairs.tuples.into_iter().map(tuple).chain(mixed.map(function)).collect()
}

#[test]
fn numbers_side_by_side_have_types() {
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
    assert_eq!(complain("fn f(offset: u64, length: u64) {}"), 1);
    assert_eq!(complain("impl A { async fn f(&self, a: u64, mut b: u64) {} }"), 1);
    assert_eq!(complain("trait A { fn f(a: u64, b: u64); }"), 1);
    assert_eq!(complain("fn f() { fn g(a: u64, b: u64) {} }"), 1);
    assert_eq!(
        complain("fn f(a: u64, b: u32, c: u64, d: &u64) {}\nimpl A for B { fn f(a: u64, b: u64) {} }"),
        0
    );
    assert_eq!(complain("fn bound(product: u64, tiny: u64) {}"), 1);
    assert_eq!(complaints("src/disk/bounds.rs", "fn bound(product: u64, tiny: u64) {}").len(), 0);
}
