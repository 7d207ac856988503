//! The contents that a disk may have after its daemon was killed. Sectors describe themselves, a ledger has all
//! requests, and a guest keeps two queues busy until the kill.
//!
//! It knows neither the daemon nor the image; kill.rs does.

pub mod guest;
pub mod ledger;
pub mod stamp;
