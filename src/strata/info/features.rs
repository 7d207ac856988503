//! Names of feature bits and header extensions (spec: "Header", "Header extensions", "Feature name table").

use qcow2::feature::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, COMPATIBLE_LAZY_REFCOUNTS, autoclear_with_journal,
};
use qcow2::{Header, Incompatible, extension};
use serde::Serialize;

use crate::text::json_name;

/// Bytes of an entry in the feature name table: type, bit number, name.
const NAME_ENTRY: usize = 48;

/// The features that are set, by name.
#[derive(Debug, PartialEq, Serialize)]
pub struct FeatureFacts {
    /// A program that does not know one of these must not open the image.
    pub incompatible: Vec<String>,
    /// A program that does not know these may ignore them.
    pub compatible: Vec<String>,
    /// A program that does not know these clears them when it writes.
    pub autoclear: Vec<String>,
}

/// A header extension.
#[derive(Debug, PartialEq, Serialize)]
pub struct ExtensionFacts {
    /// What it holds.
    pub name: &'static str,
    /// Its type.
    pub magic: u32,
    /// Bytes of its data.
    pub length: usize,
}

/// One of the three fields, numbered as in the feature name table.
#[derive(Clone, Copy)]
enum Field {
    Incompatible = 0,
    Compatible = 1,
    Autoclear = 2,
}

/// The features that a header sets.
pub fn features(header: &Header) -> FeatureFacts {
    let known = [
        (Incompatible::DIRTY.0, "dirty"),
        (Incompatible::CORRUPT.0, "corrupt"),
        (Incompatible::DATA_FILE.0, "external data file"),
        (Incompatible::COMPRESSION.0, "compression type"),
        (Incompatible::EXTENDED_L2.0, "extended L2 entries"),
    ];
    let autoclear = [(AUTOCLEAR_BITMAPS, "bitmaps"), (AUTOCLEAR_RAW_DATA_FILE, "raw external data")];
    let journal = header.journal_number();
    let set =
        if journal.is_some() { autoclear_with_journal(header.autoclear, None) } else { header.autoclear };
    let mut autoclear_names = names(header, Field::Autoclear, set, &autoclear);
    autoclear_names.extend(journal.map(|_| "Strata's journal".to_owned()));
    FeatureFacts {
        incompatible: names(header, Field::Incompatible, header.incompatible.0, &known),
        compatible: names(
            header,
            Field::Compatible,
            header.compatible,
            &[(COMPATIBLE_LAZY_REFCOUNTS, "lazy refcounts")],
        ),
        autoclear: autoclear_names,
    }
}

fn names(header: &Header, field: Field, bits: u64, known: &[(u64, &str)]) -> Vec<String> {
    let set = (0..64u8).filter(|bit| bits >> bit & 1 == 1);
    set.map(|bit| {
        let ours = known.iter().find(|(mask, _)| *mask == 1 << bit);
        ours.map(|(_, name)| (*name).to_owned())
            .or_else(|| name_in_image(header, field, bit).map(|name| format!("{name} (bit {bit})")))
            .unwrap_or_else(|| format!("bit {bit}"))
    })
    .collect()
}

/// The name that the image itself records for a bit.
fn name_in_image(header: &Header, field: Field, bit: u8) -> Option<String> {
    let tables = header.extensions.iter().filter(|extension| extension.magic == extension::FEATURE_NAMES);
    let mut entries = tables.flat_map(|table| table.data.as_chunks::<NAME_ENTRY>().0);
    let entry = entries.find(|entry| entry[..2] == [field as u8, bit])?;
    let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
    (!name.is_empty()).then(|| json_name(name))
}

/// A header's extensions, in file order.
pub fn extensions(header: &Header) -> Vec<ExtensionFacts> {
    let facts = |extension: &qcow2::Extension| ExtensionFacts {
        name: extension_name(extension.magic),
        magic: extension.magic,
        length: extension.data.len(),
    };
    header.extensions.iter().map(facts).collect()
}

fn extension_name(magic: u32) -> &'static str {
    match magic {
        extension::BACKING_FORMAT => "backing format",
        extension::FEATURE_NAMES => "feature names",
        extension::BITMAPS => "bitmaps",
        extension::ENCRYPTION_HEADER => "encryption header",
        extension::DATA_FILE => "external data file",
        _ => "unknown",
    }
}
