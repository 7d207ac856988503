//! The areas that fio fills in a guest, pass by pass, and what each may hold after its daemon was killed.
//!
//! Owns the record and how a sector that fio wrote is read. It starts nothing and reads no qcow2: it is given the
//! disk's bytes.

use anyhow::{Context, Result, bail, ensure};

/// What fio describes by itself: `verify_interval` in guest/crash_check.sh.
const SECTOR: usize = 512;
/// The first two bytes of fio's header (`FIO_HDR_MAGIC`).
const MAGIC: u16 = 0xacca;
/// Where the header has the offset on the disk.
const OFFSET_AT: usize = 16;
/// The pattern behind the header is this byte and the pass, in eight bytes: `area_options` in guest/crash_check.sh.
const MARK: u8 = 0xf1;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes only.
    Zero,
    /// This byte only: what lies below the overlay.
    Base(u8),
    /// What fio wrote here in this pass.
    Pass(u64),
}

impl Content {
    /// What is in the sector at the byte `offset` of the disk; `None` if nobody ever wrote that there.
    fn of(sector: &[u8], offset: u64) -> Option<Self> {
        let first = *sector.first()?;
        if sector.iter().all(|byte| *byte == first) {
            return Some(if first == 0 { Self::Zero } else { Self::Base(first) });
        }
        let magic = u16::from_le_bytes(*sector.first_chunk()?);
        let address = u64::from_le_bytes(*sector.get(OFFSET_AT..)?.first_chunk()?);
        let pattern: &[u8; 8] = sector.last_chunk()?;
        let repeated = sector.rchunks(8).take_while(|chunk| chunk == pattern).count();
        // fio's header is 40 bytes long
        let whole = repeated * 8 >= SECTOR - 40;
        let ours = magic == MAGIC && address == offset && pattern[0] == MARK && whole;
        ours.then(|| Self::Pass(u64::from_be_bytes(*pattern) & ((1 << 56) - 1)))
    }
}

/// A part of the disk that one writer at a time fills from end to end.
#[derive(Clone, Debug)]
struct Area {
    /// What its sectors may hold. Just one when it was flushed and not begun anew since.
    may: Vec<Content>,
}

/// All areas of a disk: one behind the other, all of one length.
#[derive(Clone, Debug)]
pub struct Areas {
    first: u64,
    length: u64,
    areas: Vec<Area>,
    /// No pass has this number or a greater one.
    next_pass: u64,
}

/// What was found in the areas after a crash, in sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In areas that had been flushed.
    pub flushed: usize,
    /// In areas that were being written: what the pass writes.
    pub new: usize,
    /// There too: zeroes.
    pub zero: usize,
    /// There too: what was there before.
    pub old: usize,
}

impl Areas {
    /// Areas from byte `first` of the disk on, each `length` bytes, that hold these so far.
    pub fn new(first: u64, length: u64, contents: impl Iterator<Item = Content>) -> Self {
        let areas = contents.map(|content| Area { may: vec![content] }).collect();
        Self { first, length, areas, next_pass: 1 }
    }

    /// A number that no pass has had.
    pub fn next_pass(&self) -> u64 {
        self.next_pass
    }

    /// The areas that were flushed and not begun anew since, with the pass that they hold.
    pub fn flushed(&self) -> impl Iterator<Item = (usize, u64)> {
        self.areas.iter().enumerate().filter_map(|(number, area)| match area.may[..] {
            [Content::Pass(pass)] => Some((number, pass)),
            _ => None,
        })
    }

    /// The guest said that something begins in an area: `AREA:PASS`.
    ///
    /// # Errors
    /// When it cannot have been said in this order.
    pub fn begun(&mut self, words: &str) -> Result<()> {
        let (number, pass) = parse(words)?;
        let area = self.areas.get_mut(number).with_context(|| format!("there is no area {words}"))?;
        ensure!(!area.may.contains(&Content::Pass(pass)), "the pass {words} was begun before");
        // of two in three passes the first step makes zeroes
        if !area.may.contains(&Content::Zero) {
            area.may.push(Content::Zero);
        }
        area.may.push(Content::Pass(pass));
        self.next_pass = self.next_pass.max(pass + 1);
        Ok(())
    }

    /// The guest said that a pass was written and flushed: `AREA:PASS`.
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

    /// Every sector of the areas holds what it may.
    ///
    /// # Errors
    /// Says which sectors do not.
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
    fn a_sector_is_read_in_its_place_and_whole() {
        let mut sector = written(512, 9);
        assert_eq!(Content::of(&sector, 512), Some(Content::Pass(9)));
        assert_eq!(Content::of(&sector, 1024), None);
        sector[100] ^= 1;
        assert_eq!(Content::of(&sector, 512), None);
        assert_eq!(Content::of(&[0; SECTOR], 512), Some(Content::Zero));
        assert_eq!(Content::of(&[7; SECTOR], 512), Some(Content::Base(7)));
    }

    #[test]
    fn a_flushed_pass_is_there_and_one_under_way_may_be() {
        let mut areas = areas();
        areas.begun("0:1").expect("a pass");
        areas.flushed_now("0:1").expect("the pass");
        areas.begun("1:2").expect("a pass");
        assert_eq!(areas.flushed().collect::<Vec<_>>(), [(0, 1)]);
        let found = areas.judge(&disk([Some(1), Some(1), Some(2), None])).expect("as it may be");
        assert_eq!(found, Found { flushed: 2, new: 1, zero: 1, old: 0 });
        areas.judge(&disk([Some(1), None, None, None])).expect_err("a flushed sector is gone");
        areas.judge(&disk([Some(1), Some(2), None, None])).expect_err("another area's pass");
        areas.judge(&disk([Some(1), Some(1), Some(1), None])).expect_err("a pass that was never here");
        assert_eq!(areas.next_pass(), 3);
    }

    #[test]
    fn what_was_before_may_be_there_until_the_flush() {
        let mut areas = areas();
        for words in ["0:1", "0:3"] {
            areas.begun(words).expect("a pass");
        }
        areas.flushed_now("0:1").expect_err("another one was begun since");
        areas.flushed_now("0:3").expect("the last one");
        areas.begun("0:3").expect_err("a number is used once");
        areas.begun("0:5").expect("a pass");
        assert_eq!(areas.flushed().count(), 0);
        let mut bytes = disk([Some(3), Some(5), None, None]);
        bytes[3 * SECTOR..].fill(7);
        assert_eq!(areas.judge(&bytes).expect("old and new"), Found { flushed: 2, new: 1, zero: 0, old: 1 });
        bytes[SECTOR..2 * SECTOR].copy_from_slice(&written(512, 1));
        areas.judge(&bytes).expect_err("from before the last flush");
    }
}
