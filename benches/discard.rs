//! The time to discard a whole disk, and to flush it afterwards: `cargo bench --bench discard -- IMAGE`.
//!
//! The image loses its data. A copy with preallocated metadata and no data is as good: `qemu-img create -f qcow2 -o
//! preallocation=metadata IMAGE 1T` in `/dev/shm`.

use std::path::Path;
use std::time::{Duration, Instant};

use disk::{Disk, DiskOptions, DiskQueue, Request, RequestId};
use storage::host::HostStorage;

/// Bytes of a request: a multiple of every cluster size.
const REQUEST: u64 = 1 << 30;
/// Requests in flight.
const DEPTH: u32 = 4;

fn main() {
    // Cargo passes `--bench`.
    let Some(image) = std::env::args().skip(1).find(|argument| !argument.starts_with("--")) else {
        eprintln!("name an image; its data is discarded");
        return;
    };
    let disk = Disk::open(HostStorage::new(), Path::new(&image), &DiskOptions::default()).expect("an image");
    let mut queue = disk.queue(DEPTH).expect("a queue");
    let before = disk.allocated(0).expect("a file");
    let size = disk.size();
    let discards = (0..size).step_by(REQUEST as usize).map(|offset| Request::Discard {
        offset,
        length: REQUEST.min(size - offset),
        write_through: false,
    });
    let (discarded, slowest) = run(&mut queue, discards);
    let (flushed, _) = run(&mut queue, [Request::Flush].into_iter());
    let cuts = disk.status().cuts;
    drop(queue);
    let closing = Instant::now();
    disk.close().expect("a clean close");
    println!(
        "{} GiB: discards {discarded:.2?} (slowest request {slowest:.2?}, {cuts} cuts), flush {flushed:.2?}, \
         close {:.2?}, {} MiB allocated before",
        size >> 30,
        closing.elapsed(),
        before >> 20,
    );
}

/// Runs requests, with some in flight. Returns the time of all, and that of the slowest.
fn run(
    queue: &mut DiskQueue<HostStorage>,
    mut requests: impl Iterator<Item = Request>,
) -> (Duration, Duration) {
    let start = Instant::now();
    let mut began = [start; DEPTH as usize];
    let (mut slowest, mut done, mut in_flight) = (Duration::ZERO, Vec::new(), 0);
    let mut vacant: Vec<u32> = (0..DEPTH).collect();
    loop {
        while let Some(slot) = vacant.pop() {
            let Some(request) = requests.next() else { break };
            began[slot as usize] = Instant::now();
            queue.submit(RequestId(slot), request, &[]);
            in_flight += 1;
        }
        if in_flight == 0 {
            return (start.elapsed(), slowest);
        }
        queue.poll(&mut done);
        if done.is_empty() {
            queue.wait(None);
        }
        for completed in done.drain(..) {
            completed.result.expect("a request");
            slowest = slowest.max(began[completed.id.0 as usize].elapsed());
            vacant.push(completed.id.0);
            in_flight -= 1;
        }
    }
}
