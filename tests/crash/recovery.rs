//! Serves a crash state until the search for leaks ends. Then nothing leaks any more, and the contents are the same.

use std::path::Path;

use disk::{Disk, Keeper};
use storage_sim::{Image, SimOptions, SimStorage, SimWorld};

use super::examine::{Seen, examine};
use super::shape::{Past, Start};

/// The most polls of a search.
const TURNS_MAX: u32 = 100_000;

/// Opens an image, lets the housekeeper complete its work, and closes it.
///
/// # Errors
/// A fault of the image afterwards. `seen` is its state before.
pub fn recover(image: &Image, start: &Start, seen: &Seen, lasting: bool) -> Result<(), String> {
    if !start.shape.is_qcow2() {
        return Ok(());
    }
    compare(&examine(&serve(image, start)?, start), start, seen, lasting)
        .map_err(|wrong| format!("after the search for leaks: {wrong}"))
}

/// The image after serving it until the search for leaks ends, and closing it.
///
/// # Errors
/// The reason why it cannot be served.
pub fn serve(image: &Image, start: &Start) -> Result<Image, String> {
    let world = SimWorld::from_image(image.clone(), 1, SimOptions::calm());
    let failed = |error| format!("when leaks are searched for: {error}");
    let disk =
        Disk::open_unkept(world.storage(), Path::new(&start.top), &start.shape.options()).map_err(failed)?;
    // A machine that crashed has lost the journal with its memory.
    disk.keep_journal(None).map_err(failed)?;
    let mut keeper = disk.keeper().map_err(failed)?;
    wait_for_search(&disk, &mut keeper)?;
    drop(keeper);
    disk.close().map_err(failed)?;
    Ok(world.image())
}

/// Lets the housekeeper work until the search for leaks is over and nothing is left to do.
///
/// # Errors
/// The search does not end.
pub fn wait_for_search(disk: &Disk<SimStorage>, keeper: &mut Keeper<SimStorage>) -> Result<(), String> {
    let is_busy = || {
        let status = disk.status();
        status.searching || status.quarantined_clusters > 0 || status.dirty_bytes > 0
    };
    let mut turns = 0;
    keeper.poll();
    while is_busy() {
        turns += 1;
        if turns > TURNS_MAX {
            return Err(format!("the search for leaks does not end: {:?}", disk.status()));
        }
        keeper.wait(None);
        keeper.poll();
    }
    Ok(())
}

fn compare(after: &Seen, start: &Start, seen: &Seen, lasting: bool) -> Result<(), String> {
    if let Some(wrong) = &after.wrong {
        return Err(wrong.clone());
    }
    if let Some(at) = after.values.iter().zip(&seen.values).position(|(after, before)| after != before) {
        return Err(format!("sector {at} held {}, and now {}", seen.values[at], after.values[at]));
    }
    if after.values.len() != seen.values.len() || after.snapshots != seen.snapshots {
        return Err("the disk has another size, or other snapshots".to_owned());
    }
    // The search ignores refcounts past the end of the file. In version 2 a change of a closed image sets no mark, so
    // the leaks of a killed change stay.
    let lasting = lasting || start.shape.past == Past::Shared;
    let most = if lasting { seen.leaks } else { start.leaks } + seen.hidden_leaks;
    if after.leaks > most {
        return Err(format!("{} clusters leak, {} did before", after.leaks, seen.leaks));
    }
    Ok(())
}
