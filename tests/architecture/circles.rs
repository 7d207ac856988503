//! Which files of a crate import which, read from their syntax, and the circles among them.
//!
//! Owns the resolution of names to files. It reads `use` items and paths; what stands inside a macro call is not seen.
//! Tests and loom models are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, Meta, UseTree, Visibility};

/// A module of a crate: its file, and what the names in it stand for.
#[derive(Default)]
struct Module {
    file: PathBuf,
    children: BTreeSet<String>,
    defined: BTreeSet<String>,
    /// `use` items: the name that each brings in, and the path that it stands for.
    imports: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
    /// Paths that the module's own code names, re-exports left out.
    named: Vec<Vec<String>>,
}

/// The modules of one crate by their paths from its root. The root's path is empty.
#[derive(Default)]
pub struct Modules(BTreeMap<Vec<String>, Module>);

impl Modules {
    /// Reads a crate from its root file.
    pub fn read(root: &Path) -> Self {
        let mut modules = Self::default();
        let folder = root.parent().expect("a root file lies in a folder").to_owned();
        modules.read_file(Vec::new(), root, &folder);
        modules
    }

    fn read_file(&mut self, path: Vec<String>, file: &Path, children_in: &Path) {
        let text =
            std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let syntax = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.read_items(path, file, children_in, &syntax.items);
    }

    fn read_items(&mut self, path: Vec<String>, file: &Path, children_in: &Path, items: &[Item]) {
        let mut module = Module { file: file.to_owned(), ..Module::default() };
        for item in items {
            match item {
                Item::Mod(child) if is_left_out(&child.attrs) => {}
                Item::Mod(child) => {
                    let name = child.ident.to_string();
                    let path = [path.clone(), vec![name.clone()]].concat();
                    let folder = children_in.join(&name);
                    match &child.content {
                        Some((_, items)) => self.read_items(path, file, &folder, items),
                        None => {
                            let flat = children_in.join(format!("{name}.rs"));
                            let file = if flat.is_file() { flat } else { folder.join("mod.rs") };
                            self.read_file(path, &file, &folder);
                        }
                    }
                    module.children.insert(name);
                }
                Item::Use(import) if is_left_out(&import.attrs) => {}
                Item::Use(import) => module.import(import),
                _ => {
                    module.defined.extend(name_of(item));
                    Paths { named: &mut module.named }.visit_item(item);
                }
            }
        }
        self.0.insert(path, module);
    }

    /// The file that defines what `path`, as named in the module `from`, stands for. None if it is of another crate.
    fn resolve(&self, from: &[String], path: &[String], depth: usize) -> Option<&Path> {
        let (mut at, mut rest) = match path.first()?.as_str() {
            "crate" => (Vec::new(), &path[1..]),
            "self" => (from.to_vec(), &path[1..]),
            "super" => (from.split_last()?.1.to_vec(), &path[1..]),
            _ => (from.to_vec(), path),
        };
        let is_relative = path.len() == rest.len();
        loop {
            let module = self.0.get(&at)?;
            let Some(name) = rest.first() else { return Some(&module.file) };
            if name == "super" {
                at.pop()?;
            } else if module.children.contains(name) {
                at.push(name.clone());
            } else if module.defined.contains(name) {
                // A name in its own module is no import.
                return (!is_relative || at != from).then_some(module.file.as_path());
            } else {
                // Re-exports may lead in a loop.
                if depth == 0 {
                    return None;
                }
                let named = module.imports.get(name).map(|target| [target, &rest[1..]].concat());
                let in_globs = module.globs.iter().map(|target| [target.as_slice(), rest].concat());
                return named
                    .into_iter()
                    .chain(in_globs)
                    .find_map(|path| self.resolve(&at, &path, depth - 1));
            }
            rest = &rest[1..];
        }
    }

    /// For each file the files that it imports. The root file of a folder is the face of what is in the folder. So
    /// an import from a module to one inside it does not count. The way back does.
    pub fn arrows(&self) -> BTreeMap<&Path, BTreeSet<&Path>> {
        let mut arrows: BTreeMap<&Path, BTreeSet<&Path>> = BTreeMap::new();
        for (path, module) in &self.0 {
            let found = module.named.iter().filter_map(|named| self.resolve(path, named, 8));
            let inside: BTreeSet<&Path> = self.inside(path).collect();
            let to = arrows.entry(&module.file).or_default();
            to.extend(found.filter(|file| !inside.contains(file)));
        }
        arrows
    }

    /// The files of a module and of all modules inside it.
    fn inside(&self, path: &[String]) -> impl Iterator<Item = &Path> {
        let within = self.0.iter().filter(move |(other, _)| other.starts_with(path));
        within.map(|(_, module)| module.file.as_path())
    }

    /// The circles: sets of two or more files of which each reaches each other one.
    pub fn circles(&self) -> Vec<BTreeSet<&Path>> {
        let arrows = self.arrows();
        let reach: BTreeMap<&Path, BTreeSet<&Path>> =
            arrows.keys().map(|file| (*file, reached(&arrows, file))).collect();
        let mut circles: BTreeSet<BTreeSet<&Path>> = BTreeSet::new();
        for (file, to) in &reach {
            let circle: BTreeSet<&Path> = to
                .iter()
                .copied()
                .filter(|other| reach.get(other).is_some_and(|back| back.contains(file)))
                .collect();
            if circle.len() > 1 {
                circles.insert(circle);
            }
        }
        circles.into_iter().collect()
    }
}

fn reached<'a>(arrows: &BTreeMap<&'a Path, BTreeSet<&'a Path>>, from: &'a Path) -> BTreeSet<&'a Path> {
    let (mut seen, mut waiting) = (BTreeSet::new(), vec![from]);
    while let Some(file) = waiting.pop() {
        for next in arrows.get(file).into_iter().flatten() {
            if seen.insert(*next) {
                waiting.push(next);
            }
        }
    }
    seen
}

impl Module {
    fn import(&mut self, import: &ItemUse) {
        let mut found = Vec::new();
        flatten(&import.tree, &mut Vec::new(), &mut found);
        for (name, path) in found {
            // A re-export hands a name on: who uses it is joined with whoever defines it.
            if matches!(import.vis, Visibility::Inherited) {
                self.named.push(path.clone());
            }
            match name {
                Some(name) => drop(self.imports.insert(name, path)),
                None => self.globs.push(path),
            }
        }
    }
}

/// Every name that a `use` tree brings in, with its path. A glob has no name.
fn flatten(tree: &UseTree, before: &mut Vec<String>, found: &mut Vec<(Option<String>, Vec<String>)>) {
    let with = |name: &syn::Ident| [before.clone(), vec![name.to_string()]].concat();
    match tree {
        UseTree::Path(path) => {
            before.push(path.ident.to_string());
            flatten(&path.tree, before, found);
            before.pop();
        }
        UseTree::Name(name) if name.ident == "self" => found.push((before.last().cloned(), before.clone())),
        UseTree::Name(name) => found.push((Some(name.ident.to_string()), with(&name.ident))),
        UseTree::Rename(rename) => found.push((Some(rename.rename.to_string()), with(&rename.ident))),
        UseTree::Glob(_) => found.push((None, before.clone())),
        UseTree::Group(group) => group.items.iter().for_each(|item| flatten(item, before, found)),
    }
}

/// Collects the paths that an item names. Test modules inside it are no part of the product.
struct Paths<'a> {
    named: &'a mut Vec<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.named.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_item_use(&mut self, import: &'ast ItemUse) {
        let mut found = Vec::new();
        flatten(&import.tree, &mut Vec::new(), &mut found);
        self.named.extend(found.into_iter().map(|(_, path)| path));
    }
}

/// True for an item that only a test or a loom model compiles.
pub fn is_left_out(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition = list.tokens.to_string();
            !condition.contains("not") && (condition.contains("test") || condition.contains("loom"))
        }
        _ => false,
    })
}

fn name_of(item: &Item) -> Option<String> {
    Some(match item {
        Item::Const(item) => item.ident.to_string(),
        Item::Enum(item) => item.ident.to_string(),
        Item::Fn(item) => item.sig.ident.to_string(),
        Item::Static(item) => item.ident.to_string(),
        Item::Struct(item) => item.ident.to_string(),
        Item::Trait(item) => item.ident.to_string(),
        Item::Type(item) => item.ident.to_string(),
        Item::Union(item) => item.ident.to_string(),
        Item::Macro(item) => item.ident.as_ref()?.to_string(),
        _ => return None,
    })
}
