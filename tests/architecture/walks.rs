//! The section "Four walks" of docs/architecture.md: each file and each function that a walk names is there.
//!
//! A walk is a `###` heading with a list of hops. A hop names one file by its path from `src`, then one or more
//! functions of it, each as `name` or `Type::name`. A walk leads downwards, so it names each file once.

use std::collections::BTreeSet;

use syn::visit::{self, Visit};

use crate::circles::is_left_out;
use crate::{assert_none, read, root};

/// The heading of the section.
const HEADING: &str = "## Four walks";
/// The heading of each walk.
const WALKS: [&str; 4] =
    ["### A read", "### An allocating write over a backing file", "### A flush", "### A discard"];
/// The least number of hops of a walk.
const HOPS_MIN: usize = 3;

/// A walk: its heading, and the text of each hop.
struct Walk {
    heading: String,
    hops: Vec<String>,
}

/// The walks of the section, or none if the page lacks the section.
fn walks(page: &str) -> Vec<Walk> {
    let section = page.lines().skip_while(|line| *line != HEADING).skip(1);
    let mut walks: Vec<Walk> = Vec::new();
    for line in section.take_while(|line| !line.starts_with("## ")) {
        if line.starts_with("###") {
            walks.push(Walk { heading: line.to_owned(), hops: Vec::new() });
        } else if let Some(walk) = walks.last_mut() {
            if is_item(line) {
                walk.hops.push(line.to_owned());
            } else if let (true, Some(hop)) = (line.starts_with(' '), walk.hops.last_mut()) {
                hop.push_str(line);
            }
        }
    }
    walks
}

/// True for the first line of an item of a list.
fn is_item(line: &str) -> bool {
    line.starts_with("- ") || line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok())
}

/// The names of all functions in a source, test modules left out: of methods also with their type before them.
#[derive(Default)]
struct Functions {
    named: BTreeSet<String>,
    of: Option<String>,
}

impl Functions {
    fn of(source: &str) -> syn::Result<BTreeSet<String>> {
        let mut functions = Self::default();
        functions.visit_file(&syn::parse_file(source)?);
        Ok(functions.named)
    }

    fn method(&mut self, name: &syn::Ident) {
        self.named.insert(name.to_string());
        self.named.extend(self.of.as_ref().map(|of| format!("{of}::{name}")));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_left_out(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.named.insert(function.sig.ident.to_string());
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if let syn::Type::Path(of) = &*item.self_ty {
            self.of = of.path.segments.last().map(|segment| segment.ident.to_string());
        }
        visit::visit_item_impl(self, item);
        self.of = None;
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.of = Some(item.ident.to_string());
        visit::visit_item_trait(self, item);
        self.of = None;
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.method(&function.sig.ident);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        self.method(&function.sig.ident);
    }
}

/// What is wrong with the walks of a page. `source` returns the text of a file under `src`, if there is one.
fn complaints(page: &str, source: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let walks = walks(page);
    let headings: Vec<&str> = walks.iter().map(|walk| walk.heading.as_str()).collect();
    if headings != WALKS {
        return vec![format!("{HEADING}: the walks are {headings:?}, not {WALKS:?}")];
    }
    walks.iter().flat_map(|walk| walk_complaints(walk, source)).collect()
}

fn walk_complaints(walk: &Walk, source: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let heading = &walk.heading;
    let mut complaints = Vec::new();
    if walk.hops.len() < HOPS_MIN {
        complaints.push(format!("{heading}: {} hops, fewer than {HOPS_MIN}", walk.hops.len()));
    }
    let mut files = BTreeSet::new();
    for hop in &walk.hops {
        let spans: Vec<&str> = hop.split('`').skip(1).step_by(2).collect();
        let [path, functions @ ..] = spans.as_slice() else {
            complaints.push(format!("{heading}: a hop names no file: {hop}"));
            continue;
        };
        if functions.is_empty() {
            complaints.push(format!("{heading}: {path}: the hop names no function"));
        }
        if !files.insert(*path) {
            complaints.push(format!("{heading}: {path}: the walk is there twice"));
        }
        let Some(text) = source(path).filter(|_| path.ends_with(".rs")) else {
            complaints.push(format!("{heading}: {path}: no source under src"));
            continue;
        };
        let defined = Functions::of(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
        let missing = functions.iter().filter(|name| !defined.contains(**name));
        complaints.extend(missing.map(|name| format!("{heading}: {path}: defines no function {name}")));
    }
    complaints
}

#[test]
fn the_walks_name_functions_that_exist() {
    let source = |path: &str| {
        let path = root().join("src").join(path);
        path.is_file().then(|| read(&path))
    };
    assert_none(complaints(&read(&root().join("docs/architecture.md")), &source));
}

#[test]
fn the_walk_rule_can_fail() {
    let source = |path: &str| {
        let text = match path {
            "a/ring.rs" => "pub fn pop() {}\n#[cfg(test)]\nmod tests { fn only_in_a_test() {} }",
            "a/queue.rs" => {
                "impl<S: Storage> Queue<S> { fn take(&self) {} }\ntrait Serves { fn begin(&self); }"
            }
            "a/file.rs" => "mod inner { pub async fn read() {} }",
            _ => return None,
        };
        Some(text.to_owned())
    };
    let hops = [
        "1. `a/ring.rs` `pop`: takes a chain.",
        "2. `a/queue.rs` `Queue::take`, `take`,\n   `Serves::begin`: begins.",
        "3. `a/file.rs` `read`: reads.",
    ];
    let page = |hops: &[&str]| {
        let walks = WALKS.map(|heading| format!("{heading}\n\nText with `code`.\n\n{}\n", hops.join("\n")));
        format!("# Page\n\n{HEADING}\n\n{}\n## Next\n\n- `none`\n", walks.join("\n"))
    };
    let complain = |hops: &[&str]| complaints(&page(hops), &source).len();
    assert_none(complaints(&page(&hops), &source));
    assert_eq!(complain(&hops[..2]), 4, "too few hops in each of the four walks");
    let wrong = [
        "4. `a/none.rs` `pop`: the file is missing.",
        "4. `a/file.rs` `read`: the file comes twice.",
        "4. It names no file.",
    ];
    for hop in wrong {
        assert_eq!(complain(&[hops[0], hops[1], hops[2], hop]), 4, "{hop}");
    }
    let wrong = [
        "3. `a/file.rs`: no function.",
        "3. `a/file.rs` `write`: no such function.",
        "3. `a/file.rs` `File::read`: of no such type.",
    ];
    for hop in wrong {
        assert_eq!(complain(&[hops[0], hops[1], hop]), 4, "{hop}");
    }
    assert_eq!(complain(&["1. `a/ring.rs` `only_in_a_test`", hops[1], hops[2]]), 4);
    assert_eq!(complaints(&page(&hops).replace("### A flush", "### A trim"), &source).len(), 1);
    assert_eq!(complaints("# Page\n", &source).len(), 1);
}
