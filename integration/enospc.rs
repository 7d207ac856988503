//! `strata serve --on-enospc wait` as a process on a host without space, by a limit on file sizes that is set and
//! removed. Requests wait for space; stopping a ring, disconnecting a frontend and SIGTERM do not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use strata_integration::daemon::{Backend, Daemon, Profile, ServeSpec};
use strata_integration::image;
use strata_kit::Qemu;
use strata_kit::client::{Client, Options, Queue, Request, Session, Status, Ticket};
use strata_kit::images::{Format, ImageSpec};
use tempfile::TempDir;

type Failure = Box<dyn std::error::Error>;

const CLUSTER: u64 = 64 << 10;
const SECTOR: usize = strata_kit::client::SECTOR as usize;
/// Bytes of the disk.
const SIZE: u64 = 16 << 20;
/// The file size at which there is no space: past the image's metadata, and less than a batch needs.
const LIMIT: u64 = 1 << 20;
/// Clusters written in a batch.
const BATCH: u64 = 32;
/// Timeout until the daemon reports that there is no space.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon with its guest.
struct Scene {
    daemon: Daemon,
    socket: PathBuf,
    session: Session,
    queues: Vec<Queue>,
    /// The values that each cluster's sectors may hold.
    allowed: BTreeMap<u64, Vec<u8>>,
    /// The first cluster not yet written.
    next: u64,
}

fn connect(socket: &Path) -> Result<(Session, Vec<Queue>), Failure> {
    let options = Options { data_capacity: CLUSTER as usize, slots_max: 64, ..Options::with_queues(2) };
    Ok(Client::connect(socket, &options)?.into_parts())
}

impl Scene {
    fn open(folder: &Path, image: &Path) -> Result<Self, Failure> {
        let socket = folder.join("disk.sock");
        let spec = ServeSpec {
            image: image.to_owned(),
            format: "qcow2".into(),
            socket: socket.clone(),
            queues: 2,
            serial: "no-space".into(),
            io_thread: false,
        };
        let program = Backend::Strata.program(Profile::Dev)?;
        let wait = ["--on-enospc", "wait"];
        let daemon = Daemon::start_with(&program, &spec, &wait, &folder.join("daemon.log"))?;
        let (session, queues) = connect(&socket)?;
        Ok(Scene { daemon, socket, session, queues, allowed: BTreeMap::new(), next: 0 })
    }

    /// Writes new clusters on queue 0, followed by a read: once the read has completed, the daemon has taken all writes
    /// from the ring.
    fn send_batch(&mut self, byte: u8) -> Result<Vec<(u64, Ticket)>, Failure> {
        let data = vec![byte; CLUSTER as usize];
        let mut sent = Vec::new();
        for cluster in self.next..self.next + BATCH {
            let request = Request::Write { offset: cluster * CLUSTER, data: &data };
            sent.push((cluster, self.queues[0].submit(&request)?));
            self.allowed.insert(cluster, vec![0, byte]);
        }
        self.next += BATCH;
        self.read(0)?;
        Ok(sent)
    }

    /// A read, which needs no space.
    fn read(&mut self, queue: usize) -> Result<(), Failure> {
        let outcome = self.queues[queue].run(&Request::Read { offset: 0, length: SECTOR })?;
        assert_eq!(outcome.status, Status::Ok);
        Ok(())
    }

    /// The statuses of a batch.
    fn settle(&mut self, sent: Vec<(u64, Ticket)>, byte: u8) -> Result<Vec<Status>, Failure> {
        let mut statuses = Vec::new();
        for (cluster, ticket) in sent {
            let status = self.queues[0].wait(ticket)?.status;
            if status == Status::Ok {
                self.allowed.insert(cluster, vec![byte]);
            }
            statuses.push(status);
        }
        Ok(statuses)
    }

    /// Disconnects without notice and connects again.
    fn reconnect(self) -> Result<Self, Failure> {
        self.session.abandon();
        drop(self.queues);
        let (session, queues) = connect(&self.socket)?;
        Ok(Scene { session, queues, ..self })
    }
}

/// Checks that every sector holds one of the values that it may.
fn compare(allowed: &BTreeMap<u64, Vec<u8>>, found: &[u8]) {
    for (cluster, bytes) in (0..).zip(found.chunks(CLUSTER as usize)) {
        let allowed = allowed.get(&cluster).map_or(&[0][..], Vec::as_slice);
        for sector in bytes.chunks(SECTOR) {
            let same = sector.iter().all(|byte| *byte == sector[0]);
            assert!(same && allowed.contains(&sector[0]), "cluster {cluster}: {:?}", &sector[..16]);
        }
    }
}

#[test]
fn requests_wait_for_space_until_the_ring_or_the_daemon_stops() -> Result<(), Failure> {
    let Some(qemu) = Qemu::find() else { return Ok(()) };
    let folder = TempDir::new()?;
    let image = folder.path().join("disk.qcow2");
    qemu.create(&image, &ImageSpec::qcow2(SIZE))?;
    let mut scene = Scene::open(folder.path(), &image)?;

    // The space returns: the waiting requests succeed.
    scene.daemon.limit_file_sizes(Some(LIMIT))?;
    let sent = scene.send_batch(1)?;
    let began = Instant::now();
    while !scene.daemon.log_tail().contains("the host has no space") {
        assert!(began.elapsed() < PATIENCE, "{}", scene.daemon.log_tail());
        scene.read(1)?;
    }
    scene.daemon.limit_file_sizes(None)?;
    assert_eq!(scene.settle(sent, 1)?, [Status::Ok; BATCH as usize]);
    assert_eq!(scene.queues[0].run(&Request::Flush)?.status, Status::Ok);

    // Without space, stopping the ring completes the waiting requests; the ring continues after them.
    scene.daemon.limit_file_sizes(Some(LIMIT))?;
    let sent = scene.send_batch(2)?;
    let base = scene.session.stop_ring(0)?;
    assert_eq!(u64::from(base), 2 * (BATCH + 1) + 1);
    assert_eq!(scene.settle(sent, 2)?, [Status::IoError; BATCH as usize]);
    scene.session.restart_ring(&scene.queues[0], base)?;

    // The frontend disconnects, and another connects.
    scene.send_batch(3)?;
    let mut scene = scene.reconnect()?;
    scene.read(0)?;

    // SIGTERM stops the daemon while requests wait.
    scene.send_batch(4)?;
    let Scene { daemon, session, queues, allowed, .. } = scene;
    daemon.stop()?;
    drop((session, queues));
    image::expect_clean(&image)?;
    compare(&allowed, &qemu.read_all(&image, Format::Qcow2)?);
    Ok(())
}
