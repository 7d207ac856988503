//! Files that are not qcow2 images: their format by the bytes that mark it.
//!
//! Owns the marks. A found format is only reported to people. It never decides how a file is opened, because a guest
//! can write any bytes.

/// Bytes examined from the start of a file.
pub(crate) const HEAD: u64 = 512;
/// Where an ISO 9660 file system has its first volume descriptor.
pub(crate) const ISO_DESCRIPTOR: u64 = 0x8000;

/// A format that is not served, by its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// An empty file.
    Empty,
    /// QEMU's qcow2: foreign only where raw is expected.
    Qcow2,
    /// QEMU's qcow, version 1.
    Qcow1,
    /// QEMU's QED.
    Qed,
    /// VMware's.
    Vmdk,
    /// Hyper-V's newer one.
    Vhdx,
    /// Hyper-V's older one, Virtual PC's and Azure's.
    Vhd,
    /// VirtualBox's.
    Vdi,
    /// Parallels'.
    Parallels,
    /// Apple's disk image.
    Dmg,
    /// An encrypted volume.
    Luks,
    /// The file system of a CD or DVD.
    Iso9660,
    /// Compressed by gzip.
    Gzip,
    /// Compressed by xz.
    Xz,
    /// Compressed by zstd.
    Zstd,
    /// Compressed by bzip2.
    Bzip2,
    /// Compressed by lz4.
    Lz4,
    /// A zip archive.
    Zip,
    /// A tar archive, as an OVA is one.
    Tar,
}

/// Marks at the start of a file: offset, bytes, and format.
const MARKS: &[(usize, &[u8], Foreign)] = &[
    (0, b"QFI\xfb\x00\x00\x00\x01", Foreign::Qcow1),
    (0, b"QFI\xfb", Foreign::Qcow2),
    (0, b"QED\x00", Foreign::Qed),
    (0, b"KDMV", Foreign::Vmdk),
    (0, b"COWD", Foreign::Vmdk),
    (0, b"# Disk DescriptorFile", Foreign::Vmdk),
    (0, b"vhdxfile", Foreign::Vhdx),
    (0, b"conectix", Foreign::Vhd),
    (0x40, b"\x7f\x10\xda\xbe", Foreign::Vdi),
    (0, b"WithoutFreeSpace", Foreign::Parallels),
    (0, b"WithouFreSpacExt", Foreign::Parallels),
    (0, b"LUKS\xba\xbe", Foreign::Luks),
    (0, b"\x1f\x8b", Foreign::Gzip),
    (0, b"\xfd7zXZ\x00", Foreign::Xz),
    (0, b"\x28\xb5\x2f\xfd", Foreign::Zstd),
    (0, b"BZh", Foreign::Bzip2),
    (0, b"\x04\x22\x4d\x18", Foreign::Lz4),
    (0, b"PK\x03\x04", Foreign::Zip),
    (257, b"ustar", Foreign::Tar),
];

impl Foreign {
    /// The format by the bytes at the start of a file, in the sector of an ISO's volume descriptor, and at the end.
    pub fn of_bytes(head: &[u8], descriptor: &[u8], tail: &[u8]) -> Option<Self> {
        let marked = |at: usize, mark: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(mark));
        let found = MARKS.iter().find(|(at, mark, _)| marked(*at, mark)).map(|(.., format)| *format);
        found
            .or_else(|| tail.starts_with(b"conectix").then_some(Foreign::Vhd))
            .or_else(|| tail.starts_with(b"koly").then_some(Foreign::Dmg))
            .or_else(|| (descriptor.get(1..6) == Some(b"CD001")).then_some(Foreign::Iso9660))
    }

    /// The format as the end of a sentence that begins with "the file".
    pub fn in_words(self) -> &'static str {
        match self {
            Foreign::Empty => "is empty",
            Foreign::Qcow2 => "is a qcow2 image",
            Foreign::Qcow1 => "is a qcow image of version 1",
            Foreign::Qed => "is a QED image",
            Foreign::Vmdk => "is a VMDK image (VMware)",
            Foreign::Vhdx => "is a VHDX image (Hyper-V)",
            Foreign::Vhd => "is a VHD image (Hyper-V, Azure)",
            Foreign::Vdi => "is a VDI image (VirtualBox)",
            Foreign::Parallels => "is a Parallels image",
            Foreign::Dmg => "is a DMG image (macOS)",
            Foreign::Luks => "is a LUKS volume, which is encrypted",
            Foreign::Iso9660 => "is an ISO 9660 image (CD or DVD)",
            Foreign::Gzip => "is compressed by gzip",
            Foreign::Xz => "is compressed by xz",
            Foreign::Zstd => "is compressed by zstd",
            Foreign::Bzip2 => "is compressed by bzip2",
            Foreign::Lz4 => "is compressed by lz4",
            Foreign::Zip => "is a zip archive",
            Foreign::Tar => "is a tar archive (an OVA is one)",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_recognised_by_their_magic() {
        for (at, mark, format) in MARKS {
            let mut head = vec![0; HEAD as usize];
            head[*at..*at + mark.len()].copy_from_slice(mark);
            assert_eq!(Foreign::of_bytes(&head, &[], &[]), Some(*format));
            head[*at] ^= 1;
            assert_ne!(Foreign::of_bytes(&head, &[], &[]), Some(*format));
        }
        let head = [0; HEAD as usize];
        assert_eq!(Foreign::of_bytes(&head, b"\x01CD001\x01", &[]), Some(Foreign::Iso9660));
        assert_eq!(Foreign::of_bytes(&head, &[], b"conectix"), Some(Foreign::Vhd));
        assert_eq!(Foreign::of_bytes(&head, &[], b"koly"), Some(Foreign::Dmg));
        assert_eq!(Foreign::of_bytes(&head, &[0; 512], &[0; 512]), None);
        assert_eq!(Foreign::of_bytes(b"Q", b"\x01", b"k"), None);
    }
}
