//! `strata info`: describes an image and the layers below it, for people and for programs.
//!
//! Owns the facts and their JSON, spelled as in `qemu-img info --backing-chain` where that has the same fact. The
//! text form is in `text_form`.

mod features;
mod text_form;

use std::time::Duration;

use disk::check::Sharing;
use disk::{DiskOptions, LayerDescription};
use qcow2::{Bitmap, Header, Incompatible, Version};
use serde::Serialize;

use crate::cli::{Cache, InfoArgs};
use crate::error::{ProgramError, Purpose};
use crate::info::features::{ExtensionFacts, FeatureFacts};
use crate::snapshot::SnapshotFacts;
use crate::text::{json, json_name, print};

/// Long enough for the last I/O of a daemon that was just killed, short enough that people do not wonder.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// A layer.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct LayerFacts {
    filename: String,
    format: &'static str,
    /// Bytes of the guest's disk.
    virtual_size: u64,
    /// Bytes that the host has allocated for the file.
    actual_size: u64,
    /// The file's length in bytes.
    file_length: u64,
    /// Why the image cannot be served.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_served: Option<String>,
    #[serde(flatten)]
    qcow2: Option<Qcow2Facts>,
}

/// Facts that only qcow2 layers have.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Facts {
    /// In bytes.
    cluster_size: u64,
    dirty_flag: bool,
    /// As in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    /// As it is opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    /// As in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    snapshot_count: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotFacts>,
    /// Why the snapshot table cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots_damaged: Option<String>,
    format_specific: FormatSpecific,
}

#[derive(Debug, PartialEq, Serialize)]
struct FormatSpecific {
    r#type: &'static str,
    data: Specifics,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Specifics {
    /// QEMU's name of the version: 0.10 is 2, 1.1 is 3.
    compat: &'static str,
    version: u32,
    compression_type: &'static str,
    lazy_refcounts: bool,
    refcount_bits: u32,
    corrupt: bool,
    extended_l2: bool,
    /// The name in the header; the file is opened only where the user names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<BitmapFacts>,
    /// Why the bitmaps cannot be listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps_damaged: Option<String>,
    features: FeatureFacts,
    extensions: Vec<ExtensionFacts>,
}

#[derive(Debug, PartialEq, Serialize)]
struct BitmapFacts {
    name: String,
    /// Bytes that one bit covers.
    granularity: u64,
    /// `in-use`: out of date, not to be trusted. `auto`: enabled, every writer must keep it up to date.
    flags: Vec<&'static str>,
}

/// Runs the command.
///
/// # Errors
/// When a layer cannot be opened or used, or the result cannot be printed.
pub fn run(options: &InfoArgs) -> Result<(), ProgramError> {
    let image = &options.image;
    let how = DiskOptions {
        format: options.chain.format.into(),
        backing_format: options.chain.backing_format.map(Into::into),
        read_only: true,
        direct: options.chain.cache == Cache::Direct,
        lock_timeout: options.lock.timeout(LOCK_PATIENCE),
        ..DiskOptions::default()
    };
    let storage =
        options.lock.storage().confined(&options.chain.chain_root).map_err(ProgramError::ChainRoot)?;
    let sharing = if options.force_share { Sharing::All } else { Sharing::Readers };
    let failed = |source| ProgramError::Open { image: image.to_owned(), purpose: Purpose::Info, source };
    let layers = disk::describe(&storage, image, &how, sharing, options.backing_chain).map_err(failed)?;
    let layers: Vec<LayerFacts> = layers.iter().map(layer_facts).collect();
    let text = match (options.output.is_json(), options.backing_chain) {
        (true, true) => json(&layers),
        (true, false) => json(&layers[0]),
        (false, _) => text_form::chain(&layers),
    };
    print(&text).map_err(ProgramError::Print)
}

fn layer_facts(description: &LayerDescription) -> LayerFacts {
    let LayerDescription { layer, allocated, unsupported, .. } = description;
    LayerFacts {
        filename: json_name(&layer.path),
        format: if layer.header.is_some() { "qcow2" } else { "raw" },
        virtual_size: layer.size,
        actual_size: *allocated,
        file_length: layer.file_length,
        not_served: unsupported.as_ref().map(ToString::to_string),
        qcow2: layer.header.as_ref().map(|header| qcow2_facts(header, description)),
    }
}

fn qcow2_facts(header: &Header, description: &LayerDescription) -> Qcow2Facts {
    let LayerDescription { bitmaps, snapshots, backing, .. } = description;
    let has = |feature| header.incompatible.contains(feature);
    let data_file = has(Incompatible::DATA_FILE);
    let raw = header.autoclear & qcow2::feature::AUTOCLEAR_RAW_DATA_FILE != 0;
    let data = Specifics {
        compat: match header.version {
            Version::V2 => "0.10",
            Version::V3 => "1.1",
        },
        version: header.version.number(),
        compression_type: match header.compression_type {
            0 => "zlib",
            1 => "zstd",
            _ => "unknown",
        },
        lazy_refcounts: header.compatible & qcow2::feature::COMPATIBLE_LAZY_REFCOUNTS != 0,
        refcount_bits: 1 << header.refcount_order,
        corrupt: has(Incompatible::CORRUPT),
        extended_l2: has(Incompatible::EXTENDED_L2),
        data_file: if data_file { header.data_file_name().map(json_name) } else { None },
        data_file_raw: data_file.then_some(raw),
        bitmaps: bitmaps.iter().flatten().map(bitmap_facts).collect(),
        bitmaps_damaged: bitmaps.as_ref().err().map(ToString::to_string),
        features: features::features(header),
        extensions: features::extensions(header),
    };
    Qcow2Facts {
        cluster_size: header.geometry().cluster_size(),
        dirty_flag: has(Incompatible::DIRTY),
        backing_filename: header.backing_file.as_ref().map(json_name),
        full_backing_filename: backing.as_ref().map(json_name),
        backing_filename_format: header.backing_format.clone(),
        snapshot_count: header.snapshots,
        snapshots: snapshots.iter().flatten().map(SnapshotFacts::new).collect(),
        snapshots_damaged: snapshots.as_ref().err().map(ToString::to_string),
        format_specific: FormatSpecific { r#type: "qcow2", data },
    }
}

fn bitmap_facts(bitmap: &Bitmap) -> BitmapFacts {
    let flags = [(bitmap.is_in_use(), "in-use"), (bitmap.is_auto(), "auto")];
    BitmapFacts {
        name: json_name(&bitmap.name),
        granularity: bitmap.granularity(),
        flags: flags.into_iter().filter(|(set, _)| *set).map(|(_, name)| name).collect(),
    }
}

#[cfg(test)]
mod tests;
