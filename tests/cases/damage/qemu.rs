//! Runs QEMU on the same images through qemu-io. QEMU does not continue with an image that it has found corrupt, so it
//! is started again from there.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::probe::{Opened, Outcome, Read, is_marked, writes};
use disk::check::Verdict;
use strata_kit::images::find_tool;
use strata_rig::agree::second_opinion;
use strata_rig::victims::{DATA, UNIT, Victim};

/// QEMU's outcome, without its messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Theirs {
    /// The verdict of its checker before the probe; None if it could not check all of the image.
    pub checked: Option<Verdict>,
    /// How it opens the image.
    pub opened: Opened,
    /// By place: the byte where it equals ours, `Mixed` for any other contents, or that it cannot be read.
    pub reads: BTreeMap<u64, Read>,
    /// Whether each write succeeded.
    pub writes: Vec<bool>,
    /// True if the corrupt bit is set at the end and was not before.
    pub marked: bool,
}

/// The name of the image in its folder.
const TOP: &str = "top";
/// How often QEMU is started for one image.
const STARTS_MAX: usize = 5;

/// Runs QEMU on an image, given our outcome.
pub fn ask(folder: &Path, file: &[u8], victim: &Victim, ours: &Outcome) -> Theirs {
    std::fs::write(folder.join(TOP), file).expect("an image");
    std::fs::write(folder.join("base"), [0xba; 16 << 10]).expect("a file below");
    if let Some(data) = &victim.data {
        std::fs::write(folder.join(DATA), data).expect("its data");
    }
    let checked = second_opinion(&folder.join(TOP)).verdict;
    // The reads come first, as they change nothing.
    let (seen, refused) = reads(folder, &ours.reads);
    let tried = |(name, _, _): &(&str, u64, u64)| ours.writes.iter().any(|(what, _)| what == name);
    let commands = writes(victim).into_iter().filter(tried).map(|(what, offset, length)| match what {
        "a discard" => format!("discard {offset} {length}"),
        _ => format!("write -P 165 {offset} {length}"),
    });
    let mut commands: Vec<String> = commands.collect();
    commands.push("flush".into());
    // Read again, as we do; this may find more damage.
    commands.extend(ours.reads.keys().map(|place| format!("read {place} {UNIT}")));
    let (said, done) = run(folder, &["-d", "unmap"], &commands);
    let opened = match (refused, refusal(&said)) {
        (Some(why), _) => Opened::Refused(why),
        (None, Some(why)) => Opened::ReadOnly(why),
        (None, None) => Opened::Writable,
    };
    let mut start = [0; 512];
    // The file may be long now, so read only its header.
    let file_now = File::open(folder.join(TOP)).expect("the image");
    let _ = file_now.read_at(&mut start, 0).expect("its header");
    Theirs { checked, opened, reads: seen, writes: done, marked: is_marked(&start) && !is_marked(file) }
}

/// Why an image was not opened.
fn refusal(said: &str) -> Option<String> {
    said.lines().find(|line| line.contains("can't open")).map(str::to_owned)
}

/// The contents at the places that we read, or why the image does not open.
fn reads(folder: &Path, ours: &BTreeMap<u64, Read>) -> (BTreeMap<u64, Read>, Option<String>) {
    let mut found = BTreeMap::new();
    let mut left: Vec<(&u64, &Read)> = ours.iter().collect();
    for _ in 0..STARTS_MAX {
        let mut commands = vec!["length".to_owned()];
        commands.extend(left.iter().map(|(place, read)| match read {
            Read::All(byte) => format!("read -P {byte} {place} {UNIT}"),
            _ => format!("read {place} {UNIT}"),
        }));
        let (text, done) = run(folder, &["-r"], &commands);
        let refused = refusal(&text);
        if refused.is_some() {
            return (found, refused);
        }
        // All reads after the last one that succeeded may have failed for the same reason.
        let alive = done.iter().rposition(|done| *done).map_or(1, |last| last + 1).min(done.len());
        for ((place, read), done) in left.iter().zip(&done).take(alive.max(1)) {
            let other = text.contains(&format!("verification failed at offset {place},"));
            let theirs = match (done, read) {
                (false, _) => Read::Fails(String::new()),
                (true, Read::All(byte)) if !other => Read::All(*byte),
                (true, _) => Read::Mixed,
            };
            found.insert(**place, theirs);
        }
        left.drain(..alive.max(1).min(left.len()));
        if left.is_empty() || done.is_empty() {
            break;
        }
    }
    (found, None)
}

/// Runs commands. Returns all output, and whether each command succeeded.
fn run(folder: &Path, flags: &[&str], commands: &[String]) -> (String, Vec<bool>) {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "20"]).arg(find_tool("qemu-io").expect("found before")).current_dir(folder);
    command.args(["-f", "qcow2"]).args(flags);
    for text in commands {
        command.args(["-c", text]);
    }
    let output = command.arg(TOP).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let ended = |line: &str| {
        let done = ["read ", "wrote ", "discard "].iter().any(|verb| {
            line.strip_prefix(verb).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let failed =
            ["read failed", "write failed", "discard failed"].iter().any(|verb| line.starts_with(verb));
        (done || failed).then_some(done)
    };
    let done = said.lines().filter_map(ended).collect();
    (said + &String::from_utf8_lossy(&output.stderr), done)
}
