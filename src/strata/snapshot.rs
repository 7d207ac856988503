//! `strata snapshot`: lists, creates, applies and deletes the internal snapshots of an image that is not in use.
//!
//! Owns how a snapshot is shown; its JSON is spelled as in `qemu-img info`. The disk crate changes the image.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use disk::DiskOptions;
use disk::check::Sharing;
use disk::snapshot::{Change, Snapshot, change, list_sharing};
use names::shown;
use serde::Serialize;

use crate::cli::{Cache, SnapshotArgs};
use crate::error::{ProgramError, Purpose};
use crate::signals;
use crate::size;
use crate::text::{json, json_name, print};

/// Long enough for the last I/O of a daemon that was just killed, short enough that people do not wonder.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
const NANOSECONDS: u64 = 1_000_000_000;
/// The widest column of the table, in characters.
const COLUMN_MAX: usize = 60;

/// A snapshot.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotFacts {
    id: String,
    name: String,
    /// In bytes.
    vm_state_size: u64,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    vm_clock_nsec: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<u64>,
    /// Bytes of the disk when it was taken, if that is recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_size: Option<u64>,
}

impl SnapshotFacts {
    /// The facts about a snapshot.
    pub fn new(snapshot: &Snapshot) -> Self {
        SnapshotFacts {
            id: json_name(&snapshot.id),
            name: json_name(&snapshot.name),
            vm_state_size: snapshot.vm_state_size(),
            date_sec: snapshot.seconds,
            date_nsec: snapshot.nanoseconds,
            vm_clock_sec: snapshot.vm_clock_ns / NANOSECONDS,
            vm_clock_nsec: snapshot.vm_clock_ns % NANOSECONDS,
            icount: snapshot.icount(),
            virtual_size: snapshot.disk_size(),
        }
    }

    /// As one line: `1 before-update, 2026-11-21 14:44:46 UTC, disk of 10 GiB, VM state of 4 KiB`.
    pub fn in_a_line(&self) -> String {
        let sized = |what: &str, bytes: u64| format!(", {what} of {}", size::short(bytes));
        let disk = self.virtual_size.map_or(String::new(), |bytes| sized("disk", bytes));
        let state =
            if self.vm_state_size > 0 { sized("VM state", self.vm_state_size) } else { String::new() };
        format!("{} {}, {} UTC{disk}{state}", shown(&self.id), shown(&self.name), date(self.date_sec))
    }
}

/// Runs the command.
///
/// # Errors
/// When the image cannot be used, the change fails, or the result cannot be printed.
pub fn run(options: &SnapshotArgs) -> Result<(), ProgramError> {
    let image = &options.image;
    let how = DiskOptions {
        data_file: options.data_file.clone(),
        direct: options.cache == Cache::Direct,
        lock_timeout: options.lock.timeout(LOCK_PATIENCE),
        ..DiskOptions::default()
    };
    let storage = options.lock.storage().confined(&options.chain_root).map_err(ProgramError::ChainRoot)?;
    let Some(wanted) = wanted(options) else {
        let purpose = Purpose::SnapshotList;
        let sharing = if options.force_share { Sharing::All } else { Sharing::Readers };
        let failed = |source| ProgramError::Open { image: image.to_owned(), purpose, source };
        let snapshots = list_sharing(&storage, image, sharing, &how).map_err(failed)?;
        let facts: Vec<SnapshotFacts> = snapshots.iter().map(SnapshotFacts::new).collect();
        let text = if options.output.is_json() { json(&facts) } else { table(&facts) };
        return print(&text).map_err(ProgramError::Print);
    };
    signals::finish_first()?;
    match change(&storage, image, wanted, &how) {
        Ok(_) => Ok(()),
        Err(disk::snapshot::ChangeError::Open(source)) => {
            Err(ProgramError::Open { image: image.to_owned(), purpose: Purpose::SnapshotChange, source })
        }
        Err(source) => Err(ProgramError::Snapshot(source)),
    }
}

/// The requested change; none for a list.
fn wanted(options: &SnapshotArgs) -> Option<Change> {
    if let Some(name) = &options.create {
        // The format cannot store a time before 1970 or after 2106.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        return Some(Change::Create { name: name.clone(), seconds, nanoseconds: now.subsec_nanos() });
    }
    let apply = options.apply.clone().map(|wanted| Change::Apply { wanted });
    apply.or_else(|| options.delete.clone().map(|wanted| Change::Delete { wanted }))
}

fn table(facts: &[SnapshotFacts]) -> String {
    let mut rows = vec![["ID", "NAME", "DATE (UTC)", "DISK", "VM STATE", "VM CLOCK"].map(str::to_owned)];
    rows.extend(facts.iter().map(|one| {
        let bytes = |bytes: u64| if bytes == 0 { "-".to_owned() } else { size::short(bytes) };
        [
            shown(&one.id).to_string(),
            shown(&one.name).to_string(),
            date(one.date_sec),
            one.virtual_size.map_or("-".to_owned(), size::short),
            bytes(one.vm_state_size),
            clock(Duration::from_secs(one.vm_clock_sec) + Duration::from_nanos(one.vm_clock_nsec)),
        ]
    }));
    // A wider cell does not widen its column: one long name would pad each of 65,536 rows, and a format's width ends
    // at 65,535.
    let cell_width = |cell: &String| cell.chars().count().min(COLUMN_MAX);
    let width = |column: usize| rows.iter().map(|row| cell_width(&row[column])).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn clock(running: Duration) -> String {
    let seconds = running.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:03}", seconds % 60, running.subsec_millis())
}

/// Seconds since 1970 as a date of the Gregorian calendar.
fn date(seconds: u32) -> String {
    let seconds = u64::from(seconds);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that a leap day is the last of its year; day 0 is 1 March of year 0.
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day_of_month:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_868_799, "2000-02-29 23:59:59"),
            (951_868_800, "2000-03-01 00:00:00"),
            (1_795_272_286, "2026-11-21 14:44:46"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }

    #[test]
    fn a_table_has_straight_columns_and_no_orders_for_a_terminal() {
        let mut one = Snapshot::new(b"1".to_vec(), b"before the \x1b[2Jupdate".to_vec(), 10 << 30);
        one.vm_clock_ns = 3_661_005_000_000;
        let two = Snapshot { extra: Vec::new(), vm_state_size_short: 4096, ..one.clone() };
        let facts = [SnapshotFacts::new(&one), SnapshotFacts::new(&two)];
        let expected = "\
ID  NAME                        DATE (UTC)           DISK    VM STATE  VM CLOCK
1   before the \\u{1b}[2Jupdate  1970-01-01 00:00:00  10 GiB  -         01:01:01.005
1   before the \\u{1b}[2Jupdate  1970-01-01 00:00:00  -       4 KiB     01:01:01.005
";
        assert_eq!(table(&facts), expected);
        // The widest possible name: it takes more characters than a format's width can express.
        let wide = Snapshot { name: vec![0x1b; 65_535], ..one.clone() };
        let facts_wide = [SnapshotFacts::new(&wide), SnapshotFacts::new(&one)];
        let text = table(&facts_wide);
        assert_eq!(text.lines().nth(1).expect("its line").chars().filter(|c| *c == '{').count(), 65_535);
        assert!(text.lines().nth(2).expect("another").len() < 200, "not as wide as the widest");
        let lines = facts.each_ref().map(SnapshotFacts::in_a_line);
        assert_eq!(lines[0], "1 before the \\u{1b}[2Jupdate, 1970-01-01 00:00:00 UTC, disk of 10 GiB");
        assert_eq!(lines[1], "1 before the \\u{1b}[2Jupdate, 1970-01-01 00:00:00 UTC, VM state of 4 KiB");
    }
}
