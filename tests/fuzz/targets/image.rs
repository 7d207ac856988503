//! A whole image: opened, read, written, discarded, flushed, checked, closed and opened again; or repaired; or its
//! snapshots or its size changed.
//!
//! If the checker finds nothing but leaks, everything must hold. Each sector read or written reads the same, and no
//! request finds the image damaged. Other snapshots retain their contents, and the checker finds no more than
//! before. Any other image must not cause a panic, a hang, or more than the allowed cost, and its header must stay
//! readable.

use std::path::Path;
use std::time::Duration;

use disk::check::Verdict;
use disk::resize::{NewSize, Shrinking, resize};
use disk::snapshot::{Change, ChangeError, Snapshot, change, list};
use disk::{DetectZeroes, DiskOptions, OpenError, RequestError};
use engine::EngineError;
use qcow2::{EntryError, Header};
use storage_sim::SimWorld;

use super::host::{CLUSTER_MAX, TOP, bytes, checked, header, operated, options, repaired, storage, world};
use super::session::{Known, SECTOR, Session, WINDOW};
use super::sound::Sound;
use super::values::Values;

/// The most bytes of the file that an input describes.
const FILE_MAX: u64 = 1 << 20;
/// Pieces of the file begin at multiples of this many bytes.
const PIECE_UNIT: usize = 64;
/// The unit of a piece's length in bytes.
const LENGTH_UNIT: usize = 8;
/// The most requests of an input.
const OPERATIONS_MAX: usize = 48;

/// The input: the operations, then the file piece by piece, so that an image of many clusters is a short input.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let (how, count) = (values.u8(), usize::from(values.u8()) % (OPERATIONS_MAX + 1));
    let script = values.bytes(count * OPERATION_BYTES);
    let file = decode(&mut values);
    let world = world(&file);
    let strict = Sound::of(&world, &file);
    let options = operated(&world, how & 1 != 0);
    match how >> 1 & 7 {
        2 => mend(&world, strict.as_ref()),
        3 => change_snapshots(&world, script, strict.as_ref()),
        4 => change_size(&world, &options, script, strict.as_ref()),
        5 => {
            let options = DiskOptions {
                detect_zeroes: DetectZeroes::Unmap,
                discard_no_unref: how & 16 != 0,
                ..options
            };
            serve(&world, &options, script, strict.as_ref());
        }
        _ => serve(&world, &options, script, strict.as_ref()),
    }
}

/// Bytes of an operation in the input.
const OPERATION_BYTES: usize = 5;

/// The bytes of the file.
fn decode(values: &mut Values<'_>) -> Vec<u8> {
    let (sectors, more) = (u64::from(values.u16()), u64::from(values.u8()));
    let length = (sectors * SECTOR + 2 * more).min(FILE_MAX) as usize;
    let mut file = vec![0; length];
    while !values.is_empty() {
        let at = usize::from(values.u16()) * PIECE_UNIT;
        let units = usize::from(values.u8()) + 1;
        let piece = values.bytes(units * LENGTH_UNIT);
        if let Some(room) = file.get_mut(at..) {
            let fits = piece.len().min(room.len());
            room[..fits].copy_from_slice(&piece[..fits]);
        }
    }
    file
}

/// The input for a file and a script; none if the file is too long. A unit of `PIECE_UNIT` equal bytes counts as
/// guest data without meaning, and becomes zeros.
pub fn encode(how: u8, script: &[[u8; OPERATION_BYTES]], file: &[u8]) -> Option<Vec<u8>> {
    if file.len() as u64 > FILE_MAX {
        return None;
    }
    let mut input = vec![how, script.len() as u8];
    input.extend(script.iter().flatten());
    input.extend(((file.len() as u64 / SECTOR) as u16).to_be_bytes());
    input.push((file.len() as u64 % SECTOR / 2) as u8);
    let mut units = file.chunks(PIECE_UNIT).enumerate().peekable();
    while let Some((number, unit)) = units.next() {
        if unit.iter().all(|byte| *byte == unit[0]) {
            continue;
        }
        let mut piece = unit.to_vec();
        while piece.len() + PIECE_UNIT <= 256 * LENGTH_UNIT
            && let Some((_, next)) = units.next_if(|(_, next)| next.iter().any(|byte| *byte != next[0]))
        {
            piece.extend(next);
        }
        let used = piece.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
        piece.resize(used.next_multiple_of(LENGTH_UNIT), 0);
        input.extend((number as u16).to_be_bytes());
        input.push((piece.len() / LENGTH_UNIT - 1) as u8);
        input.extend(piece);
    }
    Some(input)
}

fn serve(world: &SimWorld, options: &DiskOptions, script: &[u8], strict: Option<&Sound>) {
    let known = strict.map(|_| Known::default());
    let mut session = match Session::open(world, options, known) {
        Ok(session) => session,
        Err(_) => return look(world, options),
    };
    let held = strict.map(|_| snapshots_hold(world, options)).unwrap_or_default();
    for operation in script.chunks(OPERATION_BYTES) {
        let mut values = Values(operation);
        let (what, place, length, seed) = (values.u8(), values.u16(), values.u8(), values.u8());
        let size = session.size();
        let offset = offset(what, place, size);
        let length = ((u64::from(length) + 1) * SECTOR).min(size - offset).min(WINDOW);
        match what & 15 {
            8 => session.flush(),
            9 => session.rest(world, Duration::from_secs(6)),
            10 => {
                let (known, closed) = session.close();
                judge_close(closed, strict);
                // The image opened before; now it may be marked corrupt.
                let Ok(again) = Session::open(world, options, known) else {
                    assert!(strict.is_none(), "it opened before");
                    return;
                };
                session = again;
            }
            _ if length == 0 => {}
            0..=2 => drop(session.read(offset, length)),
            3 => session.zero(offset, length, seed & 1 != 0),
            4 => session.discard(offset, length),
            _ => session.write(offset, length, seed, what & 15 == 5),
        }
        if !judge_failures(&session, strict) {
            return;
        }
    }
    let (known, closed) = session.close();
    judge_close(closed, strict);
    let file = bytes(world, CLUSTER_MAX);
    Header::parse(&file, file.len() as u64).expect("a header that could be read can still be read");
    let Some(sound) = strict else { return };
    sound.judge(world, "served");
    assert_eq!(snapshots_hold(world, options), held, "snapshots keep what they hold");
    let mut session = Session::open(world, &DiskOptions { read_only: true, ..options.clone() }, known)
        .expect("it opens once more");
    let sectors = session.known.as_ref().map(Known::sectors).unwrap_or_default();
    for sector in sectors {
        session.read(sector * SECTOR, SECTOR);
    }
    assert!(judge_failures(&session, strict), "what was read before is read again");
}

/// The offset of a request: near the start, anywhere, or near the end.
fn offset(what: u8, place: u16, size: u64) -> u64 {
    let place = u64::from(place);
    let offset = match what >> 4 & 3 {
        0 | 1 => place % 512 * SECTOR,
        2 => ((u128::from(size) * u128::from(place)) >> 16) as u64,
        _ => size.saturating_sub((place % 512 + 1) * SECTOR),
    };
    offset.min(size.saturating_sub(SECTOR)) / SECTOR * SECTOR
}

/// Reads an image that could not be opened for writing, if it opens read-only.
fn look(world: &SimWorld, options: &DiskOptions) {
    let read_only = DiskOptions { read_only: true, ..options.clone() };
    let Ok(mut session) = Session::open(world, &read_only, None) else { return };
    for place in [0, 0x4000, 0x8000, 0xffff] {
        let (offset, length) = (offset(2 << 4, place, session.size()), WINDOW.min(session.size()));
        session.read(offset, length.min(session.size() - offset));
    }
    let _ = snapshots_hold(world, &read_only);
}

/// The first bytes of at most four snapshots, by identifier; none for one that cannot be read.
fn snapshots_hold(world: &SimWorld, options: &DiskOptions) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
    // A copy, because the disk is open.
    let world = SimWorld::from_image(world.image(), 1, storage_sim::SimOptions::calm());
    let Ok(found) = list(&storage(&world), Path::new(TOP), options) else { return Vec::new() };
    let hold = |snapshot: &Snapshot| {
        let wanted = String::from_utf8(snapshot.id.clone()).ok()?;
        let options = DiskOptions { snapshot: Some(wanted), ..options.clone() };
        let mut session = Session::open(&world, &options, None).ok()?;
        let length = session.size().min(WINDOW);
        if length == 0 { Some(Vec::new()) } else { session.read(0, length) }
    };
    found.iter().take(4).map(|snapshot| (snapshot.id.clone(), hold(snapshot))).collect()
}

/// In an image that the checker calls sound, requests may find only damage that a check does not cover. That is the
/// streams of compressed clusters, and whether data in an external file is at its required offset. False if the
/// latter is not.
fn judge_failures(session: &Session, strict: Option<&Sound>) -> bool {
    let Some(Sound { report, .. }) = strict else { return true };
    for failure in &session.failures {
        let excused = match failure {
            RequestError::Compressed { .. } => true,
            RequestError::Engine(EngineError::BadEntry {
                source: EntryError::DataFileOffset { .. }, ..
            }) => return false,
            RequestError::Engine(error) => matches!(
                error,
                EngineError::RefcountTableFull | EngineError::FileTooLarge | EngineError::ReadOnly
            ),
            other => other.is_no_space(),
        };
        assert!(excused, "{failure} in an image of which the checker says {report:#?}");
    }
    true
}

fn judge_close(closed: Result<(), OpenError>, strict: Option<&Sound>) {
    if let (Err(error), Some(sound)) = (closed, strict) {
        panic!("cannot be closed: {error}; the checker says {:#?}", sound.report);
    }
}

fn mend(world: &SimWorld, strict: Option<&Sound>) {
    let before = world.image().hash();
    match repaired(world) {
        Ok(repaired) => {
            assert_eq!(repaired.left.verdict(), Verdict::Clean, "{repaired:#?}");
            assert_eq!(checked(world).expect("checked once").verdict(), Verdict::Clean);
        }
        Err(error) => {
            assert!(strict.is_none(), "what is not damaged needs no repair: {error}");
            assert!(world.image().hash() == before, "not repaired, but written");
        }
    }
}

/// Creates, applies or deletes snapshots.
fn change_snapshots(world: &SimWorld, script: &[u8], strict: Option<&Sound>) {
    for (number, operation) in script.chunks(OPERATION_BYTES).take(4).enumerate() {
        let Ok(found) = list(&storage(world), Path::new(TOP), &options(true)) else { return };
        let which = operation.get(1).map_or(0, |place| usize::from(*place));
        let wanted = found
            .get(which % found.len().max(1))
            .map(|snapshot| String::from_utf8_lossy(&snapshot.id).into_owned());
        let wanted = wanted.unwrap_or_default();
        let what = match operation[0] & 3 {
            0 | 1 => Change::Create { name: format!("new {number}"), seconds: 1, nanoseconds: 2 },
            2 => Change::Apply { wanted },
            _ => Change::Delete { wanted },
        };
        let before = bytes(world, FILE_MAX);
        // Like every open for writing, a change repairs a dirty image before it is judged.
        let dirty = before[qcow2::position::INCOMPATIBLE + 7] & 1 != 0;
        let changed = change(&storage(world), Path::new(TOP), what.clone(), &options(true));
        if let Err(ChangeError::Refused { .. }) = &changed
            && strict.is_some()
            && !dirty
        {
            assert!(
                bytes(world, before.len() as u64) == before,
                "{what:?} was refused, and something was written"
            );
        }
        if let Some(sound) = strict {
            assert!(!matches!(changed, Err(ChangeError::Interrupted { .. })), "{what:?}: {changed:?}");
            sound.judge(world, &format!("{what:?}, {changed:?}"));
        }
    }
}

/// Makes the disk larger and smaller.
fn change_size(world: &SimWorld, options: &DiskOptions, script: &[u8], strict: Option<&Sound>) {
    for operation in script.chunks(OPERATION_BYTES).take(4) {
        let mut values = Values(operation);
        let (what, by) = (values.u8(), (u64::from(values.u16()) + 1) * SECTOR);
        let size = match what & 3 {
            0 => NewSize::Larger(by),
            1 => NewSize::Smaller(by),
            2 => NewSize::Larger(affordable(world, by << (what >> 2 & 31))),
            _ => NewSize::Of(by),
        };
        let shrinking = if what & 0x80 == 0 { Shrinking::Accepted } else { Shrinking::Refused };
        let before = strict.map(|_| ends(world, options, None));
        let resized = resize(storage(world), Path::new(TOP), size, shrinking, options);
        let (Some(sound), Some((known, old))) = (strict, before.flatten()) else { continue };
        let (from, to) = resized.map_or((old, old), |resized| (resized.from, resized.to));
        sound.judge(world, &format!("{size:?}"));
        let left = known.below(from.min(to));
        let (_, new) = ends(world, options, Some(left)).expect("it opens as before");
        assert_eq!(new, to / SECTOR * SECTOR, "{size:?}");
        if to > from {
            let read_only = DiskOptions { read_only: true, ..options.clone() };
            let mut session = Session::open(world, &read_only, None).expect("it opens as before");
            let start = from.next_multiple_of(SECTOR);
            let length = WINDOW.min(new.saturating_sub(start));
            let found = if length == 0 { None } else { session.read(start, length) };
            let zeros = found.is_none_or(|found| found.iter().all(|byte| *byte == 0));
            assert!(zeros, "{size:?}: what is new is not zero");
            if !judge_failures(&session, strict) {
                return;
            }
        }
    }
}

/// A number of bytes to grow a disk by. Growing allocates an L1 table of up to 32 MiB and then holds it several
/// times. So this requests either less than a tenth of that at a time, or more than is possible.
fn affordable(world: &SimWorld, by: u64) -> u64 {
    let Some(header) = header(world) else { return by };
    let geometry = header.geometry();
    let an_entry = geometry.cluster_size() / geometry.l2_entry_size() * geometry.cluster_size();
    let (most, all) = (an_entry << 18, an_entry << 22);
    if (most..=all).contains(&by) { most } else { by }
}

/// Reads the start and the end of a disk that is not open, and compares them with what is known. Returns what is
/// known then, and the disk's size.
fn ends(world: &SimWorld, options: &DiskOptions, known: Option<Known>) -> Option<(Known, u64)> {
    let read_only = DiskOptions { read_only: true, ..options.clone() };
    let mut session = Session::open(world, &read_only, Some(known.unwrap_or_default())).ok()?;
    let size = session.size();
    let length = WINDOW.min(size);
    if length > 0 {
        session.read(0, length);
        session.read(size - length, length);
    }
    session.known.take().map(|known| (known, size))
}
