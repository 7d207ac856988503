//! The gate between a session and its disk, in this process: a native client, the session, the device and real files.
//! Pauses of the disk, and stops of rings while it is paused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::{Disk, DiskOptions};
use qcow2::{Geometry, NewImage, Version};
use storage::host::HostStorage;
use strata::device::{BlockSizes, DiskDevice};
use strata_kit::client::{Request, Ticket};
use strata_kit::{Client, Options};
use strata_rig::Rig;
use vhost_blk::{ServeOptions, Server, StopHandle};

const CLUSTER: u64 = 65536;
const SIZE: u64 = 64 * CLUSTER;
/// Bytes of a write.
const PIECE: usize = 4096;
/// Writes in flight at a time.
const BATCH: u64 = 32;
/// How long a test looks for answers that must not come.
const LOOK: Duration = Duration::from_millis(100);

/// A folder with an image, and a device that serves it.
struct Stand {
    folder: tempfile::TempDir,
    device: Arc<DiskDevice<HostStorage>>,
    stop: StopHandle,
}

impl Stand {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("image");
        let geometry = Geometry {
            version: Version::V3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            size: SIZE,
        };
        let pieces = NewImage::new(geometry).layout().expect("a sound image");
        let bytes: Vec<u8> = pieces.into_iter().flat_map(|(_, bytes)| bytes).collect();
        std::fs::write(&image, bytes).expect("room for an image");
        let disk = Disk::open(HostStorage::new(), &image, &DiskOptions::default()).expect("a sound image");
        let device = Arc::new(DiskDevice::new(disk, [0; 20], BlockSizes::default()));
        Stand { folder, device, stop: StopHandle::new().expect("a stop handle") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Serves the device while `work` runs, then stops the server and closes the disk. Returns the image.
    fn serve(self, work: impl FnOnce(&Stand, Client)) -> (tempfile::TempDir, PathBuf) {
        let server = Server::bind(self.path("socket")).expect("a socket");
        std::thread::scope(|scope| {
            // Also stops on a panic: the scope waits for its thread.
            let _stop = StopAtLast(&self.stop);
            let (device, stop) = (&self.device, &self.stop);
            let serving = scope.spawn(move || server.serve(device, &ServeOptions::new(2, 1024), stop));
            work(&self, self.connect());
            self.stop.stop();
            serving.join().expect("no panic").expect("a good end");
        });
        let Stand { folder, device, .. } = self;
        Arc::into_inner(device).expect("the server is gone").close().expect("a clean close");
        let image = folder.path().join("image");
        (folder, image)
    }

    fn connect(&self) -> Client {
        let options = Options { data_capacity: CLUSTER as usize, ..Options::with_queues(2) };
        Client::connect(self.path("socket"), &options).expect("a session")
    }
}

struct StopAtLast<'a>(&'a StopHandle);

impl Drop for StopAtLast<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Submits a write of `value` bytes to each of the first pieces, over both queues.
fn submit_batch(client: &mut Client, value: u8) -> Vec<Ticket> {
    let data = vec![value; PIECE];
    let submit = |at: u64| {
        let request = Request::Write { offset: at * CLUSTER, data: &data };
        client.submit((at % 2) as usize, &request).expect("submitted")
    };
    (0..BATCH).map(submit).collect()
}

/// The disk of a copy of the image, as it would be found after a crash now.
fn found_in_copy(image: &Path) -> Vec<u8> {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).expect("room for a copy");
    Rig::open(&copy, &DiskOptions::default()).expect("a sound image").read_all()
}

fn has(disk: &[u8], value: u8) -> bool {
    (0..BATCH).all(|at| disk[(at * CLUSTER) as usize..][..PIECE].iter().all(|byte| *byte == value))
}

/// Panics if a request is answered within a while.
fn nothing_is_answered(client: &mut Client) {
    let until = Instant::now() + LOOK;
    for queue in client.queues() {
        assert!(queue.wait_used(until).is_err(), "an answer while the disk is paused");
    }
}

#[test]
fn a_paused_disk_is_durable_and_serves_nothing_until_it_is_resumed() {
    let (_folder, image) = Stand::new().serve(|stand, mut client| {
        let first = submit_batch(&mut client, 1);
        for ticket in first {
            assert!(client.wait(ticket).expect("answered").status.is_ok());
        }
        stand.device.pause().expect("paused");
        assert!(stand.device.is_paused());
        assert!(has(&found_in_copy(&stand.path("image")), 1), "it is durable without a flush of the guest");
        let second = submit_batch(&mut client, 2);
        nothing_is_answered(&mut client);
        stand.device.pause().expect("paused already");
        assert!(has(&found_in_copy(&stand.path("image")), 1), "nothing is written while it is paused");
        stand.device.resume();
        for ticket in second {
            assert!(client.wait(ticket).expect("answered").status.is_ok());
        }
        // Many times, with requests in flight at any moment.
        for round in 0..50 {
            let batch = submit_batch(&mut client, round);
            stand.device.pause().expect("paused");
            stand.device.resume();
            for ticket in batch {
                assert!(client.wait(ticket).expect("answered").status.is_ok());
            }
        }
        client.close().expect("a good end");
    });
    let mut rig = Rig::open(&image, &DiskOptions::default()).expect("a sound image");
    assert!(has(&rig.read_all(), 49));
}

#[test]
fn rings_stop_while_the_disk_is_paused() {
    Stand::new().serve(|stand, client| {
        stand.device.pause().expect("paused");
        let (mut session, mut queues) = client.into_parts();
        let data = vec![7; PIECE];
        let ticket = queues[0].submit(&Request::Write { offset: 0, data: &data }).expect("submitted");
        // As Cloud Hypervisor pauses a machine: the request stays in the ring.
        session.enable(0, false).expect("it stops");
        session.enable(0, true).expect("it starts again");
        let base = session.stop_ring(0).expect("it stops");
        assert_eq!(base, 0, "the request was not taken");
        session.restart_ring(&queues[0], base).expect("it starts again");
        assert!(queues[0].wait_used(Instant::now() + LOOK).is_err(), "an answer while the disk is paused");
        stand.device.resume();
        assert!(queues[0].wait(ticket).expect("answered").status.is_ok());
        // A hang-up, a new frontend, and the end of the daemon.
        stand.device.pause().expect("paused");
        let _never = queues[1].submit(&Request::Write { offset: 0, data: &data }).expect("submitted");
        session.abandon();
        let mut second = stand.connect();
        let _never = second.submit(0, &Request::Flush).expect("submitted");
        nothing_is_answered(&mut second);
        stand.stop.stop();
    });
}

#[test]
fn a_pause_does_not_wait_for_queues_that_come_and_go() {
    Stand::new().serve(|stand, client| {
        drop(client);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..100 {
                    stand.device.pause().expect("paused");
                    stand.device.resume();
                }
            });
            for round in 0..10 {
                let mut client = stand.connect();
                let batch = submit_batch(&mut client, round);
                for ticket in batch {
                    assert!(client.wait(ticket).expect("answered").status.is_ok());
                }
                client.close().expect("a good end");
            }
        });
    });
}
