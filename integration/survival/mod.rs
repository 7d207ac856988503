//! What a disk may hold after its daemon was killed: the contents that tell where they belong, the record of what was
//! asked and answered, and a guest that keeps two queues busy until the daemon is gone.
//!
//! Knows neither the daemon nor the image; see kill.rs for those.

pub mod guest;
pub mod ledger;
pub mod stamp;
