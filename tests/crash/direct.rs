//! Requests to a disk one at a time, each on a queue of its own, without a housekeeper and without an oracle.

use std::path::Path;

use disk::{Completed, Disk, Request, RequestError, RequestId};
use storage_sim::{SimStorage, SimWorld};

use super::memory::{memory, scatter};
use super::shape::{Shape, TOP};
use super::stamp::{SECTOR, stamp};

/// Opens the disk of a world.
///
/// # Panics
/// If it does not open.
pub fn open(world: &SimWorld, shape: &Shape) -> Disk<SimStorage> {
    Disk::open_unkept(world.storage(), Path::new(TOP), &shape.options()).expect("it opens")
}

/// Writes `count` sectors from `sector` on, stamped as the write of this number.
///
/// # Panics
/// If the write fails.
pub fn write(disk: &Disk<SimStorage>, sector: u64, count: u64, number: u32) {
    try_write(disk, sector, count, number).expect("it succeeds");
}

/// As [`write()`], where it may fail.
///
/// # Errors
/// That of the request.
pub fn try_write(disk: &Disk<SimStorage>, sector: u64, count: u64, number: u32) -> Result<(), RequestError> {
    let mut bytes = vec![0; (count * SECTOR) as usize];
    for (at, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR as usize)) {
        stamp(at, number, bytes);
    }
    scatter(&bytes, &memory(0, count, 0));
    ask(disk, Request::Write { offset: sector * SECTOR, write_through: false }, count)
}

/// Carries out a request with memory for `count` sectors.
///
/// # Panics
/// If it fails.
pub fn carry_out(disk: &Disk<SimStorage>, request: Request, count: u64) {
    ask(disk, request, count).expect("it succeeds");
}

fn ask(disk: &Disk<SimStorage>, request: Request, count: u64) -> Result<(), RequestError> {
    let slices = if count > 0 { memory(0, count, 0) } else { Vec::new() };
    let mut queue = disk.queue(8).expect("a queue");
    queue.submit(RequestId(0), request, &slices);
    let mut done: Vec<Completed> = Vec::new();
    while done.is_empty() {
        queue.wait(None);
        queue.poll(&mut done);
    }
    done.pop().expect("one").result
}
