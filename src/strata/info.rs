//! `strata info`: what an image and the layers below it are, for people and for programs.
//!
//! Owns the facts and their JSON, spelled as in `qemu-img info --backing-chain` where it has the same fact. How they look as
//! text is in `text_form`.

mod features;
mod text_form;

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use disk::{Disk, DiskOptions, Layer};
use qcow2::{Header, Incompatible, Version};
use serde::Serialize;
use storage::host::HostStorage;

use crate::cli::{Cache, InfoArgs};
use crate::error::{ProgramError, Purpose};
use crate::info::features::{ExtensionFacts, FeatureFacts};

/// Long enough for the last I/O of a daemon that was just killed, and not so long that one wonders.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// Nothing is read through the map.
const MAP_BYTES: usize = 64 << 10;

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
    #[serde(flatten)]
    qcow2: Option<Qcow2Facts>,
}

/// What only a qcow2 layer has.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Facts {
    /// In bytes.
    cluster_size: u64,
    dirty_flag: bool,
    /// As in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    /// As it was opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    /// As in the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    snapshot_count: u32,
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
    features: FeatureFacts,
    extensions: Vec<ExtensionFacts>,
}

/// Runs the command.
///
/// # Errors
/// When a layer cannot be opened or used, or nobody takes what is printed.
pub fn run(options: &InfoArgs) -> Result<(), ProgramError> {
    let image = &options.image;
    let how = DiskOptions {
        format: options.chain.format.into(),
        backing_format: options.chain.backing_format.map(Into::into),
        read_only: true,
        direct: options.chain.cache == Cache::Direct,
        lock_timeout: LOCK_PATIENCE,
        map_bytes: MAP_BYTES,
        ..DiskOptions::default()
    };
    let failed = |source| ProgramError::Open { image: image.to_owned(), purpose: Purpose::Describe, source };
    let disk = Disk::open(HostStorage::new(), image, &how).map_err(failed)?;
    let layers = gather(&disk).map_err(failed)?;
    let text = if options.json { json(&layers) } else { text_form::chain(&layers) };
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        // Whoever reads, as head does, has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(ProgramError::Print(error)),
        _ => Ok(()),
    }
}

fn gather(disk: &Disk<HostStorage>) -> Result<Vec<LayerFacts>, disk::OpenError> {
    let layers = disk.layers();
    let below = layers.iter().skip(1).map(|layer| Some(layer.path.as_path())).chain([None]);
    let each = layers.iter().zip(below).enumerate();
    each.map(|(index, (layer, below))| Ok(layer_facts(layer, disk.allocated(index)?, below))).collect()
}

fn json(layers: &[LayerFacts]) -> String {
    let mut text = serde_json::to_string_pretty(layers).expect("facts have text keys and no odd values");
    text.push('\n');
    text
}

fn layer_facts(layer: &Layer, actual_size: u64, below: Option<&Path>) -> LayerFacts {
    LayerFacts {
        filename: layer.path.display().to_string(),
        format: if layer.header.is_some() { "qcow2" } else { "raw" },
        virtual_size: layer.size,
        actual_size,
        file_length: layer.file_length,
        qcow2: layer.header.as_ref().map(|header| qcow2_facts(header, below)),
    }
}

fn qcow2_facts(header: &Header, below: Option<&Path>) -> Qcow2Facts {
    let has = |feature| header.incompatible.contains(feature);
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
        features: features::features(header),
        extensions: features::extensions(header),
    };
    Qcow2Facts {
        cluster_size: header.geometry().cluster_size(),
        dirty_flag: has(Incompatible::DIRTY),
        backing_filename: header.backing_file_lossy().map(std::borrow::Cow::into_owned),
        full_backing_filename: below.map(|path| path.display().to_string()),
        backing_filename_format: header.backing_format.clone(),
        snapshot_count: header.snapshots,
        format_specific: FormatSpecific { r#type: "qcow2", data },
    }
}

#[cfg(test)]
mod tests;
