//! Overlays that a rig puts on top of its disk while it is in use, and what each layer must hold from then on.

use std::path::Path;
use std::sync::Arc;

use disk::{NewOverlay, Request};
use storage_sim::{Image, Moment};

use super::{Finished, Rig};
use crate::examine::values_now;
use crate::journal::Op;
use crate::shape::{Shape, Start, TOP, overlay_names};
use crate::stamp::{SECTOR, Value};

/// A layer that was the top.
#[derive(Clone)]
struct Layer {
    name: String,
    /// From then on it holds these values.
    since: Moment,
    values: Arc<[Value]>,
}

/// The layers of a chain, as they came.
#[derive(Clone, Default)]
pub struct Layers {
    /// The top image, and from when on the next open finds it.
    tops: Vec<(Moment, String)>,
    old: Vec<Layer>,
    shape: Option<Shape>,
}

impl Layers {
    /// The chain of a disk that is opened.
    pub fn new(start: &Start) -> Self {
        let tops = vec![(Moment(0), start.top.clone())];
        Layers { tops, old: Vec::new(), shape: Some(start.shape) }
    }

    /// The name of the top image.
    pub fn top(&self) -> &str {
        self.tops.last().map_or(TOP, |(_, name)| name)
    }
}

impl Finished {
    /// The top image that an open finds after a crash at this moment.
    pub fn top_at<'a>(&'a self, moment: Moment, start: &'a Start) -> &'a str {
        let tops = self.layers.tops.iter().rev();
        tops.clone().find(|(since, _)| *since <= moment).map_or(&start.top, |(_, name)| name)
    }

    /// Compares the layers that were the top by this moment with what they held then.
    ///
    /// # Errors
    /// The difference.
    pub fn compare_layers(&self, image: &Image, moment: Moment) -> Result<(), String> {
        let Some(shape) = &self.layers.shape else { return Ok(()) };
        for layer in self.layers.old.iter().filter(|layer| layer.since <= moment) {
            let name = &layer.name;
            let now = values_now(image, name, shape).map_err(|wrong| format!("layer \"{name}\": {wrong}"))?;
            if let Some(at) = now.iter().zip(layer.values.iter()).position(|(now, then)| now != then) {
                let (now, then) = (now[at], layer.values[at]);
                return Err(format!("layer \"{name}\" held {then} in sector {at}, and now {now}"));
            }
        }
        Ok(())
    }
}

impl Rig {
    /// Puts an overlay on top, if the image allows that.
    ///
    /// # Panics
    /// If it fails.
    pub(super) fn put_overlay(&mut self) {
        if !self.shape.takes_overlays() {
            return;
        }
        self.world.release_hung();
        self.exhaust();
        let there = self.world.image();
        let Some(name) = overlay_names().find(|name| there.file(Path::new(name)).is_none()) else { return };
        let below = self.layers.top().to_owned();
        let new = NewOverlay { path: name.clone().into(), backing_file: below.clone().into_bytes() };
        let overlay = self.disk.as_ref().expect("it is open").make_overlay(&new).expect("it is made");
        // Requests between that and the switch.
        let writes = self.random.below(4);
        let ops: Vec<Op> =
            (0..writes).map(|_| Op::write(self.random.below(self.journal.sectors), 1)).collect();
        self.play(&ops, 2);
        self.world.release_hung();
        self.exhaust();
        // It makes durable what a flush would.
        let flush = self.journal.submit(Op::Flush, 0, false, self.world.moment());
        let disk = self.disk.as_mut().expect("it is open");
        self.keeper = None;
        let parked: Vec<_> = self
            .queues
            .drain(..)
            .map(|queue| queue.park().unwrap_or_else(|_| panic!("it is idle")))
            .collect();
        let (world, mut named) = (self.world.clone(), None);
        let old = disk.snapshot(overlay, || {
            named = Some(world.moment());
            Ok(())
        });
        let old = old.expect("it is put on top");
        let since = self.world.moment();
        self.layers.tops.extend(named.map(|named| (named, name)));
        self.journal.end(flush, true, since);
        if let Some(watch) = &self.watch {
            disk.keep_journal(Some(Arc::clone(&watch.memory))).expect("it begins anew");
        }
        disk.let_go(old).expect("it is let go");
        let values = values_now(&self.world.image(), &below, &self.shape).expect("the layer can be read");
        self.layers.old.push(Layer { name: below, since, values });
        self.queues = parked.into_iter().map(|queue| disk.resume(queue).expect("a queue")).collect();
        self.keeper = Some(disk.keeper().expect("a housekeeper"));
        self.note_quiet();
    }
}

/// The request of an operation.
pub(super) fn request(op: Op, write_through: bool) -> Request {
    let bytes = |sectors: u64| sectors * SECTOR;
    match op {
        Op::Read { sector, .. } => Request::Read { offset: bytes(sector) },
        Op::Write { sector, .. } | Op::Gappy { sector, .. } => {
            Request::Write { offset: bytes(sector), write_through }
        }
        Op::Zeroes { sector, count, unmap } => {
            Request::WriteZeroes { offset: bytes(sector), length: bytes(count), unmap, write_through }
        }
        Op::Discard { sector, count } => {
            Request::Discard { offset: bytes(sector), length: bytes(count), write_through }
        }
        Op::Flush => Request::Flush,
        Op::Pause(_) | Op::Late(_) | Op::Change(_) | Op::Live(_) | Op::Overlay => {
            panic!("{op:?} is no request")
        }
    }
}
