//! The text table of the outcomes for damaged images, with the differences from QEMU and their reasons.

use std::collections::BTreeMap;
use std::path::Path;

use disk::check::Verdict;

use super::probe::{Opened, Outcome, Read};
use super::qemu::Theirs;
use super::reasons;
use strata_rig::victims::{UNIT, Victim};

/// A damaged image.
pub struct Row {
    /// The name of the image before the damage.
    pub victim: &'static str,
    /// The name of the damage.
    pub damage: &'static str,
    /// The bytes of the damaged image.
    pub bytes: Vec<u8>,
}

impl Row {
    /// The name of the row.
    pub fn name(&self) -> String {
        format!("{}: {}", self.victim, self.damage)
    }
}

/// The lines of the table for one image.
pub fn describe(row: &Row, ours: &Outcome, theirs: Option<&Theirs>, victim: &Victim) -> String {
    let mut text = format!("{}\n", row.name());
    // Names may contain control characters.
    let mut line = |line: String| text += &format!("    {}\n", line.replace(char::is_control, "?"));
    match &ours.opened {
        Opened::Refused(why) => line(format!("refused: {why}")),
        Opened::ReadOnly(why) => line(format!("only read: {why}")),
        Opened::Writable => {}
    }
    if let Some(said) = said(ours) {
        line(said);
    }
    reads(ours, victim).into_iter().for_each(&mut line);
    for (what, failed) in &ours.writes {
        if let Some(why) = failed {
            line(format!("{what} fails: {why}"));
        }
    }
    if !ours.changed.is_empty() {
        line(format!("the writes change {}", places(&ours.changed)));
    }
    if ours.marked {
        line("is marked corrupt".into());
    }
    let unlike = theirs.map_or(vec!["not asked".to_owned()], |theirs| unlike(ours, theirs));
    let why = (!unlike.is_empty()).then(|| reasons::of(row.damage, victim.data.is_some()));
    for what in unlike {
        line(format!("QEMU: {what}"));
    }
    if let Some(why) = why {
        line(format!("as {why}"));
    }
    text
}

/// The checker's result, if it is more than the refusal.
fn said(ours: &Outcome) -> Option<String> {
    match (&ours.checked, &ours.opened) {
        (Ok((Verdict::Clean, kinds)), _) if kinds.is_empty() => None,
        (Ok((verdict, kinds)), _) => Some(format!("check: {}: {}", name(*verdict), kinds.join(", "))),
        (Err(why), Opened::Refused(same)) if why == same => None,
        (Err(why), _) => Some(format!("check: {why}")),
    }
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Clean => "clean",
        Verdict::Leaks => "leaks",
        Verdict::Corrupt => "corrupt",
    }
}

/// The reads that differ from the sound image.
fn reads(ours: &Outcome, victim: &Victim) -> Vec<String> {
    let mut kinds: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for (place, read) in &ours.reads {
        let what = match read {
            Read::All(byte) if *byte == victim.contents[place] => continue,
            Read::All(byte) => format!("reads as {byte:#04x}"),
            Read::Mixed => "reads as something else".into(),
            Read::Fails(why) => format!("cannot be read: {}", shorter(why)),
        };
        kinds.entry(what).or_default().push(*place);
    }
    kinds.iter().map(|(what, at)| format!("{} {what}", places(at))).collect()
}

/// Removes the number of the entry, which differs for each place.
fn shorter(why: &str) -> String {
    let Some((before, after)) = why.split_once(", entry ") else { return why.to_owned() };
    let rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
    format!("{before}, its entry{rest}")
}

fn places(places: &[u64]) -> String {
    match places {
        [one] => format!("unit {}", one / UNIT),
        [first, .., last] if places.len() > 4 => {
            format!("{} units from {} to {}", places.len(), first / UNIT, last / UNIT)
        }
        _ => {
            let numbers: Vec<String> = places.iter().map(|place| (place / UNIT).to_string()).collect();
            format!("units {}", numbers.join(", "))
        }
    }
}

/// The differences in QEMU's outcome.
fn unlike(ours: &Outcome, theirs: &Theirs) -> Vec<String> {
    let mut unlike = Vec::new();
    let checked = ours.checked.as_ref().ok().map(|(verdict, _)| *verdict);
    // QEMU stops where it cannot read a structure; our checker continues and reports the fault.
    let same = checked == theirs.checked || (checked, theirs.checked) == (Some(Verdict::Corrupt), None);
    // QEMU's checker accepts an image that QEMU then cannot read.
    let is_stricter = (checked, theirs.checked) == (Some(Verdict::Corrupt), Some(Verdict::Clean))
        && theirs.reads.values().any(|read| matches!(read, Read::Fails(_)));
    assert!(
        same || is_stricter || checked.is_none() || theirs.checked.is_none(),
        "both check, {checked:?}: {theirs:?}"
    );
    if !same {
        unlike.push(format!("its check: {}", theirs.checked.map_or("cannot", name)));
    }
    unlike.extend(served_unlike(ours, theirs));
    unlike
}

/// The differences in how QEMU serves the image.
fn served_unlike(ours: &Outcome, theirs: &Theirs) -> Vec<String> {
    let mut unlike = Vec::new();
    let class = |opened: &Opened| match opened {
        Opened::Writable => "writes it",
        Opened::ReadOnly(_) => "only reads it",
        Opened::Refused(_) => "refuses it",
    };
    if class(&ours.opened) != class(&theirs.opened) {
        let why = match &theirs.opened {
            Opened::Refused(why) | Opened::ReadOnly(why) => {
                format!(": {}", why.rsplit(": ").next().unwrap_or(why))
            }
            Opened::Writable => String::new(),
        };
        return vec![format!("{}{why}", class(&theirs.opened))];
    }
    let mut kinds: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (place, read) in &theirs.reads {
        let what = match (&ours.reads[place], read) {
            (Read::Fails(_), Read::Fails(_)) => continue,
            (Read::Fails(_), _) => "can be read",
            (_, Read::Fails(_)) => "cannot be read",
            (Read::Mixed, Read::Mixed) => continue,
            (ours, theirs) if ours == theirs => continue,
            _ => "holds something else",
        };
        kinds.entry(what).or_default().push(*place);
    }
    unlike.extend(kinds.iter().map(|(what, at)| format!("{} {what}", places(at))));
    for ((what, failed), done) in ours.writes.iter().zip(&theirs.writes) {
        match (failed, done) {
            (Some(_), true) => unlike.push(format!("{what} is done")),
            (None, false) => unlike.push(format!("{what} fails")),
            _ => {}
        }
    }
    if ours.marked != theirs.marked {
        unlike.push(if theirs.marked { "marks it corrupt".into() } else { "does not mark it".into() });
    }
    unlike
}

/// Compares with the stored table, or stores the new one.
///
/// # Panics
/// If they differ.
pub fn compare(text: &str, kept: &Path) {
    if std::env::var_os("STRATA_DAMAGE_WRITE").is_some() {
        std::fs::write(kept, text).expect("the table is written");
        return;
    }
    let before = std::fs::read_to_string(kept).unwrap_or_default();
    let (old, new) = (rows(&before), rows(text));
    let mut differences = Vec::new();
    for (name, lines) in &new {
        if old.get(name) != Some(lines) {
            let before = old.get(name).map_or("(no such row)", |lines| lines.as_str());
            differences.push(format!("{name}\n  was\n{before}\n  is\n{lines}"));
        }
    }
    differences
        .extend(old.keys().filter(|name| !new.contains_key(*name)).map(|name| format!("{name}\n  is gone")));
    assert!(differences.is_empty(), "{} rows differ:\n{}", differences.len(), differences.join("\n"));
}

/// The rows of a table: their names and lines.
fn rows(text: &str) -> BTreeMap<String, String> {
    let mut rows: BTreeMap<String, String> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        if line.starts_with("    ") {
            *rows.entry(name.clone()).or_default() += &format!("{line}\n");
        } else {
            name = line.to_owned();
            rows.insert(name.clone(), String::new());
        }
    }
    rows
}
