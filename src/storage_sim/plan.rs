//! One crash: which of the open operations it keeps, and how much of each.
//!
//! `crash` makes the plans; `replay` makes the image that one leaves.

use std::borrow::Cow;

use crate::Ranges;

/// A crash: the open operations that it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashPlan {
    /// The operations of which bytes are kept, in the order of their pushes.
    pub(crate) kept: Vec<(usize, Kept)>,
    /// How many of the open changes of length are kept.
    pub(crate) lengths: usize,
}

/// The part of one operation that a crash keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// All bytes that are open.
    Whole,
    /// The bytes within these ranges.
    Torn(Ranges),
}

impl CrashPlan {
    /// Keeps only the durable state.
    pub fn nothing() -> Self {
        CrashPlan { kept: Vec::new(), lengths: 0 }
    }

    /// The bytes of an operation that are kept.
    pub(crate) fn kept_bytes<'a>(&self, operation: usize, bytes: &'a Ranges) -> Option<Cow<'a, Ranges>> {
        let at = self.kept.binary_search_by_key(&operation, |(operation, _)| *operation).ok()?;
        let kept = match &self.kept[at].1 {
            Kept::Whole => Cow::Borrowed(bytes),
            Kept::Torn(part) => Cow::Owned(bytes.intersect(part)),
        };
        (!kept.is_empty()).then_some(kept)
    }
}
