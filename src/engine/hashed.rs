//! The maps that the engine keeps under its lock.

/// A hash map with a cheap hash that has a new seed in each process. Keys come from images, and the author of an image
/// must not be able to choose keys that collide. A guest could still find collisions by timing its requests. But these
/// maps are bounded, and the guest would only slow down its own disk.
pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
