//! The record of what each sector of a disk was asked to hold, and so of what it may hold after a kill.
//!
//! A write counts as durable once a flush that was sent after the write's answer has been answered. After a kill a
//! sector may hold what its last durable write gave it, or what any later one was to give it, answered or not; nothing
//! older. No two requests in flight may touch the same sector, so each sector's writes have an order; they may well
//! touch the same cluster.

use std::ops::Range;

use super::stamp::{Foreign, SECTOR, Value, read};

/// A write of one sector.
#[derive(Clone, Copy, Debug)]
struct Entry {
    value: Value,
    /// When it was answered.
    answered: Option<Tick>,
}

/// A moment of the record's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(u64);

/// The record of a whole disk. Ranges are in sectors.
pub struct Ledger {
    /// Oldest first; the first is durable, and there always is one.
    sectors: Vec<Vec<Entry>>,
    /// A request in flight touches it.
    busy: Vec<bool>,
    /// Sectors with more than one entry, some of them twice.
    open: Vec<usize>,
    now: Tick,
}

impl Ledger {
    /// A disk whose contents are known.
    pub fn new(values: impl Iterator<Item = Value>) -> Self {
        let durable = |value| vec![Entry { value, answered: Some(Tick(0)) }];
        let sectors: Vec<_> = values.map(durable).collect();
        Self { busy: vec![false; sectors.len()], sectors, open: Vec::new(), now: Tick(0) }
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    fn tick(&mut self) -> Tick {
        self.now.0 += 1;
        self.now
    }

    /// Whether no request in flight touches the range.
    pub fn is_free(&self, range: Range<usize>) -> bool {
        !self.busy[range].contains(&true)
    }

    /// A read is sent.
    pub fn read_sent(&mut self, range: Range<usize>) {
        self.busy[range].fill(true);
    }

    /// A read was answered with these bytes: every sector holds what was last written.
    ///
    /// # Errors
    /// Says what is wrong with the first sector that does not.
    pub fn read_answered(&mut self, range: Range<usize>, bytes: &[u8]) -> Result<(), String> {
        self.busy[range.clone()].fill(false);
        for (sector, found) in range.zip(bytes.chunks(SECTOR as usize)) {
            let found = read(found, sector as u64 * SECTOR);
            let latest = self.sectors[sector].last().map(|entry| entry.value);
            if found.ok() != latest {
                return Err(self.wrong("a read while the daemon lived", sector, found));
            }
        }
        Ok(())
    }

    /// A request that gives the range this value is sent.
    pub fn write_sent(&mut self, range: Range<usize>, value: Value) {
        self.busy[range.clone()].fill(true);
        self.open.extend(range.clone());
        for entries in &mut self.sectors[range] {
            entries.push(Entry { value, answered: None });
        }
    }

    /// It was answered.
    pub fn write_answered(&mut self, range: Range<usize>) {
        let now = self.tick();
        self.busy[range.clone()].fill(false);
        for entries in &mut self.sectors[range] {
            if let Some(last) = entries.last_mut() {
                last.answered = Some(now);
            }
        }
    }

    /// A flush is sent.
    pub fn flush_sent(&mut self) -> Tick {
        self.tick()
    }

    /// The flush that was sent at that moment was answered: what had been answered by then is durable.
    pub fn flush_answered(&mut self, sent: Tick) {
        let sectors = &mut self.sectors;
        self.open.sort_unstable();
        self.open.dedup();
        self.open.retain(|sector| {
            let entries = &mut sectors[*sector];
            let durable = entries.iter().rposition(|entry| entry.answered.is_some_and(|at| at <= sent));
            entries.drain(..durable.unwrap_or(0));
            entries.len() > 1
        });
    }

    /// After a kill: each sector of the disk holds one of the values that it may. From now on it holds just that, as
    /// nothing of the dead daemon is left that could change it.
    ///
    /// # Errors
    /// Says what is wrong with the first few sectors, and how many there are.
    pub fn settle(&mut self, disk: &[u8]) -> Result<(), String> {
        assert_eq!(disk.len(), self.sectors.len() * SECTOR as usize, "the whole disk is looked at");
        let mut wrong = Vec::new();
        for (sector, bytes) in disk.chunks(SECTOR as usize).enumerate() {
            let found = read(bytes, sector as u64 * SECTOR);
            match found {
                Ok(value) if self.sectors[sector].iter().any(|entry| entry.value == value) => {
                    self.sectors[sector] = vec![Entry { value, answered: Some(Tick(0)) }];
                }
                _ => wrong.push(self.wrong("after a kill", sector, found)),
            }
        }
        self.busy.fill(false);
        self.open.clear();
        if wrong.is_empty() {
            return Ok(());
        }
        let count = wrong.len();
        wrong.truncate(4);
        Err(format!("{count} sectors are wrong:\n{}", wrong.join("\n")))
    }

    fn wrong(&self, when: &str, sector: usize, found: Result<Value, Foreign>) -> String {
        let found = match found {
            Ok(value) => format!("{value:?}"),
            Err(foreign) => format!("{foreign:?}"),
        };
        let offset = sector as u64 * SECTOR;
        format!("{when}: offset {offset:#x} holds {found}, not one of {:?}", self.sectors[sector])
    }
}

#[cfg(test)]
mod tests {
    use super::super::stamp::fill;
    use super::*;

    fn disk(generation: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        if generation > 0 {
            fill(&mut bytes, 0, generation);
        }
        bytes
    }

    /// A sector: 1 is written and flushed, 2 answered, 3 sent.
    fn ledger() -> Ledger {
        let mut ledger = Ledger::new([Value::Zero].into_iter());
        ledger.write_sent(0..1, Value::Written(1));
        ledger.write_answered(0..1);
        let flush = ledger.flush_sent();
        ledger.write_sent(0..1, Value::Written(2));
        ledger.write_answered(0..1);
        ledger.flush_answered(flush);
        ledger.write_sent(0..1, Value::Written(3));
        ledger
    }

    #[test]
    fn the_last_durable_value_and_all_later_ones_may_be_found() {
        for generation in 1..=3 {
            ledger().settle(&disk(generation)).expect("one of the values");
        }
        ledger().settle(&disk(0)).expect_err("from before a flush that was answered");
        ledger().settle(&disk(4)).expect_err("never written");
    }

    #[test]
    fn what_was_found_once_stays() {
        let mut ledger = ledger();
        assert!(!ledger.is_free(0..1));
        ledger.settle(&disk(2)).expect("one of the values");
        assert!(ledger.is_free(0..1));
        ledger.settle(&disk(3)).expect_err("nobody wrote it since");
        ledger.read_answered(0..1, &disk(2)).expect("what is there");
    }

    #[test]
    fn a_flush_covers_only_what_was_answered_before_it_was_sent() {
        let mut ledger = Ledger::new([Value::Zero].into_iter());
        ledger.write_sent(0..1, Value::Written(1));
        let flush = ledger.flush_sent();
        ledger.write_answered(0..1);
        ledger.flush_answered(flush);
        ledger.settle(&disk(0)).expect("the write may be lost");
    }
}
