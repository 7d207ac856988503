//! Prepares a machine: installs the Debian packages and the Rust components that the demo and `cargo verify` need.
//!
//! Owns the map from programs to packages, and the rule that Debian's QEMU packages have one version. It installs only
//! as root on Debian-like systems, never removes or downgrades a package, and does nothing if all programs are there.

use crate::command;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// A program and the Debian package that contains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The name of the executable.
    pub program: &'static str,
    /// The Debian package.
    pub package: &'static str,
}

/// All programs that must be installed. busybox and the guest's kernel are only unpacked: see [`crate::kernel`].
const TOOLS: [Tool; 10] = [
    Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" },
    Tool { program: "qemu-img", package: "qemu-utils" },
    Tool { program: "qemu-io", package: "qemu-utils" },
    Tool { program: "fio", package: "fio" },
    Tool { program: "mkfs.ext4", package: "e2fsprogs" },
    Tool { program: "e2fsck", package: "e2fsprogs" },
    Tool { program: "debugfs", package: "e2fsprogs" },
    Tool { program: "fallocate", package: "util-linux" },
    Tool { program: "blkdiscard", package: "util-linux" },
    Tool { program: "ldd", package: "libc-bin" },
];

/// What only some tests need. Without them, these tests are skipped.
const OPTIONAL: [Tool; 2] =
    [Tool { program: "mcopy", package: "mtools" }, Tool { program: OVMF, package: "ovmf" }];

/// The firmware for UEFI, as a single file.
pub const OVMF: &str = "/usr/share/ovmf/OVMF.fd";

/// The programs and files that only some tests need, and that this machine lacks.
pub fn missing_options() -> Vec<Tool> {
    let is_missing = |tool: &Tool| match tool.program {
        path if path.starts_with('/') => !Path::new(path).is_file(),
        program => command::find(program).is_none(),
    };
    OPTIONAL.into_iter().filter(is_missing).collect()
}

/// The tools that this machine lacks.
pub fn missing_tools() -> Vec<Tool> {
    TOOLS.into_iter().filter(|tool| command::find(tool.program).is_none()).collect()
}

/// Installs missing programs and reports progress to `say`. If it cannot install, the error lists what is missing.
pub fn ensure_tools(say: &mut dyn FnMut(&str)) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        bail!("the virtual machines are x86-64 and this host is not: run this on an x86-64 host");
    }
    let missing = missing_tools();
    let is_able = debian_like() && rustix::process::geteuid().is_root();
    let options = if is_able { missing_options() } else { Vec::new() };
    if missing.is_empty() && options.is_empty() {
        return Ok(());
    }
    let missing = [missing, options].concat();
    let names = words(missing.iter().map(|tool| tool.program));
    let packages = words(missing.iter().map(|tool| tool.package));
    let by_hand = format!("missing: {names}. Debian packages: {packages}");
    if !debian_like() {
        bail!(
            "{by_hand}. This machine is not Debian-like: install them with its own package manager, then try again"
        );
    }
    if !rustix::process::geteuid().is_root() {
        bail!("{by_hand}. Run this once as root: it installs them, with one version for all QEMU packages");
    }
    let release = Release::of_this_machine()?;
    let plan = plan(&missing, &installed_versions()?, &release);
    if plan.backports {
        say(&format!("QEMU is from {}-backports here: adding that suite", release.codename));
        add_backports(&release)?;
    }
    refresh_lists(say)?;
    install(&plan, say)?;
    match missing_tools().as_slice() {
        [] => Ok(()),
        still => {
            bail!("still missing after the installation: {}", words(still.iter().map(|tool| tool.program)))
        }
    }
}

/// Installs rustfmt and clippy, which a minimal Rust toolchain lacks.
pub fn ensure_rust_components(say: &mut dyn FnMut(&str)) -> Result<()> {
    for (subcommand, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let works = |()| {
            let mut probe = Command::new("cargo");
            probe.args([subcommand, "--version"]);
            command::capture(&mut probe).is_ok_and(|output| output.status.success())
        };
        if works(()) {
            continue;
        }
        if command::find("rustup").is_none() {
            bail!(
                "cargo {subcommand} does not work and rustup is not installed: install the component {component}"
            );
        }
        say(&format!("rustup component add {component}"));
        command::output(Command::new("rustup").args(["component", "add", component]))?;
        if !works(()) {
            bail!("cargo {subcommand} still does not work after rustup added {component}");
        }
    }
    Ok(())
}

/// Downloads `package` and unpacks it into the existing `folder`. Needs no privilege and installs nothing.
pub fn unpack_package(package: &str, folder: &Path) -> Result<()> {
    let download = tempfile::tempdir().context("a folder for a download")?;
    let mut fetch = Command::new("apt-get");
    fetch.args(["download", "--quiet", "--quiet", package]).current_dir(download.path());
    command::output(&mut fetch)?;
    let entry = std::fs::read_dir(download.path())?
        .next()
        .with_context(|| format!("apt-get download {package} left no file"))??;
    command::output(Command::new("dpkg-deb").arg("--extract").arg(entry.path()).arg(folder))?;
    Ok(())
}

/// The first dependency of `package` whose name begins with `prefix`: the real package behind a meta package.
pub fn dependency_of(package: &str, prefix: &str) -> Result<String> {
    let listed = command::output(Command::new("apt-cache").args(["depends", package]))?;
    listed
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("{package} depends on no {prefix}...: are apt's package lists present?"))
}

/// Runs `apt-get update`, once per run and only if a package must be downloaded. Without root it uses the existing
/// lists.
pub fn refresh_lists(say: &mut dyn FnMut(&str)) -> Result<()> {
    static FRESH: AtomicBool = AtomicBool::new(false);
    // The flag guards no data: in a race the lists are downloaded twice.
    if rustix::process::geteuid().is_root() && !FRESH.swap(true, Ordering::Relaxed) {
        say("apt-get update");
        command::output(apt_get().arg("update"))?;
    }
    Ok(())
}

/// True if apt is installed.
pub fn debian_like() -> bool {
    command::find("apt-get").is_some() && command::find("dpkg-deb").is_some()
}

/// The packages to install.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    packages: Vec<&'static str>,
    /// Take QEMU from the backports suite.
    backports: bool,
    target_release: Option<String>,
}

/// The version of each QEMU package that is installed.
#[derive(Debug, Default)]
struct Versions {
    system: Option<String>,
    utils: Option<String>,
}

/// Chooses the packages. qemu-system-x86 and qemu-utils must have the same source version, because different versions
/// share files. If one of them is from backports, the other must be too; if either is missing, both are passed to apt.
fn plan(missing: &[Tool], installed: &Versions, release: &Release) -> Plan {
    let mut packages: Vec<&'static str> = missing.iter().map(|tool| tool.package).collect();
    let touches_qemu = packages.iter().any(|package| package.starts_with("qemu-"));
    if touches_qemu {
        packages.extend(["qemu-system-x86", "qemu-utils"]);
    }
    packages.sort_unstable();
    packages.dedup();
    let from_backports = |version: &Option<String>| version.as_ref().is_some_and(|v| v.contains("~bpo"));
    let backports = touches_qemu && (from_backports(&installed.system) || from_backports(&installed.utils));
    let target_release = backports.then(|| format!("{}-backports", release.codename));
    Plan { packages, backports, target_release }
}

fn install(plan: &Plan, say: &mut dyn FnMut(&str)) -> Result<()> {
    let mut command = apt_get();
    command.args(["install", "--yes", "--no-install-recommends", "--no-remove"]);
    if let Some(release) = &plan.target_release {
        command.args(["--target-release", release]);
    }
    command.args(&plan.packages);
    say(&command::shown(&command));
    command::output(&mut command)?;
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args([
        "--quiet",
        "-o",
        "Dpkg::Use-Pty=0",
        // Another apt may be running.
        "-o",
        "DPkg::Lock::Timeout=300",
    ]);
    command
}

fn installed_versions() -> Result<Versions> {
    let version = |package: &str| -> Result<Option<String>> {
        let mut query = Command::new("dpkg-query");
        query.args(["--show", "--showformat=${db:Status-Status} ${Version}", package]);
        let output = command::capture(&mut query)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.strip_prefix("installed ").map(|version| version.trim().to_owned()))
    };
    Ok(Versions { system: version("qemu-system-x86")?, utils: version("qemu-utils")? })
}

/// The distribution's release.
struct Release {
    codename: String,
}

impl Release {
    fn of_this_machine() -> Result<Self> {
        let text = std::fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
        let codename = text
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .map(|name| name.trim_matches('"').to_owned())
            .context("/etc/os-release names no VERSION_CODENAME")?;
        Ok(Self { codename })
    }
}

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Adds the backports suite as a source, unless a source has it already. Its packages have a low priority: apt installs
/// none of them unless told to.
fn add_backports(release: &Release) -> Result<()> {
    let suite = format!("{}-backports", release.codename);
    if sources_mention(&suite)? {
        return Ok(());
    }
    let path = PathBuf::from(format!("/etc/apt/sources.list.d/strata-{suite}.sources"));
    let text = format!(
        "# Added by Strata's set-up: QEMU on this machine is from this suite, and its packages go together.\n\
         Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n",
        archive_uri()?
    );
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The archive that this machine uses already, so that a local mirror stays in use.
fn archive_uri() -> Result<String> {
    let of_deb822 = |line: &str| line.strip_prefix("URIs:").map(|uri| uri.trim().to_owned());
    let of_one_line = |line: &str| {
        let mut parts = line.strip_prefix("deb ")?.split_whitespace();
        parts.find(|part| part.contains("://")).map(str::to_owned)
    };
    let uri = source_lines()?
        .iter()
        .filter_map(|line| of_deb822(line).or_else(|| of_one_line(line)))
        .find(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    Ok(uri.unwrap_or_else(|| "http://deb.debian.org/debian".to_owned()))
}

fn sources_mention(suite: &str) -> Result<bool> {
    Ok(source_lines()?.iter().any(|line| line.split_whitespace().any(|word| word == suite)))
}

/// The lines of apt's enabled sources, without comments.
fn source_lines() -> Result<Vec<String>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        for entry in entries {
            files.push(entry?.path());
        }
    }
    let enabled = |path: &PathBuf| path.extension().is_some_and(|end| end == "list" || end == "sources");
    let texts =
        files.iter().filter(|path| enabled(path)).filter_map(|path| std::fs::read_to_string(path).ok());
    let lines = texts.flat_map(|text| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>());
    Ok(lines.filter(|line| !line.starts_with('#')).collect())
}

fn words<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bookworm() -> Release {
        Release { codename: "bookworm".to_owned() }
    }

    fn lacking(programs: &[&str]) -> Vec<Tool> {
        TOOLS.into_iter().filter(|tool| programs.contains(&tool.program)).collect()
    }

    #[test]
    fn a_bare_machine_installs_from_its_own_release() {
        let plan = plan(&TOOLS, &Versions::default(), &bookworm());
        assert_eq!(plan.target_release, None);
        assert!(!plan.backports);
        assert_eq!(
            plan.packages,
            ["e2fsprogs", "fio", "libc-bin", "qemu-system-x86", "qemu-utils", "util-linux"]
        );
    }

    #[test]
    fn with_utils_from_backports_the_emulator_is_from_backports() {
        let installed = Versions { system: None, utils: Some("1:10.0.2+ds-2+deb13u1~bpo12+1".to_owned()) };
        let plan = plan(&lacking(&["qemu-system-x86_64"]), &installed, &bookworm());
        assert_eq!(plan.target_release.as_deref(), Some("bookworm-backports"));
        assert_eq!(plan.packages, ["qemu-system-x86", "qemu-utils"]);
    }

    #[test]
    fn with_an_emulator_of_the_release_utils_are_of_the_release() {
        let installed = Versions { system: Some("1:7.2+dfsg-7+deb12u18".to_owned()), utils: None };
        let plan = plan(&lacking(&["qemu-img", "qemu-io"]), &installed, &bookworm());
        assert_eq!(plan.target_release, None);
        assert_eq!(plan.packages, ["qemu-system-x86", "qemu-utils"]);
    }

    #[test]
    fn other_packages_do_not_change_qemu() {
        let installed = Versions { system: None, utils: Some("1:10.0.2~bpo12+1".to_owned()) };
        let plan = plan(&lacking(&["fio"]), &installed, &bookworm());
        assert_eq!(plan, Plan { packages: vec!["fio"], backports: false, target_release: None });
    }
}
