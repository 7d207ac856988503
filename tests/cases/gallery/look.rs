//! The look of a gallery image: a value of each axis. A recipe is a look, a seed, and the steps left out. Its one line
//! is enough to make the image again and repeat all steps.
//!
//! Owns the axes, the impossible combinations, and the line. It makes no image.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// One axis: its name in a line, and the names of its values. The first is the simplest.
pub struct Axis {
    pub name: &'static str,
    pub values: &'static [&'static str],
}

macro_rules! axes {
    ($(
        $(#[$about:meta])*
        $field:ident: $axis:ident { $($value:ident = $name:literal),+ $(,)? }
    )+) => {
        $(
            $(#[$about])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub enum $axis { $($value),+ }
        )+

        /// A value of each axis.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Look { $(pub $field: $axis),+ }

        pub const AXES: [Axis; [$(stringify!($field)),+].len()] =
            [$(Axis { name: stringify!($field), values: &[$($name),+] }),+];

        impl Look {
            /// The index of each value in its axis.
            pub fn choice(self) -> Choice {
                [$(self.$field as usize),+]
            }

            /// The look with the values at these indices.
            pub fn of(choice: &Choice) -> Look {
                let mut places = choice.iter();
                let mut next = || *places.next().expect("a place for each axis");
                Look { $($field: [$($axis::$value),+][next()]),+ }
            }
        }
    };
}

/// The index of a value in each axis.
pub type Choice = [usize; AXES.len()];

axes! {
    version: Version { V3 = "3", V2 = "2" }
    /// Bytes of a cluster.
    cluster: Cluster {
        K64 = "64K", B512 = "512", K1 = "1K", K2 = "2K", K4 = "4K", K8 = "8K", K16 = "16K", K32 = "32K",
        K128 = "128K", K256 = "256K", K512 = "512K", M1 = "1M", M2 = "2M",
    }
    /// Bits of a refcount.
    refcount: Refcount { B16 = "16", B1 = "1", B2 = "2", B4 = "4", B8 = "8", B32 = "32", B64 = "64" }
    l2: L2 { Plain = "plain", Extended = "extended" }
    lazy: Lazy { Off = "off", On = "on" }
    /// The compression of some of the clusters.
    compression: Compression { Nothing = "none", Deflate = "zlib", Zstd = "zstd" }
    /// The file that holds the guest's data.
    data: Data { Inside = "inside", File = "file", Raw = "raw-file" }
    /// The backing chain of the image.
    below: Below {
        Nothing = "nothing", Raw = "raw", RawShort = "raw-short", RawLong = "raw-long",
        RawRagged = "raw-ragged", Same = "same", Short = "short", Long = "long", Old = "old",
        Packed = "packed", Parts = "parts", Deep = "deep",
    }
    /// Whether the disk ends at the end of a cluster, or within one.
    size: Size { Whole = "whole", Odd = "odd" }
    preallocation: Allocated { Off = "off", Metadata = "metadata", Falloc = "falloc", Full = "full" }
    /// Internal snapshots: some from QEMU, some made later, or as many as the refcounts can hold.
    snapshots: Snapshots { Nothing = "none", Theirs = "theirs", Later = "later", Full = "full" }
    /// The memory that the disk may use for tables.
    memory: Memory { Ample = "ample", Scarce = "scarce" }
    /// Whether zeros in the guest's writes are detected.
    zeros: Zeros { Off = "written", On = "detected", Unmap = "detected-unmap" }
    /// The handling of discards. With `keep`, discarded clusters keep their locations.
    discards: Discarding { Unmap = "unmap", Ignore = "ignore", Keep = "keep" }
}

impl Cluster {
    pub fn bytes(self) -> u64 {
        1 << match self {
            Self::B512 => 9,
            Self::K1 => 10,
            Self::K2 => 11,
            Self::K4 => 12,
            Self::K8 => 13,
            Self::K16 => 14,
            Self::K32 => 15,
            Self::K64 => 16,
            Self::K128 => 17,
            Self::K256 => 18,
            Self::K512 => 19,
            Self::M1 => 20,
            Self::M2 => 21,
        }
    }
}

impl Refcount {
    pub fn bits(self) -> u8 {
        match self {
            Self::B1 => 1,
            Self::B2 => 2,
            Self::B4 => 4,
            Self::B8 => 8,
            Self::B16 => 16,
            Self::B32 => 32,
            Self::B64 => 64,
        }
    }

    /// The most snapshots that can share a cluster with the disk.
    pub fn snapshots_max(self) -> u64 {
        qcow2::refcount_max(self.bits().trailing_zeros()) - 1
    }
}

impl Look {
    /// False for a look that no tool can make, or that would take too long.
    pub fn is_possible(&self) -> bool {
        let old = self.version == Version::V2;
        let needs_3 = self.refcount != Refcount::B16
            || self.l2 == L2::Extended
            || self.lazy == Lazy::On
            || self.compression == Compression::Zstd
            || self.data != Data::Inside
            || self.discards == Discarding::Keep;
        let extended = self.l2 == L2::Extended;
        let outside = self.data != Data::Inside;
        let is_based = self.below != Below::Nothing;
        let has_snapshots = self.snapshots != Snapshots::Nothing;
        let rules = [
            !(old && needs_3),
            // Subclusters are at least a sector long.
            !extended || self.cluster.bytes() >= 16384,
            // An external data file has neither compressed clusters nor snapshots; a raw one is the whole disk.
            !outside || (self.compression == Compression::Nothing && !has_snapshots),
            self.data != Data::Raw || !is_based,
            // Allocated clusters hide the backing file, unless there are subclusters.
            self.preallocation == Allocated::Off || !is_based || extended,
            // A count of one bit leaves no room for a snapshot.
            self.refcount != Refcount::B1 || !has_snapshots || self.snapshots == Snapshots::Full,
            // The most possible snapshots are 1, 3, 15 or 255. Each has a cluster for its L1 table.
            self.snapshots != Snapshots::Full || self.refcount.bits() <= 8,
            self.snapshots != Snapshots::Full
                || self.refcount != Refcount::B8
                || self.cluster.bytes() <= 65536,
        ];
        rules.into_iter().all(|kept| kept)
    }

    /// The name of the value on an axis.
    fn name(self, axis: usize) -> &'static str {
        AXES[axis].values[self.choice()[axis]]
    }
}

/// Everything that determines an image and its trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    pub look: Look,
    pub seed: u64,
    /// The numbers of the steps that are skipped.
    pub without: BTreeSet<usize>,
}

/// Why a line is no recipe.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("\"{word}\" is no word of a recipe")]
pub struct NoRecipe {
    pub word: String,
}

impl fmt::Display for Recipe {
    /// Names only the values that are not the simplest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (axis, place) in self.look.choice().into_iter().enumerate() {
            if place > 0 {
                write!(f, "{}={} ", AXES[axis].name, self.look.name(axis))?;
            }
        }
        write!(f, "seed={}", self.seed)?;
        for step in &self.without {
            write!(f, " without={step}")?;
        }
        Ok(())
    }
}

impl FromStr for Recipe {
    type Err = NoRecipe;

    fn from_str(line: &str) -> Result<Self, NoRecipe> {
        let mut choice: Choice = [0; AXES.len()];
        let (mut seed, mut without) = (0, BTreeSet::new());
        for word in line.split_whitespace() {
            let wrong = || NoRecipe { word: word.to_owned() };
            let (name, value) = word.split_once('=').ok_or_else(wrong)?;
            match name {
                "seed" => seed = value.parse().map_err(|_| wrong())?,
                "without" => {
                    without.insert(value.parse().map_err(|_| wrong())?);
                }
                _ => {
                    let axis = AXES.iter().position(|axis| axis.name == name).ok_or_else(wrong)?;
                    let known = AXES[axis].values.iter().position(|known| *known == value);
                    choice[axis] = known.ok_or_else(wrong)?;
                }
            }
        }
        Ok(Recipe { look: Look::of(&choice), seed, without })
    }
}
