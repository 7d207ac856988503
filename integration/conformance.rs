//! The protocol in two implementations: Strata and the stock rust-vmm backend, each on its own raw file, give the same
//! answers to the same client.
//!
//! Where they differ, either the client depends on behaviour of Strata alone, or Strata breaks the protocol.

use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use strata_integration::daemon::{Backend, Daemon, Profile, Program, ServeSpec};
use strata_integration::stock;
use strata_kit::client::{Client, Options, Request, Status};
use strata_kit::model::{ByteModel, DiscardRule, Operation};
use strata_kit::play::{manners, perform};
use tempfile::TempDir;

type Failure = Box<dyn std::error::Error>;

/// Bytes of each file: neither a power of two nor a multiple of a page.
const SIZE: u64 = (2 << 20) + 512 * 3;
/// How long the stock backend may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// The operations that both devices support: no discard and no write zeroes.
fn operations() -> Vec<Operation> {
    let mut operations = Vec::new();
    for number in 0..60_u64 {
        let (offset, length) = (number * 70_656 % (SIZE - 65_536) / 512 * 512, (1 + number * 7 % 128) * 512);
        operations.push(match number % 3 {
            0 => Operation::Write { offset, length, seed: number as u32 },
            1 => Operation::Read { offset: offset.saturating_sub(70_656) / 512 * 512, length },
            _ => Operation::Flush,
        });
    }
    operations.push(Operation::Write { offset: SIZE - 1024, length: 1024, seed: 99 });
    operations.push(Operation::Read { offset: SIZE - 1024, length: 1024 });
    operations
}

/// A device's answers to one frontend: the statuses of valid and invalid requests, and the disk's contents afterwards.
fn answers(socket: &Path, manner: &Options) -> Result<(Vec<Status>, Vec<u8>), Failure> {
    let mut client = Client::connect(socket, manner)?;
    assert_eq!(client.size(), SIZE);
    let mut model = ByteModel::new(SIZE, 65_536, DiscardRule::ZeroesClusters);
    for operation in operations() {
        perform(&mut client, &mut model, &operation)?;
    }
    let mut statuses = Vec::new();
    let mut data = vec![0; 4096];
    for offset in [SIZE, SIZE - 512, u64::MAX / 512 * 512] {
        statuses.push(client.read(offset, &mut data)?);
        statuses.push(client.write(offset, &data)?);
    }
    let ticket = client.submit(0, &Request::Other { kind: 77, sector: 0, output: &[], input: 0 })?;
    statuses.push(client.wait(ticket)?.status);
    let contents = client.read_range(0, usize::try_from(SIZE)?)?;
    model.compare_all(&contents)?;
    client.close()?;
    Ok((statuses, contents))
}

fn raw_file(folder: &TempDir, name: &str) -> Result<PathBuf, Failure> {
    let path = folder.path().join(name);
    std::fs::File::create(&path)?.set_len(SIZE)?;
    Ok(path)
}

/// Serves one session of the stock backend on a thread.
fn start_stock(socket: &Path, image: &Path) -> Result<JoinHandle<anyhow::Result<()>>, Failure> {
    let (path, image) = (socket.to_owned(), image.to_owned());
    let server = thread::spawn(move || stock::serve(&path, &image, 1));
    let deadline = Instant::now() + START_TIMEOUT;
    while !socket.exists() {
        if Instant::now() > deadline || server.is_finished() {
            return Err("the stock backend does not listen".into());
        }
        thread::yield_now();
    }
    Ok(server)
}

fn start_strata(folder: &TempDir, program: &Program, image: &Path) -> Result<(Daemon, PathBuf), Failure> {
    let socket = folder.path().join("strata.sock");
    let spec = ServeSpec {
        image: image.to_owned(),
        format: "raw".into(),
        socket: socket.clone(),
        queues: 1,
        serial: "conformance".into(),
        io_thread: false,
    };
    Ok((Daemon::start(program, &spec, &folder.path().join("strata.log"))?, socket))
}

#[test]
fn strata_and_the_stock_backend_give_the_same_answers() -> Result<(), Failure> {
    let program = Backend::Strata.program(Profile::Dev)?;
    for (number, manner) in manners().iter().enumerate() {
        let folder = TempDir::new()?;
        let (daemon, strata) = start_strata(&folder, &program, &raw_file(&folder, "strata.raw")?)?;
        let ours = answers(&strata, manner)?;
        daemon.stop()?;
        let socket = folder.path().join("stock.sock");
        let server = start_stock(&socket, &raw_file(&folder, "stock.raw")?)?;
        let theirs = answers(&socket, manner)?;
        server.join().map_err(|_| "the stock backend panicked")??;
        assert_eq!(ours.0, theirs.0, "statuses in manner {number}");
        assert!(ours.1 == theirs.1, "contents in manner {number}");
    }
    Ok(())
}
