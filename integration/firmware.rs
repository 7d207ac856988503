//! Programs that a machine's firmware starts from a disk, and the wait for what they say.
//!
//! Each program writes a text to the first serial port and then does nothing more. They are written as bytes, with the
//! instruction beside them, so that no assembler is needed.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Bytes of a sector.
const SECTOR: usize = 512;

/// A disk for a BIOS: its first sector reads the sector `far`, and prints the text there.
pub fn boot_disk(far: u32, text: &str) -> Vec<u8> {
    #[rustfmt::skip]
    let code = [
        0x31, 0xc0,             // xor ax, ax
        0x8e, 0xd8,             // mov ds, ax
        0x8e, 0xc0,             // mov es, ax
        0xbe, 0x20, 0x7c,       // mov si, packet
        0xb4, 0x42,             // mov ah, 0x42: read sectors by their number
        0xcd, 0x13,             // int 0x13
        0x72, 0xfe,             // jc $: not read, nothing is said
        0xbe, 0x00, 0x7e,       // mov si, 0x7e00
        0xac,                   // next: lodsb
        0x84, 0xc0,             // test al, al
        0x74, 0x06,             // jz done
        0xba, 0xf8, 0x03,       // mov dx, 0x3f8
        0xee,                   // out dx, al
        0xeb, 0xf5,             // jmp next
        0xf4,                   // done: hlt
        0xeb, 0xfd,             // jmp done
        0x10, 0x00, 0x01, 0x00, // packet: its length; one sector
        0x00, 0x7e, 0x00, 0x00, // to 0:0x7e00
    ];
    let mut disk = vec![0; (far as usize + 1) * SECTOR];
    disk[..code.len()].copy_from_slice(&code);
    disk[code.len()..code.len() + 4].copy_from_slice(&far.to_le_bytes());
    disk[SECTOR - 2..SECTOR].copy_from_slice(&[0x55, 0xaa]);
    let at = far as usize * SECTOR;
    disk[at..at + text.len()].copy_from_slice(text.as_bytes());
    disk
}

/// A program for UEFI that prints the text: a PE32+ file of one section (PE format, "Optional header").
pub fn efi_program(text: &str) -> Vec<u8> {
    const HEADERS: u32 = 0x200;
    const CODE: u32 = 0x1000;
    #[rustfmt::skip]
    let code = [
        0x48, 0x8d, 0x35, 0x0f, 0x00, 0x00, 0x00, // lea rsi, [rip + 15]: the text
        0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8
        0xac,                                     // next: lodsb
        0x84, 0xc0,                               // test al, al
        0x74, 0x03,                               // jz done
        0xee,                                     // out dx, al
        0xeb, 0xf8,                               // jmp next
        0xf4,                                     // done: hlt
        0xeb, 0xfd,                               // jmp done
    ];
    let mut file = vec![0; HEADERS as usize + 0x200];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let (coff, optional, section) = (0x44, 0x58, 0x148);
    put(0, b"MZ");
    put(0x3c, &0x40u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    put(coff, &0x8664u16.to_le_bytes());
    put(coff + 2, &1u16.to_le_bytes()); // one section
    put(coff + 16, &240u16.to_le_bytes()); // bytes of the optional header
    put(coff + 18, &0x22u16.to_le_bytes()); // executable, large addresses
    put(optional, &0x20bu16.to_le_bytes());
    put(optional + 4, &0x200u32.to_le_bytes()); // bytes of code
    put(optional + 16, &CODE.to_le_bytes()); // entry
    put(optional + 20, &CODE.to_le_bytes());
    put(optional + 32, &0x1000u32.to_le_bytes()); // alignment in memory
    put(optional + 36, &0x200u32.to_le_bytes()); // alignment in the file
    put(optional + 56, &0x2000u32.to_le_bytes()); // bytes in memory
    put(optional + 60, &HEADERS.to_le_bytes());
    put(optional + 68, &10u16.to_le_bytes()); // an EFI application
    put(optional + 108, &16u32.to_le_bytes()); // directories, all empty
    put(section, b".text");
    put(section + 8, &0x200u32.to_le_bytes());
    put(section + 12, &CODE.to_le_bytes());
    put(section + 16, &0x200u32.to_le_bytes());
    put(section + 20, &HEADERS.to_le_bytes());
    put(section + 36, &0x6000_0020u32.to_le_bytes()); // code, executable, readable
    put(HEADERS as usize, &code);
    put(HEADERS as usize + code.len(), text.as_bytes());
    file
}

/// Starts a machine whose first serial port is watched until it has said the text. Then the machine is ended.
///
/// # Errors
/// When it does not say so in time.
pub fn says(qemu: &mut Command, text: &str, patience: Duration) -> Result<()> {
    qemu.args(["-chardev", "stdio,id=port,signal=off", "-serial", "chardev:port"]);
    let mut process = qemu
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    let mut port = process.stdout.take().expect("a pipe");
    let (sender, bytes) = channel();
    // It ends with QEMU, whose end closes the pipe.
    std::thread::spawn(move || {
        let mut some = [0; 256];
        while let Ok(length @ 1..) = port.read(&mut some) {
            if sender.send(some[..length].to_vec()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + patience;
    let mut heard = Vec::new();
    let found = loop {
        if heard.windows(text.len()).any(|window| window == text.as_bytes()) {
            break true;
        }
        match bytes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(some) => heard.extend(some),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break false,
        }
    };
    // It may have ended already.
    let _ = process.kill();
    let ended = process.wait_with_output()?;
    if !found {
        let heard = String::from_utf8_lossy(&heard).into_owned();
        bail!("the machine says {heard:?}, and QEMU {}", String::from_utf8_lossy(&ended.stderr));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_disk_names_its_far_sector() {
        let disk = boot_disk(3, "hello");
        assert_eq!(disk.len(), 4 * SECTOR);
        assert_eq!(&disk[510..512], &[0x55, 0xaa]);
        assert_eq!(&disk[0x28..0x2c], &3u32.to_le_bytes());
        assert_eq!(&disk[3 * SECTOR..3 * SECTOR + 6], b"hello\0");
    }

    #[test]
    fn an_efi_program_has_its_text_behind_its_code() {
        let file = efi_program("hello");
        assert_eq!(&file[0x216..0x21c], b"hello\0");
        assert_eq!(&file[0x40..0x46], b"PE\0\0\x64\x86");
    }
}
