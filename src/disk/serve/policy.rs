//! Policies above the image format: whether writes of zeros become write zeroes, and what discards do.

use engine::ZeroMode;

use crate::options::{DetectZeroes, Discards};

/// How a disk treats zeros.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ZeroPolicy {
    pub detect: DetectZeroes,
    pub discards: Discards,
}

impl ZeroPolicy {
    /// How to zero a range. `unmap`: the guest permits giving its space back.
    pub fn mode(&self, unmap: bool) -> ZeroMode {
        if unmap && self.discards == Discards::Unmap { ZeroMode::Unmap } else { ZeroMode::Keep }
    }

    /// How to zero a range that the guest has written as zeros.
    pub fn mode_of_detected(&self) -> ZeroMode {
        self.mode(self.detect == DetectZeroes::Unmap)
    }
}
