//! The ledger of all writes to each sector of a disk, from which follows what the sector may hold after a kill.
//!
//! A write is durable once a flush that was sent after the write's completion has completed. After a kill a sector
//! may hold the value of its last durable write, or of any later write, completed or not. It must hold nothing
//! older. No two requests in flight touch the same sector, so each sector's writes have an order; they may touch
//! the same cluster.

use std::ops::Range;

use super::stamp::{Foreign, SECTOR, Value, read};

/// A write of one sector.
#[derive(Clone, Copy, Debug)]
struct Entry {
    value: Value,
    /// When it completed.
    answered: Option<Tick>,
}

/// A moment of the ledger's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(u64);

/// The ledger of a whole disk. Ranges are in sectors.
pub struct Ledger {
    /// The entries of each sector, oldest first; the first is durable and always exists.
    sectors: Vec<Vec<Entry>>,
    /// Sectors that a request in flight touches.
    busy: Vec<bool>,
    /// Sectors with more than one entry; may list a sector twice.
    open: Vec<usize>,
    now: Tick,
}

impl Ledger {
    /// The ledger of a disk with known contents.
    pub fn new(values: impl Iterator<Item = Value>) -> Self {
        let durable = |value| vec![Entry { value, answered: Some(Tick(0)) }];
        let sectors: Vec<_> = values.map(durable).collect();
        Self { busy: vec![false; sectors.len()], sectors, open: Vec::new(), now: Tick(0) }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    fn tick(&mut self) -> Tick {
        self.now.0 += 1;
        self.now
    }

    /// True if no request in flight touches the range.
    pub fn is_free(&self, range: Range<usize>) -> bool {
        !self.busy[range].contains(&true)
    }

    /// Notes that a read is sent.
    pub fn read_sent(&mut self, range: Range<usize>) {
        self.busy[range].fill(true);
    }

    /// Notes that a read has completed with these bytes. Every sector must hold what was last written.
    ///
    /// # Errors
    /// Describes the first sector that does not.
    pub fn read_answered(&mut self, range: Range<usize>, bytes: &[u8]) -> Result<(), String> {
        self.busy[range.clone()].fill(false);
        for (sector, found) in range.zip(bytes.chunks(SECTOR as usize)) {
            let found = read(found, sector as u64 * SECTOR);
            let latest = self.sectors[sector].last().map(|entry| entry.value);
            if found.ok() != latest {
                return Err(self.wrong("a read before the kill", sector, found));
            }
        }
        Ok(())
    }

    /// Notes that a request is sent that gives the range this value.
    pub fn write_sent(&mut self, range: Range<usize>, value: Value) {
        self.busy[range.clone()].fill(true);
        self.open.extend(range.clone());
        for entries in &mut self.sectors[range] {
            entries.push(Entry { value, answered: None });
        }
    }

    /// Notes that the request for this range has completed.
    pub fn write_answered(&mut self, range: Range<usize>) {
        let now = self.tick();
        self.busy[range.clone()].fill(false);
        for entries in &mut self.sectors[range] {
            if let Some(last) = entries.last_mut() {
                last.answered = Some(now);
            }
        }
    }

    /// Notes that a flush is sent.
    pub fn flush_sent(&mut self) -> Tick {
        self.tick()
    }

    /// Notes that the flush that was sent at this moment has completed: writes that had completed by then are durable.
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

    /// Checks after a kill that each sector of the disk holds a value that it may. From now on it must hold this value,
    /// because the killed daemon can change it no more.
    ///
    /// # Errors
    /// Describes the first few wrong sectors, and counts all of them.
    pub fn settle(&mut self, disk: &[u8]) -> Result<(), String> {
        assert_eq!(disk.len(), self.sectors.len() * SECTOR as usize, "the whole disk must be checked");
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

    /// Checks that the whole disk holds what was last written, whether it was flushed or not. Nothing may be in flight.
    ///
    /// # Errors
    /// As [`Ledger::settle`].
    pub fn check_latest(&mut self, disk: &[u8]) -> Result<(), String> {
        for entries in &mut self.sectors {
            entries.drain(..entries.len() - 1);
        }
        self.settle(disk)
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

    /// A ledger of one sector: generation 1 is written and flushed, 2 has completed, 3 was sent.
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
        ledger().settle(&disk(0)).expect_err("older than a completed flush");
        ledger().settle(&disk(4)).expect_err("never written");
    }

    #[test]
    fn a_value_found_after_a_kill_must_stay() {
        let mut ledger = ledger();
        assert!(!ledger.is_free(0..1));
        ledger.settle(&disk(2)).expect("one of the values");
        assert!(ledger.is_free(0..1));
        ledger.settle(&disk(3)).expect_err("not written since");
        ledger.read_answered(0..1, &disk(2)).expect("the value found");
    }

    #[test]
    fn a_flush_covers_only_writes_completed_before_it_was_sent() {
        let mut ledger = Ledger::new([Value::Zero].into_iter());
        ledger.write_sent(0..1, Value::Written(1));
        let flush = ledger.flush_sent();
        ledger.write_answered(0..1);
        ledger.flush_answered(flush);
        ledger.settle(&disk(0)).expect("the write may be lost");
    }
}
