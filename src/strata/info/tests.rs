//! Tests the facts of made-up headers.

use super::*;
use disk::Layer;
use qcow2::{Extension, Geometry, NewImage, extension};

/// A header as `NewImage` writes it, then changed.
fn header(change: impl FnOnce(&mut Header)) -> Header {
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        size: 1 << 30,
    };
    let mut image = NewImage::new(geometry);
    (image.backing_file, image.backing_format) = (Some(b"base\x1b.raw".to_vec()), Some("raw".into()));
    let layout = image.layout().expect("a right geometry");
    let mut header = Header::parse(&layout[0].1, 1 << 20).expect("what was written is read");
    change(&mut header);
    header
}

fn facts(header: Header) -> LayerFacts {
    let layer =
        Layer { path: "top.qcow2".into(), size: header.size, header: Some(header), file_length: 262_144 };
    layer_facts(&LayerDescription {
        layer,
        allocated: 200_704,
        unsupported: None,
        bitmaps: Ok(Vec::new()),
        snapshots: Ok(Vec::new()),
        backing: Some("/images/base.raw".into()),
    })
}

#[test]
fn json_has_the_keys_of_qemu_img() {
    let text = json(&vec![facts(header(|_| {}))]);
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let layer = &value[0];
    assert_eq!(layer["filename"], "top.qcow2");
    assert_eq!(layer["format"], "qcow2");
    assert_eq!(layer["virtual-size"], 1 << 30);
    assert_eq!(layer["actual-size"], 200_704);
    assert_eq!(layer["cluster-size"], 65536);
    assert_eq!(layer["dirty-flag"], false);
    assert_eq!(layer["backing-filename"], "base\x1b.raw");
    assert_eq!(layer["full-backing-filename"], "/images/base.raw");
    assert_eq!(layer["backing-filename-format"], "raw");
    assert_eq!(layer["format-specific"]["type"], "qcow2");
    let data = &layer["format-specific"]["data"];
    assert_eq!((&data["compat"], &data["refcount-bits"]), (&"1.1".into(), &16.into()));
    assert_eq!((&data["compression-type"], &data["lazy-refcounts"]), (&"zlib".into(), &false.into()));
    assert_eq!(data["extensions"][0]["name"], "backing format");
}

#[test]
fn a_raw_layer_has_no_qcow2_keys() {
    let layer = Layer { path: "d.img".into(), size: 512, header: None, file_length: 600 };
    let description = LayerDescription {
        layer,
        allocated: 4096,
        unsupported: None,
        bitmaps: Ok(Vec::new()),
        snapshots: Ok(Vec::new()),
        backing: None,
    };
    let value = serde_json::to_value(layer_facts(&description)).expect("JSON");
    let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["actual-size", "file-length", "filename", "format", "virtual-size"]);
}

#[test]
fn features_have_names() {
    let mut names = vec![0; 96];
    names[..11].copy_from_slice(b"\x01\x05fast\x1bmode");
    names[48..50].copy_from_slice(&[2, 40]);
    let facts = facts(header(|header| {
        header.incompatible = Incompatible::DIRTY.with(Incompatible::CORRUPT);
        header.compatible = 1 | 1 << 5 | 1 << 63;
        header.autoclear = 1 | 1 << 40;
        header.extensions.push(Extension { magic: extension::FEATURE_NAMES, data: names });
        header.extensions.push(Extension { magic: 0x1234, data: vec![0; 5] });
    }));
    let qcow2 = facts.qcow2.as_ref().expect("a qcow2 layer");
    let features = &qcow2.format_specific.data.features;
    assert_eq!(features.incompatible, ["dirty", "corrupt"]);
    assert_eq!(features.compatible, ["lazy refcounts", "fast\x1bmode (bit 5)", "bit 63"]);
    assert_eq!(features.autoclear, ["bitmaps", "bit 40"]);
    assert!(qcow2.dirty_flag && qcow2.format_specific.data.corrupt);
    let text = text_form::chain(&[facts]);
    assert!(text.contains("compatible:       lazy refcounts, fast\\u{1b}mode (bit 5), bit 63\n"), "{text}");
    assert!(text.contains("unknown 0x00001234 (5 bytes)"), "{text}");
    assert!(text.contains("backing file:     base\\u{1b}.raw\n"), "{text}");
    assert!(!text.contains('\x1b') && text.lines().all(|line| !line.ends_with(' ')));
}

#[test]
fn the_number_of_a_journal_is_one_feature() {
    let facts = facts(header(|header| header.autoclear = 1 | 0x53 << 56 | 0xabc << 2));
    let features = &facts.qcow2.as_ref().expect("a qcow2 layer").format_specific.data.features;
    assert_eq!(features.autoclear, ["bitmaps", "Strata's journal"]);
}

#[test]
fn layers_are_numbered_only_in_a_chain() {
    let text = text_form::chain(&[facts(header(|_| {}))]);
    assert!(
        text.starts_with("file:             top.qcow2\nformat:           qcow2, version 3 (compat 1.1)\n")
    );
    let text = text_form::chain(&[facts(header(|_| {})), facts(header(|_| {}))]);
    assert!(text.starts_with("layer:            1 of 2, the image\n"), "{text}");
    assert!(text.contains("\n\nlayer:            2 of 2\n"), "{text}");
}
