//! The contents that a disk may have after its daemon was killed: sectors that describe themselves, a ledger of all
//! requests, and a guest that keeps two queues busy until the kill.
//!
//! It knows neither the daemon nor the image; kill.rs does.

pub mod guest;
pub mod ledger;
pub mod stamp;
