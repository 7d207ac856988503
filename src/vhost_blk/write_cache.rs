//! The guest's write cache as the `writeback` byte of the configuration space has it, and how sure the session is of it.
//!
//! A guest that turned its cache off relies on every write being durable when it is answered. A frontend that connects
//! again may not say so again. So the in-flight region keeps the byte, and a ring that another session served without
//! a record begins with the cache off.

use crate::config::CONFIG_WCE;

/// The write cache of a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteCache {
    on: bool,
    /// The guest set it in this session, or the region had it, or the session turned it off to be on the safe side.
    known: bool,
}

impl WriteCache {
    /// On, as after a reset of the device.
    pub(crate) fn new() -> Self {
        WriteCache { on: true, known: false }
    }

    /// Whether it is on.
    pub(crate) fn is_on(self) -> bool {
        self.on
    }

    /// The value, if it is known to be the guest's.
    pub(crate) fn known(self) -> Option<bool> {
        self.known.then_some(self.on)
    }

    /// The guest sets it.
    pub(crate) fn set(&mut self, on: bool) {
        *self = WriteCache { on, known: true };
    }

    /// A region has the value of an earlier session. That of this session is newer.
    pub(crate) fn take_over(&mut self, kept: Option<bool>) {
        if let (false, Some(on)) = (self.known, kept) {
            self.set(on);
        }
    }

    /// With these features the guest may have turned it off in an earlier session, and nobody has said so.
    pub(crate) fn is_unsure(self, features: u64) -> bool {
        features & CONFIG_WCE != 0 && !self.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_word_counts() {
        let mut cache = WriteCache::new();
        assert_eq!((cache.is_on(), cache.known()), (true, None));
        cache.take_over(None);
        assert_eq!(cache.known(), None);
        cache.take_over(Some(false));
        assert_eq!(cache.known(), Some(false));
        cache.set(true);
        cache.take_over(Some(false));
        assert_eq!(cache.known(), Some(true));
        assert!(!cache.is_unsure(CONFIG_WCE));
    }

    #[test]
    fn it_is_sure_where_the_guest_cannot_change_it() {
        assert!(!WriteCache::new().is_unsure(!CONFIG_WCE));
        assert!(WriteCache::new().is_unsure(CONFIG_WCE));
    }
}
