//! The maps that the engine keeps under its lock.

/// A hash map whose hash is cheap, and seeded anew in each process: keys come from images, and whoever makes one must not
/// be able to choose them so that they collide. Against a guest that finds collisions by timing its requests that is no
/// proof; but these maps are bounded, and what it slows down is its own disk.
pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
