//! Reads that the fast path does not serve: unresolved, mixed or compressed clusters, and memory that needs a bounce
//! buffer.

use engine::{CompressedCluster, Extent, Source};
use qcow2::{GuestOffset, HostOffset};
use smallvec::SmallVec;
use storage::guest::{GuestSlices, copy_to_guest, fill_guest_zero, guest_len, subrange};
use storage::{AlignedBuf, GuestSlice, Kind, Operation, Part, Parts, Storage};

use crate::bounds::BOUNCE_BYTES;
use crate::error::RequestError;
use crate::range::ByteRange;
use crate::runtime::driver::Strand;
use crate::serve::worker::Worker;

impl<S: Storage> Worker<S> {
    /// Fills guest memory from the disk.
    pub async fn read(&self, offset: u64, slices: &[GuestSlice]) -> Result<(), RequestError> {
        let length = guest_len(slices) as u64;
        let mut done = 0;
        while done < length {
            let at = GuestOffset(offset + done);
            let extents = self.some_extents(at, length - done).await?;
            let mut direct: SmallVec<[Operation; 4]> = SmallVec::new();
            let mut compressed = Vec::new();
            for extent in extents {
                let memory = subrange(slices, done as usize, extent.length as usize);
                done += extent.length;
                match extent.source {
                    Source::Zero => fill_guest_zero(&memory),
                    Source::Data { file, offset } => {
                        let file = self.shared.file(file);
                        if file.takes(&memory) {
                            direct.push(guest_operation(file.id, Kind::Read, offset, &memory));
                        } else {
                            self.read_bounced(file.id, offset, &memory).await?;
                        }
                    }
                    Source::Compressed { cluster, within } => compressed.push((cluster, within, memory)),
                }
            }
            let direct = async { self.driver.run_all(direct).await.map_err(RequestError::io("reading")) };
            if compressed.is_empty() {
                direct.await?;
                continue;
            }
            let mut all: Vec<Strand<'_, _>> = vec![Box::pin(direct)];
            for (cluster, within, memory) in compressed {
                all.push(Box::pin(self.read_compressed(cluster, within, memory)));
            }
            self.driver.run_together(all).await?;
        }
        Ok(())
    }

    async fn read_compressed(
        &self,
        cluster: CompressedCluster,
        within: u64,
        memory: GuestSlices,
    ) -> Result<(), RequestError> {
        let bytes = self.inflated(cluster).await?;
        copy_to_guest(&bytes, within as usize, &memory);
        Ok(())
    }

    /// The sources of a prefix of a range. Some tables of a whole slice of the map may be unreadable while those of
    /// this range alone are readable.
    async fn some_extents(&self, at: GuestOffset, length: u64) -> Result<Vec<Extent>, RequestError> {
        match self.ask(|engine, waker| engine.plan_read(at, length, waker)).await {
            Err(RequestError::Io { .. }) => {
                self.ask(|engine, waker| engine.plan_read_exact(at, length, waker)).await
            }
            other => other,
        }
    }

    async fn read_bounced(
        &self,
        file: storage::FileId,
        offset: HostOffset,
        memory: &[GuestSlice],
    ) -> Result<(), RequestError> {
        let length = guest_len(memory);
        let _permit = self.driver.reserve_buffers(length.min(BOUNCE_BYTES)).await;
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(BOUNCE_BYTES);
            let operation = Operation::bare(file, Kind::Read, offset.0 + done as u64);
            let (result, buffer) = self.driver.run_buffer(operation, self.buffer(piece)).await;
            result.map_err(RequestError::io("reading"))?;
            copy_to_guest(buffer.as_slice(), 0, &subrange(memory, done, piece));
            self.driver.pool.give(buffer);
            done += piece;
        }
        Ok(())
    }

    /// The sources of a whole range.
    pub async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, RequestError> {
        let mut all = Vec::new();
        let mut done = 0;
        while done < range.length {
            let at = GuestOffset(range.offset + done);
            let some = self.some_extents(at, range.length - done).await?;
            for extent in some {
                done += extent.length;
                engine::push_extent(&mut all, extent.source, extent.length);
            }
        }
        Ok(all)
    }

    /// Reads extents into buffers, and fills with zeros past them up to `length` bytes in all.
    pub async fn read_extents(&self, extents: &[Extent], length: usize) -> Result<Parts, RequestError> {
        let mut pieces: Vec<Option<AlignedBuf>> = Vec::new();
        pieces.resize_with(extents.len(), || None);
        let reads = pieces.iter_mut().zip(extents).map(|(piece, extent)| -> Strand<'_, RequestError> {
            Box::pin(async move { self.read_extent(extent).await.map(|buffer| *piece = Some(buffer)) })
        });
        self.driver.run_together(reads.collect()).await?;
        let mut parts: Parts = pieces.into_iter().flatten().map(Part::Owned).collect();
        let covered: u64 = extents.iter().map(|extent| extent.length).sum();
        let past = length.saturating_sub(covered as usize);
        if past > 0 {
            parts.push(Part::Owned(self.driver.pool.take_zeroed(past)));
        }
        Ok(parts)
    }

    async fn read_extent(&self, extent: &Extent) -> Result<AlignedBuf, RequestError> {
        let length = extent.length as usize;
        match extent.source {
            Source::Zero => Ok(self.driver.pool.take_zeroed(length)),
            Source::Data { file, offset } => {
                let operation = Operation::bare(self.shared.file(file).id, Kind::Read, offset.0);
                let (result, buffer) = self.driver.run_buffer(operation, self.buffer(length)).await;
                result.map_err(RequestError::io("reading data for a copy-on-write")).map(|()| buffer)
            }
            Source::Compressed { cluster, within } => {
                let bytes = self.inflated(cluster).await?;
                let mut buffer = self.buffer(length);
                buffer.as_mut_slice().copy_from_slice(&bytes[within as usize..][..length]);
                Ok(buffer)
            }
        }
    }
}

/// An operation on guest memory in place.
fn guest_operation(
    file: storage::FileId,
    kind: Kind,
    offset: HostOffset,
    memory: &[GuestSlice],
) -> Operation {
    let parts = memory.iter().copied().map(Part::Guest).collect();
    Operation::new(file, kind, offset.0, parts)
}
