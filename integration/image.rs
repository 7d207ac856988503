//! Disk images by QEMU's own tools, as an independent reference.
//!
//! Owns the command lines of qemu-img and qemu-io, and of `strata check`, which runs with every `qemu-img check`. It
//! never reads qcow2 itself.

use crate::command;
use crate::daemon;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A backing file.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// Its path.
    pub image: &'a Path,
    /// `qcow2` or `raw`.
    pub format: &'a str,
}

/// Creates an image of `bytes` with qemu-img; `options` are its `-o` options, such as `cluster_size=64k`.
pub fn create(
    image: &Path,
    format: &str,
    bytes: u64,
    backing: Option<Backing<'_>>,
    options: &str,
) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]);
    if let Some(backing) = backing {
        command.arg("-b").arg(backing.image).args(["-F", backing.format]);
    }
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    command::output(command.arg(image).arg(bytes.to_string()))?;
    Ok(())
}

/// Fills `length` bytes from `offset` with `byte`, both in bytes.
pub fn write_pattern(image: &Path, format: &str, offset: u64, length: u64, byte: u8) -> Result<()> {
    let order = format!("write -q -P {byte:#x} {offset} {length}");
    command::output(Command::new("qemu-io").args(["-f", format, "-c", &order]).arg(image))?;
    Ok(())
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// No error and no leak.
    Clean,
    /// Only leaks, which a crash may leave: the number of clusters.
    Leaks(u64),
    /// Errors: the tool's output.
    Broken(String),
}

/// Timeout for the image lock: that of a killed process lasts until its last I/O is done.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Runs `qemu-img check` and `strata check` on a qcow2 image. Their results must be equal.
pub fn check(image: &Path) -> Result<Health> {
    let theirs = check_by_qemu(image)?;
    let ours = check_by_strata(image)?;
    let agree = match (&ours, &theirs) {
        (Health::Broken(_), Health::Broken(_)) => true,
        (ours, theirs) => ours == theirs,
    };
    if !agree {
        bail!("{}: strata check finds {ours:?}, but qemu-img check {theirs:?}", image.display());
    }
    Ok(theirs)
}

fn check_by_strata(image: &Path) -> Result<Health> {
    let mut command = Command::new(daemon::strata()?);
    command.args(["check", "--json"]).arg(image);
    let output = command::capture(&mut command)?;
    Ok(health(&command, &output))
}

/// Reads the result of either tool: their exit codes and the name of leaks in their JSON are equal.
fn health(command: &Command, output: &Output) -> Health {
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    match output.status.code() {
        Some(0) => Health::Clean,
        Some(3) => Health::Leaks(result["leaks"].as_u64().unwrap_or(0)),
        _ => Health::Broken(command::failure(command, output)),
    }
}

/// Runs `qemu-img check` on a qcow2 image.
pub fn check_by_qemu(image: &Path) -> Result<Health> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qcow2", "--output=json"]).arg(image);
    loop {
        let output = command::capture(&mut command)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        let locked = errors.contains("lock") && output.status.code() == Some(1);
        if locked && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        return Ok(health(&command, &output));
    }
}

/// Writes the guest's view of the image, with its whole chain, to a raw file.
pub fn flatten(image: &Path, format: &str, raw: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command::output(command.args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(raw))?;
    Ok(())
}

/// The MD5 of a file's first `mib` MiB.
pub fn md5(file: &Path, mib: u64) -> Result<String> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("head -c {mib}M -- \"$1\" | md5sum")).arg("sh").arg(file);
    let text = command::output(&mut command)?;
    Ok(text.split_whitespace().next().context("md5sum printed nothing")?.to_owned())
}

/// The SHA-256 of every regular file in `folder` (absolute, one level deep) of an ext4 file system in a raw image.
pub fn files_in_ext4(raw: &Path, folder: &str, scratch: &Path) -> Result<BTreeMap<String, String>> {
    let target = scratch.join("files-of-ext4");
    std::fs::create_dir_all(&target)?;
    let order = format!("rdump {folder} \"{}\"", target.display());
    let mut debugfs = Command::new(command::find("debugfs").context("debugfs is not installed")?);
    command::output(debugfs.args(["-R", &order]).arg(raw))?;
    let mut sums = BTreeMap::new();
    let copied = target.join(folder.trim_start_matches('/'));
    for entry in std::fs::read_dir(&copied).with_context(|| copied.display().to_string())? {
        let path = entry?.path();
        let sum = command::output(Command::new("sha256sum").arg(&path))?;
        let name = path.file_name().context("a file has a name")?.to_string_lossy().into_owned();
        sums.insert(name, sum.split_whitespace().next().unwrap_or_default().to_owned());
    }
    std::fs::remove_dir_all(&target)?;
    Ok(sums)
}

/// Bytes that the file occupies on the host.
pub fn allocated_bytes(file: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(file).with_context(|| file.display().to_string())?;
    // st_blocks is in units of 512 bytes, whatever the file system's block size.
    Ok(metadata.blocks() * 512)
}

/// Returns an error unless the image is clean.
pub fn expect_clean(image: &Path) -> Result<()> {
    match check(image)? {
        Health::Clean => Ok(()),
        other => bail!("{} is not clean: {other:?}", image.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_of_a_sparse_file_is_less_than_its_length() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("sparse");
        std::fs::File::create(&path).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
        assert!(allocated_bytes(&path).expect("metadata") < 1 << 20);
    }
}
