//! Reading compressed clusters: the thread's own queue reads the data, the pool inflates it, the cache holds recent
//! results.

use engine::CompressedCluster;
use storage::{Kind, Operation, Storage};

use crate::error::RequestError;
use crate::inflate::{Compressed, Found, Inflated};
use crate::serve::worker::Worker;

impl<S: Storage> Worker<S> {
    /// The bytes of a compressed cluster. It waits for its own I/O and the pool, or for another request that does,
    /// and for memory that only such requests hold. So the caller may hold other buffers.
    pub async fn inflated(&self, cluster: CompressedCluster) -> Result<Inflated, RequestError> {
        match self.shared.inflated.find(cluster) {
            Found::Here(bytes) => Ok(bytes),
            Found::Coming(coming) => coming.outcome().await,
            Found::Yours(lease) => {
                let outcome = self.inflate(cluster).await;
                lease.done(&outcome);
                outcome
            }
        }
    }

    async fn inflate(&self, cluster: CompressedCluster) -> Result<Inflated, RequestError> {
        let layer = self.shared.layer_of(cluster.file);
        let header = layer.header.as_ref().expect("only qcow2 images have compressed clusters");
        let compression =
            header.compression().expect("an image whose compression is not known is not opened");
        let cluster_size = header.geometry().cluster_size() as usize;
        let file = self.shared.file(cluster.file);
        let alignment = u64::from(file.info.offset_alignment.max(512));
        let (first, past) = (cluster.offset.0, cluster.offset.0 + cluster.length);
        let start = first / alignment * alignment;
        let read = (past.next_multiple_of(alignment) - start) as usize;
        let _permit = self.driver.reserve_inflating(read + cluster_size).await;
        let operation = Operation::bare(file.id, Kind::Read, start);
        let (result, buffer) = self.driver.run_buffer(operation, self.buffer(read)).await;
        result.map_err(RequestError::io("reading compressed data"))?;
        let data = (first - start) as usize..(past - start) as usize;
        let compressed = Compressed { compression, buffer, data, cluster_size };
        let (result, buffer) = self.shared.inflaters.inflate(compressed).await;
        if let Some(buffer) = buffer {
            self.driver.pool.give(buffer);
        }
        let bytes = result.map_err(|source| RequestError::Compressed {
            path: layer.path.clone(),
            offset: first,
            length: cluster.length,
            source,
        })?;
        Ok(Inflated::new(bytes))
    }
}
