//! The rules that keep data safe, each a plain function, with the deliberate breakages of the rule beside its answer.
//!
//! The code that follows a rule names no breakage. Owns no state and does nothing: every function only answers.

pub(crate) mod change;
pub(crate) mod clusters;
pub(crate) mod order;
pub(crate) mod places;
pub(crate) mod reuse;
