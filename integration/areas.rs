//! The areas that fio fills in a guest, pass by pass, and the contents that each may have after a kill of the daemon.
//!
//! Owns the record of passes and the format of fio's sectors. It starts no process and reads no qcow2: the caller
//! passes the disk's bytes.

use anyhow::{Context, Result, bail, ensure};

/// The unit with a header of fio: `verify_interval` in guest/crash_check.sh.
const SECTOR: usize = 512;
/// The first two bytes of fio's header (`FIO_HDR_MAGIC`).
const MAGIC: u16 = 0xacca;
/// Position of the disk offset in the header.
const OFFSET_AT: usize = 16;
/// The first byte of the pattern behind the header, which is this byte and the pass, in eight bytes: `area_options` in
/// guest/crash_check.sh.
const MARK: u8 = 0xf1;

/// The contents of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes only.
    Zero,
    /// This byte only: the data below the overlay.
    Base(u8),
    /// fio's data of this pass, for this sector.
    Pass(u64),
}

impl Content {
    /// The contents of the sector at byte `offset` of the disk; `None` if they were never written there.
    fn of(sector: &[u8], offset: u64) -> Option<Self> {
        let first = *sector.first()?;
        if sector.iter().all(|byte| *byte == first) {
            return Some(if first == 0 { Self::Zero } else { Self::Base(first) });
        }
        let magic = u16::from_le_bytes(*sector.first_chunk()?);
        let address = u64::from_le_bytes(*sector.get(OFFSET_AT..)?.first_chunk()?);
        let pattern: &[u8; 8] = sector.last_chunk()?;
        let repeated = sector.rchunks(8).take_while(|chunk| chunk == pattern).count();
        // fio's header has 40 bytes.
        let whole = repeated * 8 >= SECTOR - 40;
        let ours = magic == MAGIC && address == offset && pattern[0] == MARK && whole;
        ours.then(|| Self::Pass(u64::from_be_bytes(*pattern) & ((1 << 56) - 1)))
    }
}

/// A range of the disk that one writer at a time fills from end to end.
#[derive(Clone, Debug)]
struct Area {
    /// The contents that its sectors may have. Just one if no pass has begun since the last flush.
    may: Vec<Content>,
}

/// All areas of a disk: consecutive and of equal length.
#[derive(Clone, Debug)]
pub struct Areas {
    first: u64,
    length: u64,
    areas: Vec<Area>,
    /// No pass so far has this number or a greater one.
    next_pass: u64,
}

/// Counts of sectors in the areas after a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In areas flushed before the crash.
    pub flushed: usize,
    /// In areas with a pass in progress: data of this pass.
    pub new: usize,
    /// In areas with a pass in progress: zeroes.
    pub zero: usize,
    /// In areas with a pass in progress: data from before.
    pub old: usize,
}

impl Areas {
    /// Areas from byte `first` of the disk on, each `length` bytes, with these contents.
    pub fn new(first: u64, length: u64, contents: impl Iterator<Item = Content>) -> Self {
        let areas = contents.map(|content| Area { may: vec![content] }).collect();
        Self { first, length, areas, next_pass: 1 }
    }

    /// An unused pass number.
    pub fn next_pass(&self) -> u64 {
        self.next_pass
    }

    /// The areas in which no pass has begun since the last flush, with the pass that they hold.
    pub fn flushed(&self) -> impl Iterator<Item = (usize, u64)> {
        self.areas.iter().enumerate().filter_map(|(number, area)| match area.may[..] {
            [Content::Pass(pass)] => Some((number, pass)),
            _ => None,
        })
    }

    /// Notes the guest's report that a pass begins in an area: `AREA:PASS`.
    ///
    /// # Errors
    /// When the report contradicts earlier ones.
    pub fn begun(&mut self, words: &str) -> Result<()> {
        let (number, pass) = parse(words)?;
        let area = self.areas.get_mut(number).with_context(|| format!("there is no area {words}"))?;
        ensure!(!area.may.contains(&Content::Pass(pass)), "the pass {words} was begun before");
        // Two passes in three begin by zeroing the area.
        if !area.may.contains(&Content::Zero) {
            area.may.push(Content::Zero);
        }
        area.may.push(Content::Pass(pass));
        self.next_pass = self.next_pass.max(pass + 1);
        Ok(())
    }

    /// Notes the guest's report that a pass was written and flushed: `AREA:PASS`.
    ///
    /// # Errors
    /// As [`Areas::begun`].
    pub fn flushed_now(&mut self, words: &str) -> Result<()> {
        let (number, pass) = parse(words)?;
        let area = self.areas.get_mut(number).with_context(|| format!("there is no area {words}"))?;
        ensure!(area.may.last() == Some(&Content::Pass(pass)), "the pass {words} was not the last begun");
        area.may = vec![Content::Pass(pass)];
        Ok(())
    }

    /// Checks that every sector of the areas has contents that it may have.
    ///
    /// # Errors
    /// Lists the sectors that do not.
    pub fn judge(&self, disk: &[u8]) -> Result<Found> {
        let mut found = Found::default();
        let mut wrong = Vec::new();
        for (number, area) in self.areas.iter().enumerate() {
            let start = self.first + number as u64 * self.length;
            let range = start as usize..(start + self.length) as usize;
            let bytes = disk.get(range).context("the disk is too short")?;
            for (offset, sector) in (start..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
                let content = Content::of(sector, offset);
                match content.and_then(|content| area.may.iter().position(|may| *may == content)) {
                    Some(_) if area.may.len() == 1 => found.flushed += 1,
                    Some(place) if place + 1 == area.may.len() => found.new += 1,
                    Some(_) if content == Some(Content::Zero) => found.zero += 1,
                    Some(_) => found.old += 1,
                    None => wrong
                        .push(format!("{offset:#x} in area {number}: {content:?}, may be {:?}", area.may)),
                }
            }
        }
        if !wrong.is_empty() {
            bail!(
                "{} sectors are wrong, the first:\n{}",
                wrong.len(),
                wrong[..wrong.len().min(4)].join("\n")
            );
        }
        Ok(found)
    }
}

fn parse(words: &str) -> Result<(usize, u64)> {
    let (area, pass) = words.split_once(':').with_context(|| format!("{words} is no AREA:PASS"))?;
    Ok((area.parse()?, pass.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sector as fio writes it.
    fn written(offset: u64, pass: u64) -> Vec<u8> {
        let mut bytes: Vec<u8> = (u64::from(MARK) << 56 | pass).to_be_bytes().repeat(SECTOR / 8);
        bytes[..40].fill(0);
        bytes[..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[OFFSET_AT..OFFSET_AT + 8].copy_from_slice(&offset.to_le_bytes());
        bytes
    }

    /// Two areas of two sectors behind one sector.
    fn areas() -> Areas {
        Areas::new(512, 1024, [Content::Zero, Content::Base(7)].into_iter())
    }

    fn disk(passes: [Option<u64>; 4]) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        for (number, pass) in (1..).zip(passes) {
            bytes.extend(pass.map_or(vec![0; SECTOR], |pass| written(number * 512, pass)));
        }
        bytes
    }

    #[test]
    fn a_sector_is_valid_at_its_own_offset_and_if_complete() {
        let mut sector = written(512, 9);
        assert_eq!(Content::of(&sector, 512), Some(Content::Pass(9)));
        assert_eq!(Content::of(&sector, 1024), None);
        sector[100] ^= 1;
        assert_eq!(Content::of(&sector, 512), None);
        assert_eq!(Content::of(&[0; SECTOR], 512), Some(Content::Zero));
        assert_eq!(Content::of(&[7; SECTOR], 512), Some(Content::Base(7)));
    }

    #[test]
    fn a_flushed_pass_must_be_there_and_one_in_progress_may_be() {
        let mut areas = areas();
        areas.begun("0:1").expect("a pass");
        areas.flushed_now("0:1").expect("the pass");
        areas.begun("1:2").expect("a pass");
        assert_eq!(areas.flushed().collect::<Vec<_>>(), [(0, 1)]);
        let found = areas.judge(&disk([Some(1), Some(1), Some(2), None])).expect("allowed contents");
        assert_eq!(found, Found { flushed: 2, new: 1, zero: 1, old: 0 });
        areas.judge(&disk([Some(1), None, None, None])).expect_err("a flushed sector is lost");
        areas.judge(&disk([Some(1), Some(2), None, None])).expect_err("another area's pass");
        areas.judge(&disk([Some(1), Some(1), Some(1), None])).expect_err("a pass of another area");
        assert_eq!(areas.next_pass(), 3);
    }

    #[test]
    fn older_contents_are_allowed_until_the_flush() {
        let mut areas = areas();
        for words in ["0:1", "0:3"] {
            areas.begun(words).expect("a pass");
        }
        areas.flushed_now("0:1").expect_err("another pass has begun since");
        areas.flushed_now("0:3").expect("the last pass");
        areas.begun("0:3").expect_err("a number is used once");
        areas.begun("0:5").expect("a pass");
        assert_eq!(areas.flushed().count(), 0);
        let mut bytes = disk([Some(3), Some(5), None, None]);
        bytes[3 * SECTOR..].fill(7);
        assert_eq!(areas.judge(&bytes).expect("old and new"), Found { flushed: 2, new: 1, zero: 0, old: 1 });
        bytes[SECTOR..2 * SECTOR].copy_from_slice(&written(512, 1));
        areas.judge(&bytes).expect_err("older than the last flush");
    }
}
