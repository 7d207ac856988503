//! The facts of a chain as text: one block a layer, names to the left, values in a column.

use names::{one_line, shown};

use crate::info::{BitmapFacts, LayerFacts, Qcow2Facts};
use crate::size;

/// The column where the values begin.
const COLUMN: usize = 18;

/// The whole chain, the image first.
pub fn chain(layers: &[LayerFacts]) -> String {
    let count = layers.len();
    let blocks = layers.iter().enumerate().map(|(index, layer)| {
        let mut block = Block::default();
        if count > 1 {
            block.line(
                "layer",
                &format!("{} of {count}{}", index + 1, if index == 0 { ", the image" } else { "" }),
            );
        }
        describe(layer, &mut block);
        block.text
    });
    blocks.collect::<Vec<_>>().join("\n")
}

fn describe(layer: &LayerFacts, block: &mut Block) {
    block.line("file", &shown(&layer.filename).to_string());
    block.line("format", &format_of(layer));
    block.line("virtual size", &size::in_words(layer.virtual_size));
    block.line("on the host", &size::in_words(layer.actual_size));
    block.line("file length", &size::in_words(layer.file_length));
    if let Some(reason) = &layer.not_served {
        block.line("not served", &one_line(reason).to_string());
    }
    if let Some(qcow2) = &layer.qcow2 {
        describe_qcow2(qcow2, block);
    }
}

fn format_of(layer: &LayerFacts) -> String {
    layer.qcow2.as_ref().map_or(layer.format.to_owned(), |qcow2| {
        let data = &qcow2.format_specific.data;
        format!("{}, version {} (compat {})", layer.format, data.version, data.compat)
    })
}

fn describe_qcow2(qcow2: &Qcow2Facts, block: &mut Block) {
    let data = &qcow2.format_specific.data;
    block.line("cluster size", &size::in_words(qcow2.cluster_size));
    block.line("refcount bits", &data.refcount_bits.to_string());
    block.line("compression", data.compression_type);
    if let Some(name) = &qcow2.backing_filename {
        let format = qcow2.backing_filename_format.as_deref().unwrap_or("not recorded");
        block.line("backing file", &shown(name).to_string());
        block.line("backing format", &shown(format).to_string());
    }
    if qcow2.snapshot_count > 0 {
        block.line("snapshots", &qcow2.snapshot_count.to_string());
    }
    for snapshot in &qcow2.snapshots {
        block.line("snapshot", &snapshot.in_a_line());
    }
    if let Some(damage) = &qcow2.snapshots_damaged {
        block.line("snapshots", &one_line(damage).to_string());
    }
    if let Some(name) = &data.data_file {
        let raw = if data.data_file_raw == Some(true) { " (raw)" } else { "" };
        block.line("data file", &format!("{}{raw}", shown(name)));
    }
    for bitmap in &data.bitmaps {
        block.line("bitmap", &describe_bitmap(bitmap));
    }
    if let Some(damage) = &data.bitmaps_damaged {
        block.line("bitmaps", &one_line(damage).to_string());
    }
    let features = &data.features;
    block.list("incompatible", features.incompatible.iter().map(String::as_str));
    block.list("compatible", features.compatible.iter().map(String::as_str));
    block.list("autoclear", features.autoclear.iter().map(String::as_str));
    let extensions: Vec<String> = data
        .extensions
        .iter()
        .map(|extension| match extension.name {
            "unknown" => format!("unknown {:#010x} ({} bytes)", extension.magic, extension.length),
            name => format!("{name} ({} bytes)", extension.length),
        })
        .collect();
    block.list("extensions", extensions.iter().map(String::as_str));
}

fn describe_bitmap(bitmap: &BitmapFacts) -> String {
    let has = |flag| bitmap.flags.contains(&flag);
    let state = match (has("in-use"), has("auto")) {
        (true, _) => "inconsistent: out of date, not to be used",
        (false, true) => "enabled",
        (false, false) => "disabled",
    };
    format!("{}, granularity {}, {state}", shown(&bitmap.name), size::short(bitmap.granularity))
}

#[derive(Default)]
struct Block {
    text: String,
}

impl Block {
    fn line(&mut self, name: &str, value: &str) {
        self.text += &format!("{:<COLUMN$}{value}\n", format!("{name}:"));
    }

    /// Adds a line, but none for an empty list.
    fn list<'a>(&mut self, name: &str, values: impl Iterator<Item = &'a str>) {
        let all: Vec<String> = values.map(|value| shown(value).to_string()).collect();
        if !all.is_empty() {
            self.line(name, &all.join(", "));
        }
    }
}
