//! Writes that the fast path does not serve: allocation, copy-on-write, and memory that needs a bounce buffer.

use engine::{Allocation, Extent, FileIndex, Mapping, Source, WritePlan};
use qcow2::{GuestOffset, HostOffset};
use storage::guest::{GuestSlices, copy_from_guest, guest_len, subrange};
use storage::{AlignedBuf, GuestSlice, Kind, Operation, Part, Parts, Storage};

use crate::bounds::{BOUNCE_BYTES, COPIED_MAX};
use crate::error::RequestError;
use crate::range::ByteRange;
use crate::rules::{self, Awaited};
use crate::runtime::driver::Strand;
use crate::serve::worker::Worker;

/// The bytes of a write.
#[derive(Clone, Copy)]
pub(crate) enum Payload<'a> {
    /// The guest's bytes.
    Guest(&'a [GuestSlice]),
    /// This many zeros.
    Zeros(u64),
}

impl Payload<'_> {
    pub fn len(&self) -> u64 {
        match self {
            Payload::Guest(slices) => guest_len(slices) as u64,
            Payload::Zeros(length) => *length,
        }
    }
}

/// The old contents that new clusters need before and after the guest's bytes.
struct Fill {
    head: Option<Vec<Extent>>,
    tail: Option<Vec<Extent>>,
}

/// A range of a file that holds the contents before the guest's bytes and those after them, exactly that far apart.
#[derive(Clone, Copy)]
struct Around {
    file: FileIndex,
    offset: HostOffset,
    length: u64,
}

impl Fill {
    /// The range from which one read brings both sides, around `length` bytes of the guest's.
    fn around(&self, length: u64) -> Option<Around> {
        let (Some([head]), Some([tail])) = (self.head.as_deref(), self.tail.as_deref()) else { return None };
        let (Source::Data { file, offset }, Source::Data { file: other, offset: after }) =
            (head.source, tail.source)
        else {
            return None;
        };
        let adjoin = file == other && offset.0 + head.length + length == after.0;
        let around = Around { file, offset, length: head.length + length + tail.length };
        (adjoin && length <= COPIED_MAX).then_some(around)
    }
}

/// The memory of a part of a request's slices.
fn memory_of(slices: &[GuestSlice], part: ByteRange) -> GuestSlices {
    subrange(slices, part.offset as usize, part.length as usize)
}

impl<S: Storage> Worker<S> {
    /// Writes; the caller holds a claim on the range, unless the top image is raw.
    pub async fn write(&self, offset: u64, payload: Payload<'_>) -> Result<(), RequestError> {
        let length = payload.len();
        let mut done = 0;
        while done < length {
            let left = self.piece(payload, length - done);
            let at = GuestOffset(offset + done);
            if self.engine().lookup(at) == Mapping::Unresolved {
                // Fills the map for the next write here. This write does not depend on it.
                let _ = self.ask(|engine, waker| engine.plan_read(at, 1, waker)).await;
            }
            let plan = if self.shared.is_qcow2() {
                let turn = self.turn();
                self.ask_in_turn(&turn, |engine, waker| engine.plan_write(at, left, &turn, waker)).await?
            } else {
                self.check_writable()?;
                WritePlan::InPlace { file: self.shared.data, offset: HostOffset(at.0), length: left }
            };
            done += match plan {
                WritePlan::InPlace { file, offset, length } => {
                    self.write_in_place(file, offset, payload, ByteRange::new(done, length)).await?;
                    length
                }
                WritePlan::Allocate(allocation) => self.write_new(allocation, at.0, payload, done).await?,
            };
        }
        Ok(())
    }

    /// Writes a part of a payload in place.
    async fn write_in_place(
        &self,
        file: FileIndex,
        offset: HostOffset,
        payload: Payload<'_>,
        part: ByteRange,
    ) -> Result<(), RequestError> {
        let permit = self.payload_permit(payload, part, 0).await;
        let parts = self.parts(payload, part);
        let file = self.shared.file(file).id;
        let operation = Operation::new(file, Kind::Write, offset.0, parts);
        let result = self.driver.run_all([operation]).await.map_err(RequestError::io("writing"));
        drop(permit);
        result
    }

    /// Writes zeros at the guest's offsets in the data file, regardless of the tables.
    pub async fn write_raw_zeros(&self, range: ByteRange) -> Result<(), RequestError> {
        let (file, payload) = (self.shared.data, Payload::Zeros(range.length));
        let mut done = 0;
        while done < range.length {
            let part = ByteRange::new(done, self.piece(payload, range.length - done));
            self.write_in_place(file, HostOffset(range.offset + done), payload, part).await?;
            done = part.end();
        }
        Ok(())
    }

    pub fn check_writable(&self) -> Result<(), RequestError> {
        if self.engine().has_failed() { Err(engine::EngineError::Failed.into()) } else { Ok(()) }
    }

    /// Bytes to plan for at a time: memory that must be copied is planned in bounded pieces.
    fn piece(&self, payload: Payload<'_>, left: u64) -> u64 {
        let copied = match payload {
            Payload::Guest(slices) => !self.shared.data_file().takes(slices),
            Payload::Zeros(_) => true,
        };
        if copied { left.min(BOUNCE_BYTES as u64) } else { left }
    }

    /// Reserves the buffer memory that this part of a payload needs, and `more` bytes.
    async fn payload_permit(&self, payload: Payload<'_>, part: ByteRange, more: u64) -> impl Sized + '_ {
        let copied = match payload {
            Payload::Guest(slices) => !self.shared.data_file().takes(&memory_of(slices, part)),
            Payload::Zeros(_) => true,
        };
        let bytes = more + if copied { part.length } else { 0 };
        if bytes == 0 { None } else { Some(self.driver.reserve_buffers(bytes as usize).await) }
    }

    /// The memory of a part of a payload: the guest's own where direct I/O accepts it, else a buffer.
    fn parts(&self, payload: Payload<'_>, part: ByteRange) -> Parts {
        match payload {
            Payload::Guest(slices) => {
                let memory = memory_of(slices, part);
                if self.shared.data_file().takes(&memory) {
                    return memory.into_iter().map(Part::Guest).collect();
                }
                let mut buffer = self.buffer(part.length as usize);
                copy_from_guest(&memory, &mut buffer, 0);
                Parts::from_iter([Part::Owned(buffer)])
            }
            Payload::Zeros(_) => {
                Parts::from_iter([Part::Owned(self.driver.pool.take_zeroed(part.length as usize))])
            }
        }
    }

    /// Fills new clusters and publishes them. Returns how many of the guest's bytes they hold.
    async fn write_new(
        &self,
        mut allocation: Allocation,
        at: u64,
        payload: Payload<'_>,
        done: u64,
    ) -> Result<u64, RequestError> {
        match self.fill_new(&mut allocation, at, payload, done).await {
            Ok(()) => {
                let length = allocation.length;
                self.engine().commit_write(allocation);
                self.shared.note_change();
                Ok(length)
            }
            Err(error) => {
                drop(allocation);
                self.shared.note_change();
                Err(error)
            }
        }
    }

    async fn fill_new(
        &self,
        new: &mut Allocation,
        at: u64,
        payload: Payload<'_>,
        done: u64,
    ) -> Result<(), RequestError> {
        let fill = self.plan_fill(new, at).await?;
        let (head, tail) =
            (fill.head.as_ref().map_or(0, |_| new.head), fill.tail.as_ref().map_or(0, |_| new.tail));
        let around = fill.around(new.length);
        let more = head + tail + around.map_or(0, |_| new.length);
        let part = ByteRange::new(done, new.length);
        let permit = self.payload_permit(payload, part, more).await;
        let whole = match around {
            Some(source) => self.read_around(new, source, payload, part).await,
            None => None,
        };
        // One write for all: the contents before, the guest's bytes, the contents after.
        let parts = match whole {
            Some(buffer) => Parts::from_iter([Part::Owned(buffer)]),
            None => {
                let (mut parts, after) = self.read_fill(new, &fill).await?;
                parts.extend(self.parts(payload, part));
                parts.extend(after);
                parts
            }
        };
        let offset = new.offset.0 + new.head - head;
        let mut operation = Operation::new(self.shared.file(new.file).id, Kind::Write, offset, parts);
        // Where the file is in memory, this write mostly waits for the host to allocate memory.
        operation.offload = self.driver.has_other_work();
        if !rules::waits_for(Awaited::Data) {
            drop(self.driver.run(operation));
            return Ok(());
        }
        let link = self.start_early_link(new);
        let result = self.driver.run_all([operation]).await.map_err(RequestError::io("writing"));
        drop(permit);
        match link {
            // Nothing else may be awaited in between, because a flush may wait for this early commit.
            Some(link) => self.judge_early_link(new, link.await).and(result),
            None => result,
        }
    }

    /// Reads the contents before and after the guest's bytes into buffers.
    async fn read_fill(&self, new: &Allocation, fill: &Fill) -> Result<(Parts, Parts), RequestError> {
        let (mut before, mut after) = (Parts::new(), Parts::new());
        let sides = [(&fill.head, new.head, &mut before), (&fill.tail, new.tail, &mut after)];
        let mut reads: Vec<Strand<'_, _>> = Vec::new();
        for (extents, length, parts) in sides {
            if let Some(extents) = extents {
                reads.push(Box::pin(async move {
                    self.read_extents(extents, length as usize).await.map(|read| *parts = read)
                }));
            }
        }
        self.driver.run_together(reads).await?;
        Ok((before, after))
    }

    /// The whole contents of an allocation in one buffer: one read brings the surroundings, then the guest's bytes
    /// are copied between them. `None` if the read fails: perhaps only the range in between cannot be read.
    async fn read_around(
        &self,
        new: &Allocation,
        source: Around,
        payload: Payload<'_>,
        part: ByteRange,
    ) -> Option<AlignedBuf> {
        let (head, length) = (new.head as usize, new.length as usize);
        let mut buffer = self.buffer(head + length + new.tail as usize);
        let whole = buffer.len();
        buffer.truncate(source.length as usize);
        let operation = Operation::bare(self.shared.file(source.file).id, Kind::Read, source.offset.0);
        let (result, mut buffer) = self.driver.run_buffer(operation, buffer).await;
        if result.is_err() {
            self.driver.pool.give(buffer);
            return None;
        }
        buffer.set_len(whole);
        // Bytes past the end of the disk are zero.
        buffer.as_mut_slice()[source.length as usize..].fill(0);
        match payload {
            Payload::Guest(slices) => {
                copy_from_guest(&memory_of(slices, part), &mut buffer, head);
            }
            Payload::Zeros(_) => buffer.as_mut_slice()[head..head + length].fill(0),
        }
        Some(buffer)
    }

    /// Plans the contents around the guest's bytes. A side needs none where the host reads as zero and so should the
    /// guest.
    async fn plan_fill(&self, new: &Allocation, at: u64) -> Result<Fill, RequestError> {
        let needed = |extents: Vec<Extent>| {
            let zero = extents.iter().all(|extent| extent.source == Source::Zero);
            (!zero || !new.known_zero).then_some(extents)
        };
        let mut fill = Fill { head: None, tail: None };
        if new.head > 0 {
            fill.head = needed(self.extents(ByteRange::between(at - new.head, at)).await?);
        }
        if new.tail > 0 {
            let end = at + new.length;
            // Bytes past the end of the disk are zero.
            let within = new.tail.min(self.engine().size() - end);
            fill.tail = needed(self.extents(ByteRange::new(end, within)).await?);
        }
        Ok(fill)
    }
}
