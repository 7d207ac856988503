//! Jobs for the threads that inflate, so that a ring's thread serves other requests meanwhile.
//!
//! If none are allowed, the caller inflates on its own thread: for a simulator, in which everything must happen in one
//! order.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use qcow2::Compression;
use storage::AlignedBuf;
use storage::workers::{self, Workers};

use super::InflateError;
use super::decode::Decoder;

/// Inflates clusters, on other threads if any are allowed.
pub(crate) struct Pool {
    workers: Option<Workers<Job>>,
}

/// A cluster to be inflated. If it is dropped before, it reports that.
struct Job {
    compressed: Option<Compressed>,
    answer: Option<Arc<Answer>>,
}

/// The data of a compressed cluster.
pub(crate) struct Compressed {
    pub compression: Compression,
    /// The bytes that were read.
    pub buffer: AlignedBuf,
    /// The range of the data in the buffer.
    pub data: Range<usize>,
    /// Bytes of the inflated cluster.
    pub cluster_size: usize,
}

type Result<T> = std::result::Result<T, InflateError>;

#[derive(Default)]
struct Answer {
    /// Leaf lock.
    state: Mutex<AnswerState>,
}

#[derive(Default)]
struct AnswerState {
    result: Option<(Result<Vec<u8>>, Option<AlignedBuf>)>,
    waker: Option<Waker>,
}

impl Pool {
    /// A pool of at most `threads_max` threads. Without any, the caller's thread inflates.
    pub fn new(threads_max: usize) -> Self {
        Pool { workers: (threads_max > 0).then(|| Workers::new("strata-inflate", threads_max)) }
    }

    /// Inflates a cluster; returns the buffer, unless it was lost with a thread.
    pub async fn inflate(&self, compressed: Compressed) -> (Result<Vec<u8>>, Option<AlignedBuf>) {
        let Some(workers) = &self.workers else { return compressed.inflate(&mut Decoder::default()) };
        let answer = Arc::<Answer>::default();
        workers.submit([Job { compressed: Some(compressed), answer: Some(Arc::clone(&answer)) }]);
        std::future::poll_fn(|context| {
            let mut state = answer.lock();
            if let Some(result) = state.result.take() {
                return Poll::Ready(result);
            }
            state.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl workers::Job for Job {
    type Scratch = Decoder;

    fn run(mut self, decoder: &mut Decoder) {
        let compressed = self.compressed.take().expect("a job is run once");
        let result = compressed.inflate(decoder);
        if let Some(answer) = self.answer.take() {
            answer.give(result);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer.give((Err(InflateError::BrokenOff), None));
        }
    }
}

impl Compressed {
    fn inflate(self, decoder: &mut Decoder) -> (Result<Vec<u8>>, Option<AlignedBuf>) {
        let mut output = vec![0; self.cluster_size];
        let data = &self.buffer.as_slice()[self.data];
        let result = decoder.inflate(self.compression, data, &mut output);
        (result.map(|()| output), Some(self.buffer))
    }
}

impl Answer {
    fn lock(&self) -> MutexGuard<'_, AnswerState> {
        self.state.lock().expect("no panic under this lock")
    }

    fn give(&self, result: (Result<Vec<u8>>, Option<AlignedBuf>)) {
        let mut state = self.lock();
        state.result = Some(result);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Wake};
    use std::thread::{self, Thread};

    use super::*;

    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut future = std::pin::pin!(future);
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return value;
            }
            thread::park();
        }
    }

    /// A stored block of deflate with these bytes, after some bytes that do not belong to it.
    fn stored(bytes: &[u8]) -> Compressed {
        let length = bytes.len() as u16;
        let mut data = vec![0xee; 3];
        data.push(1);
        data.extend(length.to_le_bytes());
        data.extend((!length).to_le_bytes());
        data.extend(bytes);
        let mut buffer = AlignedBuf::new(data.len());
        buffer.as_mut_slice().copy_from_slice(&data);
        let (compression, data) = (Compression::Deflate, 3..data.len());
        Compressed { compression, buffer, data, cluster_size: bytes.len() }
    }

    #[test]
    fn every_job_is_answered_however_many_threads_there_are() {
        for threads_max in 0..4 {
            let pool = Pool::new(threads_max);
            thread::scope(|scope| {
                for asker in 0..6_u8 {
                    let pool = &pool;
                    scope.spawn(move || {
                        for round in 0..100_u8 {
                            let bytes = vec![asker ^ round; 512];
                            let (result, buffer) = block_on(pool.inflate(stored(&bytes)));
                            assert_eq!(result, Ok(bytes));
                            assert!(buffer.is_some());
                        }
                    });
                }
            });
            assert!(pool.workers.is_none_or(|workers| workers.running() <= threads_max));
        }
    }

    #[test]
    fn a_job_that_panics_is_answered_and_its_thread_continues() {
        let pool = Pool::new(1);
        let mut broken = stored(&[7; 512]);
        broken.data = 3..1 << 20;
        let (result, buffer) = block_on(pool.inflate(broken));
        assert_eq!((result, buffer.is_none()), (Err(InflateError::BrokenOff), true));
        assert_eq!(block_on(pool.inflate(stored(&[8; 512]))).0, Ok(vec![8; 512]));
    }
}
