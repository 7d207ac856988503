//! One crash: which of the open operations it keeps, and how much of each.
//!
//! `crash` makes the plans; `replay` makes the image that one leaves.

use std::borrow::Cow;

use crate::Ranges;

/// A crash: what it keeps of what is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrashPlan {
    /// The operations of which bytes are kept, in the order of their pushes.
    pub(crate) kept: Vec<(usize, Kept)>,
    /// How many of the open changes of length are kept.
    pub(crate) lengths: usize,
}

/// What a crash keeps of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// All bytes that are open.
    Whole,
    /// The bytes within these ranges.
    Torn(Ranges),
}

impl CrashPlan {
    /// Nothing is kept but what is durable.
    pub fn nothing() -> Self {
        CrashPlan { kept: Vec::new(), lengths: 0 }
    }

    /// The part of an operation's bytes that is kept.
    pub(crate) fn kept_bytes<'a>(&self, operation: usize, bytes: &'a Ranges) -> Option<Cow<'a, Ranges>> {
        let at = self.kept.binary_search_by_key(&operation, |(operation, _)| *operation).ok()?;
        let kept = match &self.kept[at].1 {
            Kept::Whole => Cow::Borrowed(bytes),
            Kept::Torn(part) => Cow::Owned(bytes.intersect(part)),
        };
        (!kept.is_empty()).then_some(kept)
    }
}
