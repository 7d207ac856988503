//! Changes an image that is not in use: drives the engine's planner and carries its plan out.
//!
//! Owns the reads and the corrections of tables, many at once where the order does not matter; `file_steps` carries out
//! the rest. The engine decides which changes are possible, and the order of writes. `snapshot` and `resize` decide what to change.

use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::task::Poll;

use engine::change::{Change, Plan, PlanStep, Planner};
use engine::check::Step;
use names::shown;
use qcow2::{Header, HostRange, SECTOR};
use storage::IoQueue;
use thiserror::Error;

pub use engine::change::ChangeRefusal;

use crate::error::OpenError;
use crate::image::file_steps::FileSteps;
use crate::image::image_file::ImageFile;

/// Operations in flight, of at most 1 MiB each.
pub(crate) const QUEUE_DEPTH: u32 = 16;

/// Why a change failed.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The image could not be opened or read, or is not to be written. Nothing has changed.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The image was not closed cleanly, and could not be repaired.
    #[error(transparent)]
    Repair(OpenError),
    /// The change is impossible. Nothing has changed.
    #[error("{}: {source}", shown(path))]
    Refused {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: ChangeRefusal,
    },
    /// The change was not completed.
    #[error(
        "{source}; the change may be half done: the disk and the other snapshots are as they were, or as they were to \
         become, and what is left over is repaired when the image is opened for writing, or by `qemu-img check -r all`"
    )]
    Interrupted {
        /// The error.
        source: OpenError,
    },
}

/// Plans a change: reads its input, and writes nothing.
pub(crate) async fn plan<Q: IoQueue>(
    image: &ImageFile<'_, Q>,
    header: &Header,
    change: Change,
) -> Result<Plan, ChangeError> {
    let refused = |source| ChangeError::Refused { path: image.info.path.clone(), source };
    let mut planner = Planner::new(header, image.info.length, change).map_err(refused)?;
    while let Step::Read { offset, length } = planner.step() {
        let mut pieces = planner.ahead(QUEUE_DEPTH as usize);
        if pieces.is_empty() {
            pieces.push(HostRange::new(offset, length as u64));
        }
        for bytes in read_all(image, &pieces).await? {
            planner.feed(&bytes);
        }
    }
    planner.plan().map_err(refused)
}

/// Reads pieces concurrently.
async fn read_all<Q: IoQueue>(
    image: &ImageFile<'_, Q>,
    pieces: &[HostRange],
) -> Result<Vec<Vec<u8>>, OpenError> {
    let reads = pieces.iter().map(|piece| image.read("metadata", (*piece).into()));
    all(reads.collect()).await.into_iter().collect()
}

/// Runs futures concurrently until all have ended.
async fn all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    poll_fn(|context| {
        let mut pending = false;
        for (future, output) in running.iter_mut().filter(|(_, output)| output.is_none()) {
            match future.as_mut().poll(context) {
                Poll::Ready(value) => *output = Some(value),
                Poll::Pending => pending = true,
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().map(|(_, output)| output.expect("each has ended")).collect()
}

/// Carries a plan out.
pub(crate) async fn carry_out<Q: IoQueue>(
    image: &ImageFile<'_, Q>,
    plan: &mut Plan,
) -> Result<(), ChangeError> {
    write_all(image, plan).await.map_err(|source| ChangeError::Interrupted { source })
}

async fn write_all<Q: IoQueue>(image: &ImageFile<'_, Q>, plan: &mut Plan) -> Result<(), OpenError> {
    let mut steps = FileSteps::new(image);
    if let Some(length) = plan.marked_length() {
        steps.lengthen(length).await?;
    }
    let mut corrections = Vec::new();
    let mut step = plan.next_step();
    while let Some(now) = step {
        match now {
            PlanStep::File(now) => steps.carry_out(now).await?,
            PlanStep::Correct(piece) => corrections.push(piece),
        }
        // One rule (`Plan::correct`) holds until the last of its pieces is written.
        let whole = corrections.len() >= QUEUE_DEPTH as usize || !plan.corrects_more();
        if whole && !corrections.is_empty() {
            correct(image, plan, &std::mem::take(&mut corrections)).await?;
        }
        step = plan.next_step();
    }
    Ok(())
}

/// Corrects pieces of tables that do not overlap.
async fn correct<Q: IoQueue>(
    image: &ImageFile<'_, Q>,
    plan: &Plan,
    pieces: &[HostRange],
) -> Result<(), OpenError> {
    let mut writes = Vec::new();
    for (piece, mut bytes) in pieces.iter().zip(read_all(image, pieces).await?) {
        if let Some(changed) = plan.correct(&mut bytes) {
            writes.push((piece.offset.0 + changed.start as u64, bytes[changed].to_vec()));
        }
    }
    // Two concurrent changes within one unit would overwrite each other.
    let at_once = if image.unit() > SECTOR { 1 } else { writes.len().max(1) };
    for some in writes.chunks(at_once) {
        let some = some.iter().map(|(offset, bytes)| image.write(*offset, bytes));
        all(some.collect()).await.into_iter().collect::<Result<(), OpenError>>()?;
    }
    Ok(())
}
