//! Runs a model's operations on a real device through the client.

use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::client::{Client, ClientError, MemoryMessages, Options, Status};
use crate::model::{self, ByteModel, Difference, Operation};

/// A difference between the device and the model.
#[derive(Debug, Error)]
pub enum PlayError {
    /// The device violated the protocol.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A read returned other bytes than the model.
    #[error(transparent)]
    Differs(#[from] Box<Difference>),
    /// The device refused a request.
    #[error("{operation:?}: {status:?}")]
    Refused {
        /// The request.
        operation: Operation,
        /// Its status.
        status: Status,
    },
}

/// Options of the client that must all give the same results: rings, regions, features, polling.
pub fn manners() -> Vec<Options> {
    let base = Options { data_capacity: 1 << 18, ..Options::default() };
    vec![
        base.clone(),
        Options { indirect: false, segments: 5, queue_size: 32, ..base.clone() },
        Options { segments: 7, regions: 8, base: 65_530, spin_max: Duration::ZERO, ..base.clone() },
        Options { memory_messages: MemoryMessages::Regions, regions: 3, ..base.clone() },
        base.without(&[VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC]),
    ]
}

/// Runs one operation on a disk and on its model. Compares reads.
///
/// # Errors
/// If the device violates the protocol, returns a status other than OK, or reads other bytes than the model.
pub fn perform(client: &mut Client, model: &mut ByteModel, operation: &Operation) -> Result<(), PlayError> {
    let status = match *operation {
        Operation::Read { offset, length } => {
            let mut data = vec![0; length as usize];
            let status = client.read(offset, &mut data)?;
            model.compare(offset, &data)?;
            status
        }
        Operation::Write { offset, length, seed } => {
            client.write(offset, &model::contents(seed, offset, length))?
        }
        Operation::Discard { offset, length } => client.discard(offset, length)?,
        Operation::WriteZeroes { offset, length, unmap } => client.write_zeroes(offset, length, unmap)?,
        Operation::Flush => client.flush()?,
    };
    model.apply(operation);
    if status.is_ok() { Ok(()) } else { Err(PlayError::Refused { operation: *operation, status }) }
}
