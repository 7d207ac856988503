//! The gate between a session and its disk, in this process: a native client, the session, the device and real files.
//! Pauses of the disk, stops of rings while it is paused, and snapshots under load.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::resize::{NewSize, Shrinking};
use disk::{Disk, DiskOptions, NewOverlay, NotNamed, SnapshotError, SnapshotRefusal};
use qcow2::{Geometry, NewImage, Version};
use storage::host::HostStorage;
use strata::device::{BlockSizes, DeviceSnapshotError, DiskDevice};
use strata_kit::client::{Request, Ticket};
use strata_kit::images::{Check, Format};
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

/// As a machine is paused while a snapshot of its disk is taken: the ring stops when what was in it is done, and that is
/// when the snapshot has ended.
#[test]
fn a_ring_with_requests_stops_after_a_snapshot() {
    Stand::new().serve(|stand, client| {
        let (mut session, mut queues) = client.into_parts();
        let data = vec![7; PIECE];
        let mut tickets = Vec::new();
        std::thread::scope(|scope| {
            let (queue, tickets) = (&mut queues[0], &mut tickets);
            let mut session = Some(&mut session);
            let mut stopping = None;
            let during = || {
                for at in 0..8 {
                    let request = Request::Write { offset: at * CLUSTER, data: &data };
                    tickets.push(queue.submit(&request).expect("submitted"));
                }
                assert!(queue.wait_used(Instant::now() + LOOK).is_err(), "an answer during a change");
                let session = session.take().expect("it is named once");
                stopping = Some(scope.spawn(move || session.enable(0, false)));
                // Nothing shows when the worker has noticed that.
                std::thread::sleep(LOOK);
                Ok(())
            };
            take_snapshot_with(stand, 1, during);
            stopping.expect("it was named").join().expect("no panic").expect("it stops");
        });
        // They were done before it stopped.
        for ticket in tickets {
            assert!(queues[0].wait(ticket).expect("answered").status.is_ok());
        }
        session.enable(0, true).expect("it starts again");
        assert!(queues[0].run(&Request::Flush).expect("answered").status.is_ok());
        session.abandon();
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

/// Puts an overlay on top of the device's chain.
fn take_snapshot(stand: &Stand, number: usize) {
    take_snapshot_with(stand, number, || Ok(()));
}

/// As [`take_snapshot`]; calls `during` while the gate is closed.
fn take_snapshot_with(stand: &Stand, number: usize, during: impl FnMut() -> Result<(), NotNamed>) {
    let present = stand.device.disk().expect("it is open").layers()[0].path.clone();
    let path = stand.path(&format!("overlay {number}"));
    let new = NewOverlay { path, backing_file: present.into_os_string().into_encoded_bytes() };
    let taken = stand.device.snapshot(&new, during).expect("a snapshot");
    assert_eq!(taken, Some(()));
}

/// Writes a value to some of the pieces, at once, and waits for all of them.
fn write_some(client: &mut Client, model: &mut [u8], value: u8, places: &[u64]) {
    let data = vec![value; PIECE];
    let submit = |at: &u64| {
        let request = Request::Write { offset: at * CLUSTER, data: &data };
        client.submit((at % 2) as usize, &request).expect("submitted")
    };
    let tickets: Vec<Ticket> = places.iter().map(submit).collect();
    for (ticket, at) in tickets.into_iter().zip(places) {
        assert!(client.wait(ticket).expect("answered").status.is_ok());
        model[(at * CLUSTER) as usize..][..PIECE].fill(value);
    }
}

/// A chain by 200 snapshots, with requests in flight at each. What the guest had at each point is what its layer has, for
/// us and for QEMU's tools.
#[test]
fn two_hundred_snapshots_under_load_keep_every_layer() {
    const SNAPSHOTS: usize = 200;
    const CHECKED: usize = 20;
    let mut kept = Vec::new();
    let (folder, _) = Stand::new().serve(|stand, mut client| {
        let mut model = vec![0; SIZE as usize];
        let mut random = strata_kit::random::Random::new(7);
        for number in 0..SNAPSHOTS {
            let places: Vec<u64> = (0..8).map(|_| random.below(BATCH)).collect();
            write_some(&mut client, &mut model, number as u8, &places);
            // These are unanswered at the snapshot. They rewrite what is there, so that the layer is the same anyway.
            let busy: Vec<Ticket> = (0..BATCH)
                .map(|at| {
                    let data = &model[(at * CLUSTER) as usize..][..PIECE];
                    let request = Request::Write { offset: at * CLUSTER, data };
                    client.submit((at % 2) as usize, &request).expect("submitted")
                })
                .collect();
            let layer = stand.device.disk().expect("it is open").layers()[0].path.clone();
            take_snapshot(stand, number);
            kept.push((layer, model.clone()));
            for ticket in busy {
                assert!(client.wait(ticket).expect("answered").status.is_ok());
            }
            if number % 50 == 49 {
                assert!(
                    client.read_range(0, SIZE as usize).expect("read") == model,
                    "after snapshot {number}"
                );
            }
        }
        let layers = stand.device.disk().expect("it is open").layers().len();
        assert_eq!(layers, SNAPSHOTS + 1);
        kept.push((stand.path(&format!("overlay {}", SNAPSHOTS - 1)), model));
        client.close().expect("a good end");
    });
    let qemu = strata_kit::Qemu::find();
    for (number, (layer, values)) in kept.iter().enumerate() {
        if number % (SNAPSHOTS / CHECKED) != 0 && number != SNAPSHOTS {
            continue;
        }
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let mut rig = Rig::open(layer, &options).expect("a sound chain");
        assert!(rig.read_all() == *values, "layer {number}");
        drop(rig);
        if let Some(qemu) = &qemu {
            assert!(qemu.read_all(layer, Format::Qcow2).expect("QEMU reads it") == *values, "layer {number}");
            assert!(matches!(qemu.check(layer).expect("QEMU checks it"), Check::Clean), "layer {number}");
        }
    }
    drop(folder);
}

#[test]
fn a_snapshot_is_refused_or_fails_without_a_trace() {
    Stand::new().serve(|stand, mut client| {
        let first = submit_batch(&mut client, 1);
        for ticket in first {
            assert!(client.wait(ticket).expect("answered").status.is_ok());
        }
        let image = stand.path("image");
        let new = |path: PathBuf| NewOverlay {
            path,
            backing_file: image.clone().into_os_string().into_encoded_bytes(),
        };
        let not_named = || Err(NotNamed { source: std::io::Error::other("no"), undone: true });
        stand.device.snapshot(&new(image.clone()), || Ok(())).expect_err("the file exists");
        stand.device.snapshot(&new(stand.path("none/x")), || Ok(())).expect_err("there is no such folder");
        stand.device.snapshot(&new(stand.path("x")), not_named).expect_err("it cannot be named");
        assert!(!stand.path("x").exists());
        assert_eq!(stand.device.disk().expect("it is open").layers().len(), 1);
        let second = submit_batch(&mut client, 2);
        for ticket in second {
            assert!(client.wait(ticket).expect("answered").status.is_ok());
        }
        // After a resize it has the new size. The map of a disk that was made smaller is larger than an overlay's.
        let grown = stand.device.resize(NewSize::Of(SIZE + CLUSTER), Shrinking::Refused, || false);
        grown.expect("grown").expect("it is open");
        take_snapshot(stand, 0);
        let shrunk = stand.device.resize(NewSize::Of(SIZE), Shrinking::Accepted, || false);
        shrunk.expect("made smaller").expect("it is open");
        let overlay = stand.path("overlay 0").into_os_string().into_encoded_bytes();
        let late = NewOverlay { path: stand.path("late"), backing_file: overlay };
        let refused = stand.device.snapshot(&late, || Ok(())).expect_err("its map is larger");
        let source = match refused {
            DeviceSnapshotError::Disk(SnapshotError::Refused { source, .. }) => source,
            other => panic!("{other}"),
        };
        assert_eq!(source, SnapshotRefusal::LargerMap);
        assert!(!stand.path("late").exists());
        client.close().expect("a good end");
    });
}

#[test]
fn a_snapshot_of_a_paused_disk_leaves_it_paused() {
    Stand::new().serve(|stand, mut client| {
        for ticket in submit_batch(&mut client, 2) {
            assert!(client.wait(ticket).expect("answered").status.is_ok());
        }
        stand.device.pause().expect("paused");
        take_snapshot_with(stand, 1, || {
            // Queries neither wait nor take the disk for released.
            assert!(stand.device.glance().is_none() && stand.device.is_changing());
            Ok(())
        });
        assert!(stand.device.glance().is_some() && !stand.device.is_changing());
        assert!(stand.device.is_paused());
        stand.device.resume();
        assert!(has(&client.read_range(0, SIZE as usize).expect("read"), 2));
        client.close().expect("a good end");
    });
}
