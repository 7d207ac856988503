//! Tests of the kit on qemu-storage-daemon. If they pass, the client, load generator, model and image wrappers are
//! right. A failure of Strata under the same kit is then a fault of Strata.

use std::path::Path;
use std::time::Duration;

use proptest::test_runner::{Config, TestCaseError, TestRunner};
use strata_kit::client::{Client, Options, RawEvent, Request, Session, Status, Ticket};
use strata_kit::images::{Check, Content, Format, ImageSpec, Preallocation, find_tool};
use strata_kit::load::{self, Limit, Mix, Order, Spec, Verify};
use strata_kit::model::{self, ByteModel, DiscardRule, Geometry, Operation};
use strata_kit::play::{manners, perform};
use strata_kit::storage_daemon::{Export, StorageDaemon};
use strata_kit::{ClientError, Qemu};
use strata_rig::agree::{assert_clean, check_agrees};
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN};

type Failure = Box<dyn std::error::Error>;

/// The tools and the folder of every test. None if a tool is missing, which was then reported.
struct Bench {
    qemu: Qemu,
    daemon: std::path::PathBuf,
    folder: TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
        let (qemu, daemon) = (Qemu::find()?, find_tool("qemu-storage-daemon")?);
        Some(Self { qemu, daemon, folder: TempDir::new().expect("a temporary folder") })
    }

    fn serve(&self, image: &Path, queues: usize) -> Result<StorageDaemon, Failure> {
        // Buffered I/O, so that the tests run on any file system.
        let export = Export { queues, direct: false, ..Export::of(image, Format::Qcow2) };
        Ok(StorageDaemon::start(&self.daemon, &export)?)
    }
}

/// Runs a sequence on a fresh image or chain. Compares the contents during it, and afterwards over the socket and in
/// the file.
fn run_sequence(
    bench: &Bench,
    manner: &Options,
    specs: &[ImageSpec],
    sequence: &[Operation],
) -> Result<(), Failure> {
    let folder = TempDir::new_in(bench.folder.path())?;
    let chain = bench.qemu.create_chain(folder.path(), specs)?;
    let (image, top) =
        (chain.last().ok_or("a chain has a layer")?, specs.last().ok_or("a chain has a layer")?);
    let rule =
        if top.version == 2 && specs.len() > 1 { DiscardRule::Nothing } else { DiscardRule::ZeroesClusters };
    let before = bench.qemu.read_all(image, Format::Qcow2)?;
    let mut model = ByteModel::with_contents(&before, before.len() as u64, top.cluster_size, rule);
    let daemon = bench.serve(image, 1)?;
    let mut client = Client::connect(daemon.socket(), manner)?;
    assert_eq!(client.size(), model.size());
    for operation in sequence {
        perform(&mut client, &mut model, operation)?;
    }
    model.compare_all(&client.read_range(0, before.len())?)?;
    client.close()?;
    daemon.stop()?;
    model.compare_all(&bench.qemu.read_all(image, Format::Qcow2)?)?;
    assert_clean(image, "the closed image");
    Ok(())
}

fn try_sequences(specs: &[ImageSpec], cases: u32) {
    let Some(bench) = Bench::new() else { return };
    let top = specs.last().expect("a chain has a layer");
    let size = specs.iter().rev().find_map(|spec| spec.size).expect("a layer says how large it is");
    let geometry = Geometry { size, cluster_size: top.cluster_size, transfer_max: 1 << 18 };
    let config = Config { cases, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    let manners = manners();
    TestRunner::new(config)
        .run(&(0..manners.len(), model::sequences(geometry, 40)), |(manner, sequence)| {
            run_sequence(&bench, &manners[manner], specs, &sequence)
                .map_err(|failure| TestCaseError::fail(failure.to_string()))
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn a_single_image_equals_the_model() {
    // A size that ends within a cluster.
    try_sequences(&[ImageSpec::qcow2((2 << 20) + 512 * 3)], 10);
}

#[test]
fn small_clusters_equal_the_model() {
    try_sequences(&[ImageSpec::qcow2(300 << 10).cluster_size(512)], 10);
}

#[test]
fn a_chain_equals_the_model() {
    let pattern = |offset, byte| Content::Pattern { offset, length: 200 << 10, byte };
    let base = ImageSpec::raw(2 << 20).with(pattern(0, 0x11)).with(pattern(1 << 20, 0x22));
    let middle = ImageSpec { size: None, ..ImageSpec::qcow2(0) }
        .cluster_size(4096)
        .with(pattern(100 << 10, 0x33))
        .with(Content::Zeroes { offset: 1 << 20, length: 64 << 10, unmap: true });
    let top = ImageSpec { size: None, ..ImageSpec::qcow2(0) }.with(pattern(1500 << 10, 0x44));
    try_sequences(&[base, middle, top], 10);
}

#[test]
fn an_old_image_over_a_backing_file_ignores_discards() {
    let base = ImageSpec::qcow2(1 << 20).with(Content::Pattern { offset: 0, length: 1 << 20, byte: 0x55 });
    let top = ImageSpec { size: None, ..ImageSpec::qcow2(0) }.version(2);
    try_sequences(&[base, top], 10);
}

#[test]
fn requests_in_flight_on_many_queues_come_back_as_they_were() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("disk.qcow2");
    bench.qemu.create(&image, &ImageSpec::qcow2(8 << 20))?;
    let daemon = bench.serve(&image, 4)?;
    let mut client = Client::connect(daemon.socket(), &Options::with_queues(4))?;
    let place = |number: u64| number * 13 * 4096;
    let tickets: Vec<Ticket> = (0..100)
        .map(|number| {
            let data = model::contents(number as u32, place(number), 8192);
            client.submit(number as usize % 4, &Request::Write { offset: place(number), data: &data })
        })
        .collect::<Result<_, _>>()?;
    for ticket in tickets.iter().rev() {
        assert_eq!(client.wait(*ticket)?.status, Status::Ok);
    }
    assert!(
        matches!(client.wait(tickets[0]), Err(ClientError::NoSuchTicket(0))),
        "a ticket is redeemed once"
    );
    // Reads on other queues than the writes, by polling.
    let tickets: Vec<Ticket> = (0..100)
        .map(|number| {
            client.submit(3 - number as usize % 4, &Request::Read { offset: place(number), length: 8192 })
        })
        .collect::<Result<_, _>>()?;
    for (number, ticket) in tickets.into_iter().enumerate() {
        let outcome = client.wait(ticket)?;
        assert_eq!((outcome.status, outcome.used_length), (Status::Ok, 8193));
        assert_eq!(outcome.data, model::contents(number as u32, place(number as u64), 8192));
    }
    assert!(client.get_id()?.starts_with(b"vhost_user_blk"), "the daemon's serial is hard-coded");
    let bases = client.close()?;
    assert_eq!(bases, [51, 50, 50, 50], "each ring ends where the driver left it");
    Ok(daemon.stop()?)
}

#[test]
fn bad_requests_are_answered_and_the_session_goes_on() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("disk.qcow2");
    bench.qemu.create(&image, &ImageSpec::qcow2(1 << 20))?;
    let daemon = bench.serve(&image, 2)?;
    let mut client = Client::connect(daemon.socket(), &Options::with_queues(2))?;
    assert_eq!(client.write(1 << 20, &[1; 512])?, Status::IoError, "past the end");
    assert_eq!(client.read((1 << 20) - 512, &mut [0; 1024])?, Status::IoError, "across the end");
    let unknown = Request::Other { kind: 0x7777, sector: 0, output: &[], input: 512 };
    assert_eq!(client.queue(1).run(&unknown)?.status, Status::Unsupported);
    assert!(matches!(client.write(100, &[1; 512]), Err(ClientError::Misaligned(100))));
    let too_long = client.queue(0).submit(&Request::Read { offset: 0, length: 1 << 30 });
    assert!(matches!(too_long, Err(ClientError::TooLong { .. })));
    assert_eq!(client.write(0, &[7; 512])?, Status::Ok);
    client.abandon();
    // The next session sees the data of the last one. Its driver does not support flushes.
    let options = Options::default().without(&[VIRTIO_BLK_F_FLUSH]);
    let mut client = Client::connect(daemon.socket(), &options)?;
    assert!(!client.session().has(VIRTIO_BLK_F_FLUSH));
    assert_eq!(client.read_range(0, 1024)?, [[7; 512], [0; 512]].concat());
    client.close()?;
    Ok(daemon.stop()?)
}

#[test]
fn a_raw_ring_is_the_ring_the_device_sees() -> Result<(), Failure> {
    use strata_kit::client::{Descriptor, NEXT, WRITE};
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("disk.qcow2");
    let pattern = Content::Pattern { offset: 0, length: 65536, byte: 0x5a };
    bench.qemu.create(&image, &ImageSpec::qcow2(1 << 20).with(pattern))?;
    let daemon = bench.serve(&image, 1)?;
    let mut client = Client::connect(daemon.socket(), &Options::default())?;
    let mut raw = client.queue(0).raw();
    let page = raw.scratch_address();
    raw.write_header(page, VIRTIO_BLK_T_IN, 0);
    // The header and the data are split in two; the status has its own descriptor.
    let chain = [(0, 5, 0), (5, 11, 0), (1024, 100, WRITE), (1500, 412, WRITE), (3000, 1, WRITE)];
    for (index, (at, length, flags)) in chain.into_iter().enumerate() {
        let more = if index + 1 < chain.len() { NEXT } else { 0 };
        let next = index as u16 + 11;
        let descriptor = Descriptor { address: page + at, length, flags: flags | more, next };
        raw.set_descriptor(index as u16 + 10, descriptor);
    }
    raw.write_memory(page + 3000, &[0xff]);
    raw.offer(10)?;
    let RawEvent::Used(used) = raw.wait(Duration::from_secs(30))? else { panic!("nothing was used") };
    assert_eq!((used.id, used.length), (10, 513));
    let mut bytes = [0; 100];
    raw.read_memory(page + 1024, &mut bytes);
    assert_eq!(bytes, [0x5a; 100]);
    raw.read_memory(page + 3000, &mut bytes[..1]);
    assert_eq!(bytes[0], 0);
    assert_eq!(raw.wait(Duration::ZERO)?, RawEvent::Nothing);
    daemon.kill()?;
    assert_eq!(client.queue(0).raw().wait(Duration::from_secs(30))?, RawEvent::Disconnected);
    Ok(())
}

#[test]
fn a_session_runs_step_by_step() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("disk.qcow2");
    bench.qemu.create(&image, &ImageSpec::qcow2(1 << 20))?;
    let daemon = bench.serve(&image, 2)?;
    let mut session = Session::connect(daemon.socket(), &Options::with_queues(2))?;
    assert_eq!(session.config().capacity_sectors, 2048);
    assert_eq!(session.read_config(0, 8)?, 2048_u64.to_le_bytes());
    let mut queues = session.start()?;
    assert_eq!(queues[1].run(&Request::Write { offset: 0, data: &[1; 512] })?.status, Status::Ok);
    assert_eq!(session.stop_ring(1)?, 1);
    session.restart_ring(&queues[1], 1)?;
    assert_eq!(queues[1].run(&Request::Read { offset: 0, length: 512 })?.data, [1; 512]);
    assert_eq!(session.close()?, [0, 2]);
    daemon.stop()?;
    // Three queues are more than two.
    let daemon = bench.serve(&image, 2)?;
    let refused = Client::connect(daemon.socket(), &Options::with_queues(3));
    assert!(matches!(refused.err(), Some(ClientError::TooFew { wanted: 3, offered: 2, .. })));
    Ok(())
}

#[test]
fn every_block_written_at_random_verifies() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("disk.qcow2");
    let size = 16 << 20;
    bench.qemu.create(&image, &ImageSpec::qcow2(size))?;
    let daemon = bench.serve(&image, 2)?;
    let mut client = Client::connect(daemon.socket(), &Options::with_queues(2))?;
    let once = Spec {
        order: Order::RandomOnce,
        mix: Mix::WRITE,
        limit: Limit::Once,
        verify: Verify::Stamped,
        flush_every: 64,
        ..Spec::random_reads(size, Duration::ZERO)
    };
    let report = load::run(client.queues(), &once)?;
    assert_eq!((report.errors, report.bytes), (0, size));
    assert_eq!(report.requests, 4096 + report.flushes);
    assert!(report.flushes >= 60 && report.latency.count() == 4096, "{report}");
    let reads = Spec { order: Order::Sequential, mix: Mix::READ, flush_every: 0, ..once.clone() };
    let report = load::run(client.queues(), &reads)?;
    assert_eq!((report.errors, report.mismatches, report.bytes), (0, 0, size), "{report}");
    // The same blocks do not verify as blocks of another run.
    let other = Spec { seed: 2, ..reads.clone() };
    assert_eq!(load::run(client.queues(), &other)?.mismatches, 4096);
    let everything = Spec {
        order: Order::Random,
        mix: Mix { read: 5, write: 5, discard: 1, write_zeroes: 1, write_zeroes_unmap: 1 },
        limit: Limit::Requests(5000),
        verify: Verify::StampedOrZero,
        ..once
    };
    let report = load::run(client.queues(), &everything)?;
    assert_eq!(
        (report.errors, report.mismatches, report.requests - report.flushes),
        (0, 0, 5000),
        "{report}"
    );
    client.close()?;
    daemon.stop()?;
    assert_clean(&image, "after the load");
    Ok(())
}

#[test]
fn the_image_tools_say_what_they_made() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let folder = bench.folder.path();
    let base = ImageSpec::qcow2(1 << 20)
        .version(2)
        .cluster_size(4096)
        .with(Content::Pattern { offset: 0, length: 8192, byte: 9 })
        .with(Content::Compressed { offset: 8192, length: 4096, byte: 8 });
    let top = ImageSpec { size: Some(2 << 20), ..ImageSpec::qcow2(0) }
        .with(Content::Zeroes { offset: 65536, length: 65536, unmap: false })
        .with(Content::Discard { offset: 65536, length: 65536 });
    let chain = bench.qemu.create_chain(folder, &[base, top])?;
    let info = bench.qemu.info(&chain[0], Format::Qcow2)?;
    assert_eq!((info["cluster-size"].as_u64(), info["virtual-size"].as_u64()), (Some(4096), Some(1 << 20)));
    let data = bench.qemu.read_all(&chain[1], Format::Qcow2)?;
    assert_eq!((data.len(), data[0], data[8192], data[12288]), (2 << 20, 9, 8, 0));
    let map = bench.qemu.map(&chain[1], Format::Qcow2)?;
    assert_eq!((map[0].start, map[0].length, map[0].depth, map[0].data), (0, 8192, 1, true));
    assert!(map[0].offset.is_some());
    assert_clean(&chain[1], "the overlay");
    // A disk with all metadata preallocated passes the check; one with a damaged refcount does not.
    let full = folder.join("full.qcow2");
    bench.qemu.create(&full, &ImageSpec::qcow2(1 << 20).preallocation(Preallocation::Metadata))?;
    assert_eq!(bench.qemu.check(&full)?, Check::Clean);
    assert_clean(&full, "all allocated");
    let mut bytes = std::fs::read(&full)?;
    // The refcount table is the second cluster, and its first block the third. Cluster 4 holds the first L2 table or
    // data, so a refcount of 0 for it is corruption. A refcount of 1 for a cluster past all others is a leak.
    let leaked = bytes.len() / 65536;
    bytes[2 * 65536 + 2 * leaked + 1] = 1;
    bytes.resize((leaked + 1) * 65536, 0);
    std::fs::write(&full, &bytes)?;
    assert_eq!(bench.qemu.check(&full)?, Check::Leaks(1));
    check_agrees(&full, "a leak");
    bytes[2 * 65536 + 2 * 4 + 1] = 0;
    std::fs::write(&full, &bytes)?;
    assert!(matches!(bench.qemu.check(&full)?, Check::Corrupt(_)));
    check_agrees(&full, "damaged");
    Ok(())
}

/// The throughput of client and daemon together. It is only printed, because it depends on the machine. The image is in
/// memory if the host has /dev/shm. STRATA_LOAD_SECONDS=3 makes it longer.
#[test]
fn a_short_load_reports_its_figures() -> Result<(), Failure> {
    use std::io::Write as _;
    let Some(bench) = Bench::new() else { return Ok(()) };
    let seconds = std::env::var("STRATA_LOAD_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0.3);
    let memory = TempDir::new_in("/dev/shm");
    let folder = memory.as_ref().unwrap_or(&bench.folder);
    let image = folder.path().join("disk.qcow2");
    let size = 64 << 20;
    bench.qemu.create(
        &image,
        &ImageSpec::qcow2(size).with(Content::Pattern { offset: 0, length: size, byte: 1 }),
    )?;
    // Not every file system supports O_DIRECT.
    let direct = Export { queues: 2, ..Export::of(&image, Format::Qcow2) };
    let (daemon, how) = match StorageDaemon::start(&bench.daemon, &direct) {
        Ok(daemon) => (daemon, "direct"),
        Err(_) => (bench.serve(&image, 2)?, "buffered"),
    };
    for (name, queues, mix) in [("reads", 1, Mix::READ), ("reads", 2, Mix::READ), ("writes", 1, Mix::WRITE)] {
        let mut client = Client::connect(daemon.socket(), &Options::with_queues(queues))?;
        let spec = Spec { mix, ..Spec::random_reads(size, Duration::from_secs_f64(seconds)) };
        let report = load::run(client.queues(), &spec)?;
        assert_eq!((report.errors, report.requests * 4096), (0, report.bytes));
        assert_eq!(report.latency.count(), report.requests);
        let queues = format!("{queues} queue{}", if queues == 1 { "" } else { "s" });
        writeln!(std::io::stderr(), "qemu-storage-daemon, {how}, {queues}, 4 KiB random {name}: {report}")?;
        client.close()?;
    }
    Ok(daemon.stop()?)
}
