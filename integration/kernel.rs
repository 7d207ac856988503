//! The guest's kernel and its modules, from an unpacked Debian package.
//!
//! Owns finding the image, resolving module dependencies and reading compressed modules. It never builds the initramfs
//! (`guest` does) and never installs a kernel.

use crate::command;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The features that the guest needs, as modules or built in: virtio over PCI, the block device, ext4 and its checksum.
const WANTED: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"];

/// One module, ready for insmod.
pub struct Module {
    /// The name with underscores and without a file extension.
    pub name: String,
    /// The ELF object, decompressed.
    pub object: Vec<u8>,
}

/// An unpacked kernel package.
pub struct Kernel {
    /// The bootable image.
    pub image: PathBuf,
    /// The release, such as `6.1.0-56-cloud-amd64`.
    pub release: String,
    folder: PathBuf,
}

impl Kernel {
    /// The kernel in `root`, into which one kernel package was unpacked.
    pub fn in_root(root: &Path) -> Result<Self> {
        let boot = root.join("boot");
        let entries = std::fs::read_dir(&boot).with_context(|| boot.display().to_string())?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let image = names
            .into_iter()
            .find(|name| name.starts_with("vmlinuz-"))
            .with_context(|| format!("no kernel image in {}", boot.display()))?;
        let release = image.trim_start_matches("vmlinuz-").to_owned();
        let folder = ["lib/modules", "usr/lib/modules"]
            .map(|parent| root.join(parent).join(&release))
            .into_iter()
            .find(|folder| folder.is_dir())
            .with_context(|| format!("no modules of {release} in {}", root.display()))?;
        Ok(Self { image: boot.join(image), release, folder })
    }

    /// The modules that the guest loads, each after its dependencies.
    pub fn modules(&self) -> Result<Vec<Module>> {
        let mut files = BTreeMap::new();
        collect(&self.folder, &mut files)?;
        let built_in = std::fs::read_to_string(self.folder.join("modules.builtin")).unwrap_or_default();
        let built_in: Vec<String> =
            built_in.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut order = Vec::new();
        for wanted in WANTED {
            // The kernel may provide the checksum in another form.
            let optional = wanted == "crc32c_generic";
            if files.contains_key(wanted) {
                load(wanted, &files, &mut order)?;
            } else if !optional && !built_in.iter().any(|name| name == wanted) {
                bail!("kernel {} has {wanted} neither as a module nor built in", self.release);
            }
        }
        Ok(order)
    }
}

/// Adds modules depth first, so that dependencies come before their users.
fn load(name: &str, files: &BTreeMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<()> {
    if order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    // A module without a file is built in.
    let Some(path) = files.get(name) else { return Ok(()) };
    let object = read_object(path)?;
    for dependency in dependencies(&object) {
        load(&dependency, files, order)?;
    }
    order.push(Module { name: name.to_owned(), object });
    Ok(())
}

/// Parses the `depends=` entry of the module's information section, a comma-separated list.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = object[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn read_object(path: &Path) -> Result<Vec<u8>> {
    let decompressor = match path.extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return std::fs::read(path).with_context(|| path.display().to_string()),
    };
    let mut command = Command::new(decompressor);
    command.arg("-dc").arg(path);
    let output = command::capture(&mut command)?;
    if !output.status.success() {
        bail!("{}", command::failure(&command, &output));
    }
    Ok(output.stdout)
}

fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// The module's name: `ext4` for `kernel/fs/ext4/ext4.ko.xz`, `None` for other files.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, ending) = file.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&ending).then(|| name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_name_has_no_folder_extension_or_dashes() {
        assert_eq!(module_name(Path::new("kernel/lib/crc32c-intel.ko.xz")).as_deref(), Some("crc32c_intel"));
        assert_eq!(module_name(Path::new("kernel/a.ko")).as_deref(), Some("a"));
        assert_eq!(module_name(Path::new("modules.order")), None);
    }

    #[test]
    fn dependencies_are_read_from_the_information_section() {
        let object = b"\x7fELF..license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(object), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
