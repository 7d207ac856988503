//! `strata serve` as a process, through its socket. Random sequences equal the model, and images stay clean. A new
//! session follows an old one, and flushed data survives a kill.

use std::path::{Path, PathBuf};

use proptest::test_runner::{Config, TestCaseError, TestRunner};
use strata_integration::daemon::{Backend, Daemon, Profile, Program, ServeSpec};
use strata_integration::image::{self, Health};
use strata_kit::Qemu;
use strata_kit::client::{Client, Options};
use strata_kit::images::{Content, Format, ImageSpec};
use strata_kit::model::{self, ByteModel, DiscardRule, Geometry, Operation};
use strata_kit::play::{manners, perform};
use tempfile::TempDir;

type Failure = Box<dyn std::error::Error>;

struct Bench {
    qemu: Qemu,
    program: Program,
    folder: TempDir,
}

impl Bench {
    /// `None` if QEMU's tools are missing; a message about it has been printed.
    fn new() -> Option<Self> {
        let qemu = Qemu::find()?;
        let program = Backend::Strata.program(Profile::Dev).expect("strata is built");
        Some(Self { qemu, program, folder: TempDir::new().expect("a folder") })
    }

    fn serve(&self, image: &Path, queues: u16) -> Result<(Daemon, PathBuf), Failure> {
        let folder = image.parent().expect("an image is in a folder");
        let socket = folder.join("disk.sock");
        let spec = ServeSpec {
            image: image.to_owned(),
            format: "qcow2".into(),
            socket: socket.clone(),
            queues,
            serial: "socket-test".into(),
            io_thread: false,
        };
        Ok((Daemon::start(&self.program, &spec, &folder.join("daemon.log"))?, socket))
    }
}

fn rule(specs: &[ImageSpec]) -> DiscardRule {
    let old = specs.last().is_some_and(|top| top.version == 2);
    if old && specs.len() > 1 { DiscardRule::Nothing } else { DiscardRule::ZeroesClusters }
}

/// Runs a sequence on a new chain: half of it, a new session, the other half. Then the daemon stops and QEMU's tools
/// check the image.
fn run_sequence(
    bench: &Bench,
    manner: &Options,
    specs: &[ImageSpec],
    sequence: &[Operation],
) -> Result<(), Failure> {
    let folder = TempDir::new_in(bench.folder.path())?;
    let chain = bench.qemu.create_chain(folder.path(), specs)?;
    let image = chain.last().ok_or("a chain has a layer")?;
    let cluster_size = specs.last().ok_or("a chain has a layer")?.cluster_size;
    let before = bench.qemu.read_all(image, Format::Qcow2)?;
    let mut model = ByteModel::with_contents(&before, before.len() as u64, cluster_size, rule(specs));
    let (daemon, socket) = bench.serve(image, 2)?;
    let (first, second) = sequence.split_at(sequence.len() / 2);
    for (part, orderly) in [(first, false), (second, true)] {
        let mut client = Client::connect(&socket, manner)?;
        assert_eq!(client.size(), model.size());
        for operation in part {
            perform(&mut client, &mut model, operation)?;
        }
        model.compare_all(&client.read_range(0, before.len())?)?;
        if orderly {
            client.close()?;
        } else {
            client.abandon();
        }
    }
    daemon.stop()?;
    model.compare_all(&bench.qemu.read_all(image, Format::Qcow2)?)?;
    Ok(image::expect_clean(image)?)
}

fn try_sequences(specs: &[ImageSpec]) {
    let Some(bench) = Bench::new() else { return };
    let top = specs.last().expect("a chain has at least one layer");
    let size = top.size.expect("the top layer has a size");
    let geometry = Geometry { size, cluster_size: top.cluster_size, transfer_max: 1 << 18 };
    let config = Config { cases: 8, max_shrink_iters: 100, failure_persistence: None, ..Config::default() };
    let manners = manners();
    TestRunner::new(config)
        .run(&(0..manners.len(), model::sequences(geometry, 50)), |(manner, sequence)| {
            run_sequence(&bench, &manners[manner], specs, &sequence)
                .map_err(|failure| TestCaseError::fail(failure.to_string()))
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

fn pattern(offset: u64, length: u64, byte: u8) -> Content {
    Content::Pattern { offset, length, byte }
}

#[test]
fn a_single_image_equals_the_model() {
    try_sequences(&[ImageSpec::qcow2((2 << 20) + 512 * 3)]);
}

#[test]
fn small_clusters_equal_the_model() {
    try_sequences(&[ImageSpec::qcow2(300 << 10).cluster_size(512)]);
}

#[test]
fn a_chain_of_three_equals_the_model() {
    let base =
        ImageSpec::raw(2 << 20).with(pattern(0, 200 << 10, 0x11)).with(pattern(1 << 20, 200 << 10, 0x22));
    let middle = ImageSpec::qcow2(2 << 20)
        .cluster_size(4096)
        .with(pattern(100 << 10, 200 << 10, 0x33))
        .with(Content::Zeroes { offset: 1 << 20, length: 64 << 10, unmap: true });
    let top = ImageSpec::qcow2(3 << 20).with(pattern(1500 << 10, 200 << 10, 0x44));
    try_sequences(&[base, middle, top]);
}

#[test]
fn an_old_image_over_a_backing_file_equals_the_model() {
    let base = ImageSpec::qcow2(1 << 20).with(pattern(0, 1 << 20, 0x55));
    try_sequences(&[base, ImageSpec::qcow2(1 << 20).version(2)]);
}

#[test]
fn flushed_data_survives_a_kill() -> Result<(), Failure> {
    let Some(bench) = Bench::new() else { return Ok(()) };
    let image = bench.folder.path().join("killed.qcow2");
    bench.qemu.create(&image, &ImageSpec::qcow2(64 << 20))?;
    let mut model = ByteModel::new(64 << 20, 65536, DiscardRule::ZeroesClusters);
    for round in 0..5_u32 {
        let (daemon, socket) = bench.serve(&image, 1)?;
        let mut client = Client::connect(&socket, &Options::default())?;
        for number in 0..40_u64 {
            let offset = (number * 1_500_000 + u64::from(round) * 70_000) / 512 * 512;
            let operation = match number % 8 {
                5 => Operation::Discard { offset: offset / 65536 * 65536, length: 131_072 },
                6 => Operation::WriteZeroes { offset, length: 100 * 512, unmap: round % 2 == 0 },
                _ => Operation::Write { offset, length: 12_288, seed: round * 100 + number as u32 },
            };
            perform(&mut client, &mut model, &operation)?;
        }
        perform(&mut client, &mut model, &Operation::Flush)?;
        // These writes were not flushed and may be lost, so reads of them are not compared.
        let scratch = 63 << 20;
        client.write(scratch, &vec![round as u8 + 1; 65536])?;
        daemon.kill()?;
        client.abandon();
        if let Health::Broken(text) = image::check(&image)? {
            return Err(text.into());
        }
        let found = bench.qemu.read_all(&image, Format::Qcow2)?;
        model.compare(0, &found[..scratch as usize])?;
    }
    Ok(())
}
