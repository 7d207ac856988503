//! What machines do with disks beside reading and writing them: several at a time, hotplug, and booting from one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use strata_integration::daemon::{Backend, Daemon, ServeSpec};
use strata_integration::image;
use strata_integration::machine::{Disk, MachineSpec};
use strata_integration::qmp::Monitor;
use strata_integration::setup;
use strata_integration::stand::Stand;
use strata_integration::{command, firmware};

use crate::{MIB, with_stand};

/// The disks' size.
const DISK_MIB: u64 = 32;
/// Timeout until a guest has given a disk up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Interval between two attempts.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A disk beside the stand's own, with a daemon of its own.
struct Another {
    daemon: Daemon,
    serve: ServeSpec,
}

impl Another {
    fn start(stand: &Stand, folder: &Path, name: &str) -> Result<Self> {
        let file = |end: &str| folder.join(format!("{name}{end}"));
        let serve = ServeSpec { image: file(".qcow2"), socket: file(".sock"), ..stand.serve.clone() };
        image::create(&serve.image, "qcow2", DISK_MIB * MIB, None, "")?;
        let daemon = Daemon::start(&stand.program, &serve, &file(".log"))?;
        Ok(Another { daemon, serve })
    }

    fn disk(&self, like: &Disk) -> Disk {
        Disk { socket: self.serve.socket.clone(), ..like.clone() }
    }

    /// The end: the daemon stops, and the image has what the guest read last.
    fn conclude(self, folder: &Path, sum: &str) -> Result<()> {
        self.daemon.stop()?;
        has_sum(&self.serve, folder, sum)
    }
}

fn has_sum(serve: &ServeSpec, folder: &Path, sum: &str) -> Result<()> {
    image::expect_clean(&serve.image)?;
    let flat = folder.join("flat.raw");
    image::flatten(&serve.image, &serve.format, &flat)?;
    ensure!(
        image::md5(&flat, DISK_MIB)? == sum,
        "{} differs from what the guest read",
        serve.image.display()
    );
    Ok(())
}

/// Plugs a disk into a running machine.
fn plug(monitor: &mut Monitor, socket: &Path) -> Result<()> {
    let address = json!({"type": "unix", "data": {"path": socket}});
    let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
    monitor.run("chardev-add", json!({"id": "plugged", "backend": backend}))?;
    let device = json!({
        "driver": "vhost-user-blk-pci", "id": "plugged-disk", "chardev": "plugged", "num-queues": 2,
    });
    monitor.run("device_add", device)?;
    Ok(())
}

/// Pulls the disk out, and waits until the guest has given it up.
fn unplug(monitor: &mut Monitor) -> Result<()> {
    monitor.run("device_del", json!({"id": "plugged-disk"}))?;
    let deadline = Instant::now() + PATIENCE;
    // QEMU refuses that while a device uses it.
    while let Err(error) = monitor.run("chardev-remove", json!({"id": "plugged"})) {
        if Instant::now() > deadline {
            bail!("the guest does not give the disk up: {error}");
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

#[test]
fn disks_come_and_go_beside_others_in_use() -> Result<()> {
    with_stand("disks_come_and_go_beside_others_in_use", |stand, folder| {
        if stand.program.backend != Backend::Strata {
            return Ok(());
        }
        image::create(&stand.serve.image, "qcow2", DISK_MIB * MIB, None, "")?;
        let (second, third) = (Another::start(stand, folder, "b")?, Another::start(stand, folder, "c")?);
        let mut machine = stand.machine(&format!("AREA_MIB=4\n{}", include_str!("guest/hotplug.sh")));
        machine.disks.push(second.disk(&machine.disks[0]));
        let path = folder.join("monitor.sock");
        machine.monitor = Some(path.clone());
        let mut connected = None;
        let visit = stand.attended_on("hotplug", &machine, &[], &mut |_, checkpoint| {
            let monitor = match &mut connected {
                Some(monitor) => monitor,
                none => none.insert(Monitor::connect(&path)?),
            };
            match checkpoint.name.as_str() {
                "plug" | "again" => plug(monitor, &third.serve.socket),
                _ => unplug(monitor),
            }
        })?;
        assert_eq!(visit.number("sectors")?, DISK_MIB * MIB / 512);
        assert_eq!(visit.fact("sum.before")?, visit.fact("sum.after")?, "the disk came back as another");
        assert_eq!(visit.number("errors")?, 0, "the guest saw errors of the other disks");
        has_sum(&stand.serve, folder, visit.fact("sum.vda")?)?;
        second.conclude(folder, visit.fact("sum.vdb")?)?;
        third.conclude(folder, visit.fact("sum.vdc")?)
    })
}

/// Boots a machine without a kernel of its own from the stand's image, until it says this on its serial port.
fn boots(stand: &Stand, folder: &Path, options: &[&str], said: &str) -> Result<()> {
    let daemon = Daemon::start(&stand.program, &stand.serve, &folder.join("daemon.log"))?;
    let machine = MachineSpec { memory_mib: 256, processors: 1, ..stand.machine("") };
    let booted = firmware::says(machine.bare_command().args(options), said, PATIENCE);
    booted.with_context(|| daemon.log_tail())?;
    daemon.stop()?;
    image::expect_clean(&stand.serve.image)
}

#[test]
fn a_machine_boots_from_its_disk_by_the_bios() -> Result<()> {
    with_stand("a_machine_boots_from_its_disk_by_the_bios", |stand, folder| {
        let said = "booted from sector 40000";
        let raw = folder.join("boot.raw");
        std::fs::write(&raw, firmware::boot_disk(40_000, said))?;
        into_qcow2(&raw, &stand.serve.image)?;
        boots(stand, folder, &[], said)
    })
}

#[test]
fn a_machine_boots_from_its_disk_by_uefi() -> Result<()> {
    with_stand("a_machine_boots_from_its_disk_by_uefi", |stand, folder| {
        let missing = setup::missing_options();
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
            return crate::skip("a_machine_boots_from_its_disk_by_uefi", &names.join(" "));
        }
        let said = "booted by UEFI";
        let program = folder.join("BOOTX64.EFI");
        std::fs::write(&program, firmware::efi_program(said))?;
        let raw = fat_disk(folder, &program)?;
        into_qcow2(&raw, &stand.serve.image)?;
        boots(stand, folder, &["-bios", setup::OVMF], said)
    })
}

fn into_qcow2(raw: &Path, image: &Path) -> Result<()> {
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(image);
    command::output(&mut convert).map(|_| ())
}

/// A FAT file system that holds the program where UEFI looks for it on a removable disk.
fn fat_disk(folder: &Path, program: &Path) -> Result<PathBuf> {
    let disk = folder.join("fat.raw");
    std::fs::File::create(&disk)?.set_len(DISK_MIB * MIB)?;
    let mtools = |name: &str, arguments: &[&str]| {
        let mut tool = Command::new(name);
        tool.arg("-i").arg(&disk).args(arguments);
        command::output(&mut tool).map(|_| ())
    };
    mtools("mformat", &["::"])?;
    mtools("mmd", &["::/EFI", "::/EFI/BOOT"])?;
    mtools("mcopy", &[&program.display().to_string(), "::/EFI/BOOT/BOOTX64.EFI"])?;
    Ok(disk)
}
