//! The null device: every request completes at once and no memory is touched. Its cost is that of the protocol and the
//! session, which is the limit for every disk behind the same session.
//!
//! It is a process of its own, so that its CPU time is separate from the client's.

use anyhow::Result;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost_blk::{
    BlockDevice, BlockQueue, Capacity, Completed, DeviceProfile, GuestSlice, Request, RequestId,
    ServeOptions, Server, StopHandle,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The largest ring size on offer, as in `strata serve`.
const QUEUE_SIZE: u16 = 1024;
/// The key of the queue's own eventfd; the keys of watched eventfds are their indices.
const WAKE: u64 = u64::MAX;

/// Serves a null device of `bytes` until the process is killed.
pub fn serve(socket: &Path, queues: u16, bytes: u64) -> Result<()> {
    let server = Server::bind(socket)?;
    let options = ServeOptions::new(queues, QUEUE_SIZE);
    Ok(server.serve(&Arc::new(NullDevice { bytes }), &options, &StopHandle::new()?)?)
}

struct NullDevice {
    bytes: u64,
}

impl BlockDevice for NullDevice {
    type Queue = NullQueue;

    fn profile(&self) -> DeviceProfile {
        DeviceProfile {
            capacity: Capacity::new(self.bytes / 512),
            block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 65536,
            read_only: false,
            discard: true,
            discard_alignment: 65536,
            write_zeroes: true,
            zeroes_are_data: false,
            serial: [0; 20],
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn queue(&self, depth: u32) -> io::Result<NullQueue> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let epoll = Epoll::new()?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        Ok(NullQueue { finished: Vec::with_capacity(depth as usize), epoll, wake, watched: Vec::new() })
    }
}

struct NullQueue {
    finished: Vec<Completed<()>>,
    epoll: Epoll,
    wake: Arc<EventFd>,
    watched: Vec<EventFd>,
}

impl BlockQueue for NullQueue {
    type Error = ();

    fn submit(&mut self, id: RequestId, _: Request, _: &[GuestSlice]) {
        self.finished.push(Completed { id, result: Ok(()) });
    }

    fn poll(&mut self, done: &mut Vec<Completed<()>>) {
        done.append(&mut self.finished);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        if !self.finished.is_empty() {
            return;
        }
        let milliseconds =
            timeout.map_or(-1, |timeout| i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); 4];
        // The wait may return early without a reason, so its failure needs no handling.
        let woken = self.epoll.wait(milliseconds, &mut events).unwrap_or(0);
        for event in &events[..woken] {
            let signal = match event.data() {
                WAKE => &*self.wake,
                watched => &self.watched[watched as usize],
            };
            let _ = signal.read();
        }
    }

    fn stop_waiting(&mut self) {
        // No request is pending: each completes on submission.
    }

    fn watch(&mut self, event: EventFd) {
        let interest = EpollEvent::new(EventSet::IN, self.watched.len() as u64);
        self.epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
            .expect("an eventfd from the session");
        self.watched.push(event);
    }

    fn notifier(&self) -> Arc<dyn Fn() + Send + Sync> {
        let wake = Arc::clone(&self.wake);
        Arc::new(move || {
            // A full counter means that the eventfd is signalled already.
            let _ = wake.write(1);
        })
    }
}
