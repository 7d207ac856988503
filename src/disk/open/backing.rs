//! Backing files by the name in a header: which file is meant, and in which format it is.
//!
//! Owns which names are accepted. They mean only files: plain names, and those of QEMU's `json:` names that hold only
//! a format and a file. This module opens nothing and guesses no format.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use qcow2::Header;
use serde::Deserialize;

use crate::error::{BackingNameError, OpenError};
use crate::options::Format;

/// The prefix of QEMU's description of a node in JSON.
const JSON: &[u8] = b"json:";
/// The prefix of a file's name in place of a protocol.
const FILE: &[u8] = b"file:";
/// QEMU's driver of files.
const FILE_DRIVER: &str = "file";

/// A file to open as a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerFile {
    pub path: PathBuf,
    pub format: Format,
    /// Its overlay records its format; otherwise the user names it.
    pub recorded: bool,
}

/// The accepted part of QEMU's description of a node. Any other field would change which bytes are read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Node {
    driver: String,
    file: Option<NodeFile>,
    #[serde(rename = "file.driver")]
    file_driver: Option<String>,
    #[serde(rename = "file.filename")]
    file_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    driver: Option<String>,
    filename: String,
}

/// The backing file that the header of `overlay` names. `fallback` is its format if the header records none.
pub(crate) fn backing_of(
    overlay: &Path,
    header: &Header,
    fallback: Option<Format>,
) -> Result<Option<LayerFile>, OpenError> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let path = || overlay.to_path_buf();
    let backing = || name.clone();
    let refused = |source| OpenError::BackingName { path: path(), backing: backing(), source };
    let (file, driver) = match name.strip_prefix(JSON) {
        Some(json) => {
            let (file, format) = parse_json(json, header.backing_format.as_deref()).map_err(refused)?;
            (file, Some(format))
        }
        None => (plain_file_name(name).map_err(refused)?, None),
    };
    let recorded = match (driver, header.backing_format.as_deref()) {
        (Some(format), _) => Some(format),
        (None, Some(name)) => match format_called(name) {
            Some(format) => Some(format),
            None => {
                let format = name.to_owned();
                return Err(OpenError::BackingFormatUnknown { path: path(), backing: backing(), format });
            }
        },
        (None, None) => None,
    };
    let Some(format) = recorded.or(fallback) else {
        return Err(OpenError::BackingFormatMissing { path: path(), backing: backing() });
    };
    // A relative name is relative to the overlay's folder; an absolute one replaces it.
    let folder = overlay.parent().unwrap_or(Path::new(""));
    Ok(Some(LayerFile { path: folder.join(file), format, recorded: recorded.is_some() }))
}

fn format_called(name: &str) -> Option<Format> {
    match name {
        "qcow2" => Some(Format::Qcow2),
        "raw" => Some(Format::Raw),
        _ => None,
    }
}

/// The file of a plain name. As in QEMU, a colon before the first slash makes a protocol.
fn plain_file_name(name: &[u8]) -> Result<PathBuf, BackingNameError> {
    let name = name.strip_prefix(FILE).unwrap_or(name);
    let slash = name.iter().position(|byte| *byte == b'/').unwrap_or(name.len());
    if let Some(colon) = name[..slash].iter().position(|byte| *byte == b':') {
        let protocol = name[..colon].to_vec();
        return Err(BackingNameError::Protocol { protocol });
    }
    if name.is_empty() {
        return Err(BackingNameError::Empty);
    }
    Ok(PathBuf::from(OsStr::from_bytes(name)))
}

/// The file and the format that JSON names; `recorded` is the format in the header.
fn parse_json(json: &[u8], recorded: Option<&str>) -> Result<(PathBuf, Format), BackingNameError> {
    let node: Node = serde_json::from_slice(json).map_err(BackingNameError::Json)?;
    let format = format_called(&node.driver)
        .ok_or_else(|| BackingNameError::JsonFormat { driver: node.driver.clone() })?;
    if let Some(recorded) = recorded.filter(|recorded| *recorded != node.driver) {
        let format = recorded.to_owned();
        return Err(BackingNameError::JsonDisagrees { driver: node.driver, format });
    }
    let (driver, filename) = match (node.file, node.file_driver, node.file_name) {
        (Some(file), None, None) => (file.driver, file.filename),
        (None, driver, Some(filename)) => (driver, filename),
        _ => return Err(BackingNameError::JsonFile),
    };
    if let Some(driver) = driver.filter(|driver| driver != FILE_DRIVER) {
        return Err(BackingNameError::JsonProtocol { driver });
    }
    // So it has no protocol either.
    if !filename.starts_with('/') {
        return Err(BackingNameError::JsonRelative { filename });
    }
    Ok((PathBuf::from(filename), format))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names() {
        let plain = |name: &str| plain_file_name(name.as_bytes()).map(|path| path.display().to_string()).ok();
        assert_eq!(plain("base.qcow2").as_deref(), Some("base.qcow2"));
        assert_eq!(plain("/a/b:c").as_deref(), Some("/a/b:c"));
        assert_eq!(plain("./b:c").as_deref(), Some("./b:c"));
        assert_eq!(plain("file:base").as_deref(), Some("base"));
        assert_eq!(plain("file:/x/base").as_deref(), Some("/x/base"));
        for refused in ["", "nbd://host/x", "nbd:host", "file:json:{}", "http://h/x", "file:"] {
            assert_eq!(plain(refused), None, "{refused}");
        }
    }

    #[test]
    fn json_names_of_files() {
        let taken = |json: &str| parse_json(json.as_bytes(), None).expect(json);
        let nested = r#"{"driver":"qcow2","file":{"driver":"file","filename":"/a/b"}}"#;
        assert_eq!(taken(nested), ("/a/b".into(), Format::Qcow2));
        let dotted = r#" {"file.filename": "/a:b", "driver": "raw"} "#;
        assert_eq!(taken(dotted), ("/a:b".into(), Format::Raw));
        let dotted = r#"{"driver":"raw","file.driver":"file","file.filename":"/\u0061"}"#;
        assert_eq!(taken(dotted), ("/a".into(), Format::Raw));
        parse_json(nested.as_bytes(), Some("qcow2")).expect("what is recorded agrees");
        let error = parse_json(nested.as_bytes(), Some("raw")).expect_err("they disagree");
        assert!(matches!(error, BackingNameError::JsonDisagrees { .. }), "{error}");
    }

    #[test]
    fn json_names_of_anything_else_are_refused_by_name() {
        for (json, word) in [
            ("", "EOF"),
            ("[]", "invalid"),
            (r#"{"driver":"qcow2"}"#, "one file"),
            (r#"{"file.filename":"/a"}"#, "missing field `driver`"),
            (r#"{"driver":"vmdk","file.filename":"/a"}"#, "vmdk"),
            (r#"{"driver":"raw","file":"node0"}"#, "node0"),
            (r#"{"driver":"raw","file":{"driver":"nbd","filename":"/a"}}"#, "nbd"),
            (r#"{"driver":"raw","file":{"driver":"nbd","host":"h","port":"1"}}"#, "host"),
            (r#"{"driver":"raw","file.driver":"https","file.filename":"/a"}"#, "https"),
            (r#"{"driver":"raw","file.filename":"a"}"#, "relative"),
            (r#"{"driver":"raw","file.filename":"nbd://h/x"}"#, "relative"),
            (r#"{"driver":"raw","offset":512,"file.filename":"/a"}"#, "offset"),
            (r#"{"driver":"raw","file.filename":"/a","file.filename":"/b"}"#, "duplicate"),
            (r#"{"driver":"raw","file":{"filename":"/a"},"file.filename":"/b"}"#, "one file"),
            (r#"{"driver":"qcow2","file.filename":"/a","data-file":"x"}"#, "data-file"),
            (r#"{"driver":"raw","file.filename":"/a"} x"#, "trailing"),
        ] {
            let error = parse_json(json.as_bytes(), None).expect_err(json).to_string();
            assert!(error.contains(word), "{json}: {error}");
        }
    }
}
