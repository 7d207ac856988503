//! A virtual machine: QEMU's command line, the guest's script, its reports and its end.
//!
//! Owns the QEMU process, which is killed by its id on drop. It never starts the daemon behind a disk and never checks
//! a guest's reports. It uses only options that both QEMU 7.2 and 10 support, apart from [`reconnect_option`].
//!
//! The guest has two serial ports. The console goes to a file. The second port carries lines `@@ key=value` to the
//! host, and one empty line back for each checkpoint, so the guest waits while the host measures.

use crate::command;
use crate::cpio::Archive;
use crate::guest::{GuestKit, cache_folder};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// QEMU's ways to run the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's translator, one thread per processor: works everywhere.
    Tcg,
    /// The host's hardware virtualization.
    Kvm,
}

impl Accelerator {
    fn option(self) -> &'static str {
        match self {
            Self::Tcg => "tcg,thread=multi",
            Self::Kvm => "kvm",
        }
    }

    /// KVM if it boots the guest within some seconds, else TCG. `STRATA_TEST_ACCEL=tcg|kvm` skips the trial boot. The
    /// result is cached until the host reboots. The trial is needed because on some hosts KVM opens and then hangs.
    pub fn choose(kit: &GuestKit) -> Result<Self> {
        match std::env::var("STRATA_TEST_ACCEL").as_deref() {
            Ok("tcg") => return Ok(Self::Tcg),
            Ok("kvm") => return Ok(Self::Kvm),
            Ok(other) => bail!("STRATA_TEST_ACCEL={other}: use tcg or kvm"),
            Err(_) => {}
        }
        if File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Self::Tcg);
        }
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let remembered = cache_folder()?.join(format!("kvm-{}-{}", kit.release, boot.trim()));
        if let Ok(answer) = std::fs::read_to_string(&remembered) {
            return Ok(if answer == "boots" { Self::Kvm } else { Self::Tcg });
        }
        let boots = kvm_boots(kit).is_ok();
        std::fs::write(&remembered, if boots { "boots" } else { "does not boot" })?;
        Ok(if boots { Self::Kvm } else { Self::Tcg })
    }
}

/// Timeout of the trial boot: much longer than a boot with working KVM, so that only a hang exceeds it.
const KVM_PATIENCE: Duration = Duration::from_secs(15);

fn kvm_boots(kit: &GuestKit) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let spec = MachineSpec { accelerator: Accelerator::Kvm, ..MachineSpec::new("true\n".to_owned()) };
    let mut vm = Vm::boot(kit, &spec, folder.path())?;
    let deadline = Instant::now() + KVM_PATIENCE;
    while let Some(report) = vm.next_report(deadline)? {
        if report == (Report::Exit { code: 0 }) {
            return Ok(());
        }
    }
    bail!("the guest ended without a report")
}

/// A vhost-user disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Number of queues of the device.
    pub queues: u16,
    /// True if the guest may see VIRTIO_BLK_F_CONFIG_WCE, if the daemon offers it.
    pub cache_switch: bool,
    /// The option of its socket by which QEMU connects again when the daemon is gone, see [`reconnect_option`].
    pub reconnect: Option<&'static str>,
    /// True if the guest may use packed rings, if the daemon offers them.
    pub packed: bool,
}

/// The option by which this machine's QEMU connects again to a socket: in milliseconds since 9.2, in seconds before.
///
/// # Errors
/// When QEMU does not say its version.
pub fn reconnect_option() -> Result<&'static str> {
    let said = command::output(Command::new(emulator()).arg("--version"))?;
    Ok(if qemu_version(&said).context("QEMU's version")? >= (9, 2) {
        "reconnect-ms=100"
    } else {
        "reconnect=1"
    })
}

/// QEMU's program: `STRATA_TEST_QEMU`, else the one that is installed.
fn emulator() -> String {
    let chosen = std::env::var("STRATA_TEST_QEMU").ok().filter(|path| !path.is_empty());
    chosen.unwrap_or_else(|| "qemu-system-x86_64".to_owned())
}

fn qemu_version(said: &str) -> Option<(u32, u32)> {
    let version = said.split_whitespace().skip_while(|word| *word != "version").nth(1)?;
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The machine to boot.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// A shell script, which may use the functions of `guest/report.sh`.
    pub script: String,
    /// The disks, from `/dev/vda` on.
    pub disks: Vec<Disk>,
    /// Virtual processors.
    pub processors: u16,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// See [`Accelerator`].
    pub accelerator: Accelerator,
    /// The socket of QEMU's monitor, if there is to be one.
    pub monitor: Option<PathBuf>,
    /// True if the machine waits for a guest that is migrated to it.
    pub incoming: bool,
}

impl MachineSpec {
    /// Two processors, 512 MiB, no disk, TCG.
    pub fn new(script: String) -> Self {
        Self {
            script,
            disks: Vec::new(),
            processors: 2,
            memory_mib: 512,
            accelerator: Accelerator::Tcg,
            monitor: None,
            incoming: false,
        }
    }

    /// The QEMU command line without the serial ports. The demo prints it too.
    pub fn command(&self, kernel: &Path, initramfs: &Path) -> Command {
        let mut qemu = self.bare_command();
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        let options =
            format!("console=ttyS0 quiet panic=-1 mitigations=off strata.disks={}", self.disks.len());
        qemu.args(["-append", &options]);
        qemu
    }

    /// The QEMU command line of a machine that boots from its first disk, without the serial ports.
    pub fn bare_command(&self) -> Command {
        let mut qemu = Command::new(emulator());
        qemu.args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
        qemu.args(["-machine", "pc,memory-backend=mem", "-accel", self.accelerator.option(), "-cpu", "max"]);
        qemu.args(["-smp", &self.processors.to_string(), "-m", &self.memory_mib.to_string()]);
        // The daemon reads and writes guest memory, so the memory must be shared.
        qemu.args(["-object", &format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib)]);
        if let Some(monitor) = &self.monitor {
            qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        }
        if self.incoming {
            qemu.args(["-incoming", "defer"]);
        }
        for (number, disk) in self.disks.iter().enumerate() {
            // QEMU requires commas in option values to be doubled.
            let socket = disk.socket.display().to_string().replace(',', ",,");
            let reconnect = disk.reconnect.map_or_else(String::new, |option| format!(",{option}"));
            qemu.args(["-chardev", &format!("socket,id=disk{number},path={socket}{reconnect}")]);
            let switch = if disk.cache_switch { "" } else { ",config-wce=off" };
            let packed = if disk.packed { ",packed=on" } else { "" };
            let (queues, boot) = (disk.queues, number + 1);
            let device = format!(
                "vhost-user-blk-pci,chardev=disk{number},num-queues={queues},bootindex={boot}{switch}{packed}"
            );
            qemu.args(["-device", &device]);
        }
        qemu
    }
}

/// A report line of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// `@@ key=value`
    Fact {
        /// The key.
        key: String,
        /// The value, up to the end of the line.
        value: String,
    },
    /// The guest waits until [`Vm::proceed`].
    Checkpoint {
        /// The checkpoint's name in the script.
        name: String,
    },
    /// The script has ended; the guest powers off.
    Exit {
        /// The script's exit code.
        code: i32,
    },
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let (key, value) = line.trim().strip_prefix("@@ ")?.split_once('=')?;
        Some(match key {
            "checkpoint" => Self::Checkpoint { name: value.to_owned() },
            "exit" => Self::Exit { code: value.parse().unwrap_or(-1) },
            _ => Self::Fact { key: key.to_owned(), value: value.to_owned() },
        })
    }
}

/// A running guest.
pub struct Vm {
    process: Child,
    orders: ChildStdin,
    lines: Receiver<String>,
    initramfs: PathBuf,
    console: PathBuf,
    errors: PathBuf,
}

impl Vm {
    /// Starts QEMU. The console, QEMU's messages and this run's initramfs go to `folder`.
    pub fn boot(kit: &GuestKit, spec: &MachineSpec, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let initramfs = folder.join("initramfs.cpio");
        write_initramfs(kit, Some(&spec.script), &initramfs)?;
        let (console, errors) = (folder.join("console.log"), folder.join("qemu.log"));
        let mut qemu = spec.command(&kit.kernel, &initramfs);
        let console_path = console.display().to_string().replace(',', ",,");
        qemu.args([
            "-chardev",
            &format!("file,id=console,path={console_path}"),
            "-serial",
            "chardev:console",
        ]);
        qemu.args(["-chardev", "stdio,id=report,signal=off", "-serial", "chardev:report"]);
        qemu.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let mut process = qemu.spawn().context("cannot start qemu-system-x86_64")?;
        let orders = process.stdin.take().expect("stdin is a pipe");
        let reports = process.stdout.take().expect("stdout is a pipe");
        let (sender, lines) = channel();
        // The thread ends with QEMU, whose end closes the pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(reports).split(b'\n') {
                let Ok(line) = line else { break };
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, orders, lines, initramfs, console, errors })
    }

    /// The next report; `None` if QEMU has ended. Returns an error if `deadline` passes first.
    pub fn next_report(&mut self, deadline: Instant) -> Result<Option<Report>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(report) = Report::parse(&line) {
                        return Ok(Some(report));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the guest did not report in time\n{}", self.post_mortem())
                }
            }
        }
    }

    /// A report that is there already.
    pub fn waiting_report(&mut self) -> Option<Report> {
        self.lines.try_iter().find_map(|line| Report::parse(&line))
    }

    /// Lets a guest that waits at a checkpoint continue.
    pub fn proceed(&mut self) -> Result<()> {
        self.orders.write_all(b"\n").and_then(|()| self.orders.flush()).context("cannot write to QEMU")
    }

    /// Waits for QEMU to exit after its last report.
    pub fn wait(&mut self) -> Result<()> {
        let status = self.process.wait()?;
        if !status.success() {
            bail!("QEMU ended with {status}\n{}", self.post_mortem());
        }
        Ok(())
    }

    /// Ends the guest as a power cut would.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// The last lines of the console and of QEMU's own messages.
    pub fn post_mortem(&self) -> String {
        let end_of = |path: &Path, lines| {
            let bytes = std::fs::read(path).unwrap_or_default();
            command::tail(&String::from_utf8_lossy(&bytes), lines)
        };
        format!("--- QEMU ---\n{}\n--- console ---\n{}", end_of(&self.errors, 15), end_of(&self.console, 40))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // The process may have ended already, and a drop cannot return an error.
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The initramfs is large, and each run writes its own.
        let _ = std::fs::remove_file(&self.initramfs);
    }
}

/// Writes the kit's archive, followed by an archive with this run's files. Without a script the guest starts a shell.
pub fn write_initramfs(kit: &GuestKit, script: Option<&str>, path: &Path) -> Result<()> {
    let mut addition = Archive::new();
    addition.file("init", 0o755, include_bytes!("guest/init.sh"));
    addition.file("run/report.sh", 0o644, include_bytes!("guest/report.sh"));
    if let Some(script) = script {
        addition.file("run/script", 0o644, script.as_bytes());
    }
    std::fs::copy(&kit.initramfs, path).with_context(|| format!("cannot write {}", path.display()))?;
    File::options().append(true).open(path)?.write_all(&addition.finish())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_with_the_marker_are_reports() {
        let fact = |key: &str, value: &str| Report::Fact { key: key.to_owned(), value: value.to_owned() };
        assert_eq!(Report::parse("@@ disk.bytes=12\r"), Some(fact("disk.bytes", "12")));
        assert_eq!(Report::parse("@@ file=ab c=d"), Some(fact("file", "ab c=d")));
        assert_eq!(Report::parse("@@ checkpoint=mkfs"), Some(Report::Checkpoint { name: "mkfs".to_owned() }));
        assert_eq!(Report::parse("@@ exit=0"), Some(Report::Exit { code: 0 }));
        assert_eq!(Report::parse("disk.bytes=12"), None);
        assert_eq!(Report::parse("@@ nothing"), None);
    }

    #[test]
    fn qemus_version_is_parsed() {
        let said = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright (c) 2003-2025";
        assert_eq!(qemu_version(said), Some((10, 0)));
        assert_eq!(qemu_version("QEMU emulator version 7.2.17"), Some((7, 2)));
        assert_eq!(qemu_version("QEMU"), None);
    }

    #[test]
    fn the_command_line_shares_memory_and_names_every_disk() {
        let disk = |path: &str| Disk {
            socket: PathBuf::from(path),
            queues: 2,
            cache_switch: true,
            packed: path.contains('c'),
            reconnect: path.contains('c').then_some("reconnect=1"),
        };
        let spec = MachineSpec { disks: vec![disk("/a,b"), disk("/c")], ..MachineSpec::new(String::new()) };
        let line = command::shown(&spec.command(Path::new("k"), Path::new("i")));
        assert!(line.contains("memory-backend-memfd,id=mem,size=512M,share=on"));
        assert!(line.contains("socket,id=disk0,path=/a,,b "));
        assert!(line.contains("socket,id=disk1,path=/c,reconnect=1 "));
        assert!(line.contains("vhost-user-blk-pci,chardev=disk0,num-queues=2,bootindex=1 "));
        assert!(line.contains("vhost-user-blk-pci,chardev=disk1,num-queues=2,bootindex=2,packed=on "));
        assert!(line.contains("strata.disks=2"));
    }
}
