//! The tiny guest: Debian's cloud kernel and an initramfs with busybox, fio, util-linux's disk tools and the ext4
//! tools.
//!
//! Owns the cache of prepared guests (`$STRATA_CACHE_DIR`, else `~/.cache/strata`) and the contents of an initramfs. It
//! installs nothing on the host. A running guest executes a script: see [`crate::machine`].

use crate::command;
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::setup;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeSet, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel and an initramfs, ready to boot.
#[derive(Clone, Debug)]
pub struct GuestKit {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initramfs without `/init`: every run appends a small archive of its own.
    pub initramfs: PathBuf,
    /// The kernel's release.
    pub release: String,
}

/// To be raised when the initramfs changes in a way that its ingredients do not show.
const LAYOUT: u32 = 1;

/// Programs of the host that are copied to the guest's `/bin`. The fallocate of busybox cannot punch holes, which
/// on a disk are zeroes that may unmap. Its blkdiscard refuses a mounted disk.
const PROGRAMS: [&str; 5] = ["fio", "mkfs.ext4", "e2fsck", "fallocate", "blkdiscard"];

/// The meta package of the newest kernel for virtual machines.
const KERNEL_META: &str = "linux-image-cloud-amd64";

impl GuestKit {
    /// The prepared guest, or `None` if none is prepared or its ingredients have changed.
    pub fn find() -> Result<Option<Self>> {
        let cache = cache_folder()?;
        let Some(ingredients) = Ingredients::find(&cache)? else { return Ok(None) };
        let kit = ingredients.kit(&cache);
        Ok((kit.kernel.is_file() && kit.initramfs.is_file()).then_some(kit))
    }

    /// The prepared guest, which is prepared first if necessary: downloads two Debian packages once, then only packs.
    pub fn prepare(say: &mut dyn FnMut(&str)) -> Result<Self> {
        if let Some(kit) = Self::find()? {
            return Ok(kit);
        }
        let cache = cache_folder()?;
        fetch_packages(&cache, say)?;
        let ingredients = Ingredients::find(&cache)?
            .context("the guest's ingredients are incomplete (fio and e2fsprogs must be installed)")?;
        let kit = ingredients.kit(&cache);
        say(&format!("packing the guest: kernel {}", kit.release));
        let folder = tempfile::Builder::new().prefix("kit-new-").tempdir_in(&cache)?;
        std::fs::copy(&ingredients.kernel.image, folder.path().join("vmlinuz"))?;
        std::fs::write(folder.path().join("initramfs.cpio"), ingredients.initramfs()?)?;
        let home = kit.kernel.parent().expect("a kit's kernel is in the kit's folder");
        publish(folder, home)?;
        Ok(kit)
    }
}

/// The folder of all files that are prepared once per machine.
pub fn cache_folder() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = from("STRATA_CACHE_DIR")
        .or_else(|| from("XDG_CACHE_HOME").map(|folder| folder.join("strata")))
        .or_else(|| from("HOME").map(|home| home.join(".cache/strata")))
        .context("neither STRATA_CACHE_DIR nor HOME is set: no folder for the prepared guest")?;
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// The ingredients of a guest, all of them on this machine.
struct Ingredients {
    kernel: Kernel,
    busybox: PathBuf,
    programs: Vec<PathBuf>,
}

impl Ingredients {
    fn find(cache: &Path) -> Result<Option<Self>> {
        let packages = cache.join("packages");
        let Some(kernel) = newest_kernel(&packages)? else { return Ok(None) };
        let busybox = ["bin/busybox", "usr/bin/busybox"]
            .map(|path| packages.join("busybox-static").join(path))
            .into_iter()
            .find(|path| path.is_file());
        let programs: Option<Vec<PathBuf>> = PROGRAMS.into_iter().map(command::find).collect();
        Ok(busybox.zip(programs).map(|(busybox, programs)| Self { kernel, busybox, programs }))
    }

    /// The folder of the kit built from these ingredients: the name changes with every ingredient.
    fn kit(&self, cache: &Path) -> GuestKit {
        let mut hasher = DefaultHasher::new();
        LAYOUT.hash(&mut hasher);
        for path in [&self.kernel.image, &self.busybox].into_iter().chain(&self.programs) {
            path.hash(&mut hasher);
            if let Ok(metadata) = std::fs::metadata(path) {
                (metadata.size(), metadata.mtime()).hash(&mut hasher);
            }
        }
        let folder = cache.join(format!("kit-{:016x}", hasher.finish()));
        GuestKit {
            kernel: folder.join("vmlinuz"),
            initramfs: folder.join("initramfs.cpio"),
            release: self.kernel.release.clone(),
        }
    }

    fn initramfs(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        for folder in ["dev", "proc", "sys", "tmp", "mnt", "run"] {
            archive.directory(folder);
        }
        // The kernel opens the console for init before anything is mounted.
        archive.character_device("dev/console", 0o600, (5, 1));
        archive.symlink("etc/mtab", "/proc/mounts");
        if let Ok(defaults) = std::fs::read("/etc/mke2fs.conf") {
            archive.file("etc/mke2fs.conf", 0o644, &defaults);
        }
        self.add_busybox(&mut archive)?;
        let mut libraries = BTreeSet::new();
        for program in &self.programs {
            let name = program.file_name().expect("a program has a name").to_string_lossy();
            add_copy(&mut archive, &format!("bin/{name}"), program)?;
            libraries.extend(libraries_of(program)?);
        }
        for library in libraries {
            add_copy(&mut archive, &library, Path::new(&library))?;
        }
        let mut order = String::new();
        for module in self.kernel.modules()? {
            archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.object);
            order.push_str(&format!("{}\n", module.name));
        }
        archive.file("modules/order", 0o644, order.as_bytes());
        Ok(archive.finish())
    }

    fn add_busybox(&self, archive: &mut Archive) -> Result<()> {
        add_copy(archive, "bin/busybox", &self.busybox)?;
        let applets = command::output(Command::new(&self.busybox).arg("--list"))?;
        let applets: Vec<&str> = applets.lines().map(str::trim).collect();
        for needed in ["sh", "mount", "insmod", "fstrim", "sha256sum", "poweroff", "blockdev", "stty"] {
            if !applets.contains(&needed) {
                bail!("{} lacks {needed}, which the guest needs", self.busybox.display());
            }
        }
        for applet in applets.into_iter().filter(|name| !name.is_empty() && *name != "busybox") {
            archive.symlink(&format!("bin/{applet}"), "busybox");
        }
        Ok(())
    }
}

/// The kernel that was unpacked last.
fn newest_kernel(packages: &Path) -> Result<Option<Kernel>> {
    let Ok(entries) = std::fs::read_dir(packages) else { return Ok(None) };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("linux-image-") {
            found.push((entry.metadata()?.mtime(), entry.path()));
        }
    }
    found.sort();
    found.pop().map(|(_, path)| Kernel::in_root(&path)).transpose()
}

/// Unpacks busybox and the kernel into the cache, unless they are there already.
fn fetch_packages(cache: &Path, say: &mut dyn FnMut(&str)) -> Result<()> {
    let packages = cache.join("packages");
    std::fs::create_dir_all(&packages)?;
    let have_kernel = newest_kernel(&packages)?.is_some();
    let have_busybox = packages.join("busybox-static").is_dir();
    if have_kernel && have_busybox {
        return Ok(());
    }
    if !setup::debian_like() {
        bail!(
            "the guest needs Debian's {KERNEL_META} and busybox-static, but apt is not installed to download them"
        );
    }
    setup::refresh_lists(say)?;
    let mut wanted = Vec::new();
    if !have_kernel {
        wanted.push(setup::dependency_of(KERNEL_META, "linux-image-")?);
    }
    if !have_busybox {
        wanted.push("busybox-static".to_owned());
    }
    for package in wanted {
        say(&format!("unpacking {package}"));
        let folder = tempfile::Builder::new().prefix("new-").tempdir_in(&packages)?;
        setup::unpack_package(&package, folder.path())?;
        publish(folder, &packages.join(&package))?;
    }
    Ok(())
}

/// Renames a finished folder to its final name, so that no process sees an incomplete folder. If another process was
/// quicker, its folder is used.
fn publish(folder: tempfile::TempDir, home: &Path) -> Result<()> {
    match std::fs::rename(folder.path(), home) {
        Ok(()) => {
            // The folder has been moved, so its guard need not remove it.
            let _ = folder.keep();
            Ok(())
        }
        Err(_) if home.is_dir() => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", home.display())),
    }
}

fn add_copy(archive: &mut Archive, name: &str, path: &Path) -> Result<()> {
    let contents = std::fs::read(path).with_context(|| path.display().to_string())?;
    archive.file(name, 0o755, &contents);
    Ok(())
}

/// The shared libraries of a program, the loader included; none for a static program.
fn libraries_of(program: &Path) -> Result<Vec<String>> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    let output = command::capture(&mut ldd)?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        bail!("{} lacks a library:\n{text}", program.display());
    }
    Ok(text.lines().filter_map(library_path).collect())
}

/// The file in a line of ldd: `libz.so.1 => /lib/libz.so.1 (0x..)` and `/lib64/ld-linux-x86-64.so.2 (0x..)` name files,
/// `linux-vdso.so.1` does not.
fn library_path(line: &str) -> Option<String> {
    let after_arrow = line.split("=>").last()?.trim();
    let path = after_arrow.split_whitespace().next()?;
    path.starts_with('/').then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldds_lines_are_parsed_to_files() {
        assert_eq!(library_path("\tlinux-vdso.so.1 (0x7ffd)"), None);
        assert_eq!(library_path("\tlibz.so.1 => /lib/libz.so.1 (0x7f)").as_deref(), Some("/lib/libz.so.1"));
        assert_eq!(library_path("\t/lib64/ld-linux.so.2 (0x7f)").as_deref(), Some("/lib64/ld-linux.so.2"));
        assert_eq!(library_path("\tstatically linked"), None);
    }

    #[test]
    fn a_finished_folder_does_not_replace_another() {
        let cache = tempfile::tempdir().expect("a temporary folder");
        let home = cache.path().join("busybox-static");
        for contents in ["first", "second"] {
            let folder = tempfile::tempdir_in(cache.path()).expect("a temporary folder");
            std::fs::write(folder.path().join("file"), contents).expect("a file");
            publish(folder, &home).expect("published");
        }
        assert_eq!(std::fs::read_to_string(home.join("file")).expect("the file"), "first");
    }
}
