//! `strata serve`: opens the disk, listens, serves until it is stopped or replaced, and closes everything in the right
//! order.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use disk::check::Sharing;
use disk::{Disk, DiskOptions, OpenError, SpaceStatus};
use names::{one_line, shown};
use qcow2::SECTOR;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use storage::host::{HostStorage, Owner};
use storage::{Storage as _, StorageError};
use tracing::{debug, info, warn};
use vhost_blk::{Metrics, Pulse, ServeOptions, Server, Sockets, Stage, StopHandle};

use crate::cli::{Cache, Serial, ServeArgs};
use crate::control_door::ControlDoor;
use crate::device::{BlockSizes, DiskDevice, DiskFacts, host_block};
use crate::error::{ProgramError, Purpose, with_causes};
use crate::handover::{Offer, Predecessor, Successor, Terms};
use crate::held::Reopening;
use crate::listen::Place;
use crate::notify;
use crate::resizer::Resizer;
use crate::shutdown::Shutdown;
use crate::size;
use crate::steering::{Stages, Steering};
use crate::top_pointer;
use crate::watchdog::Watchdog;

/// How long to wait for the image's lock: the previous user may be a daemon that is being restarted.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

type HostDevice = DiskDevice<HostStorage>;

/// How a round of serving begins.
enum Entry {
    /// On a socket of its own.
    New,
    /// On the socket that a successor has not taken.
    Kept(Server),
    /// In the place of another daemon, on its sockets if it has passed them.
    Taken(Predecessor, Option<Sockets>),
}

/// How a round of serving ended, the image being closed.
enum Ended {
    Stopped,
    /// A successor waits for the socket.
    Asked(Server, Successor),
}

/// Runs the command.
///
/// # Errors
/// When the disk cannot be opened, the socket cannot be used, or the image cannot be closed cleanly.
pub fn run(options: &ServeArgs) -> Result<(), ProgramError> {
    let image = options.image().expect("clap wants an image where there is something to serve");
    raise_file_limit();
    let place = Place::choose(options)?;
    let mut control = ControlDoor::choose(&options.control)?;
    let mut stop = new_stop()?;
    let shutdown = Shutdown::start(stop.clone())?;
    let mut entry = enter(&place, image, options)?;
    loop {
        match serve_round(&place, image, options, (&shutdown, &stop), entry, &mut control)? {
            Ended::Stopped => break,
            Ended::Asked(server, successor) => match give(server, &successor)? {
                None => break,
                Some(server) => {
                    warn!("the new daemon has ended before it served");
                    stop = new_stop()?;
                    if !shutdown.resume(stop.clone()) {
                        break;
                    }
                    entry = Entry::Kept(server);
                }
            },
        }
    }
    shutdown.done();
    Ok(())
}

fn new_stop() -> Result<StopHandle, ProgramError> {
    StopHandle::new().map_err(|source| ProgramError::Host { step: "making an eventfd", source })
}

/// Finds the daemon to be replaced, if one is. Its disk is taken from it only if it can probably be served.
fn enter(place: &Place, image: &Path, options: &ServeArgs) -> Result<Entry, ProgramError> {
    let Place::File { path, .. } = place else { return Ok(Entry::New) };
    if !options.replace {
        return Ok(Entry::New);
    }
    let failed = |step| move |source| ProgramError::Replace { path: path.clone(), step, source };
    examine(image, options)?;
    let terms = terms(image, options).map_err(failed("looking at the image"))?;
    let Some(predecessor) = Predecessor::ask(path, terms).map_err(failed("asking it to stop"))? else {
        info!("no daemon serves on {place} that could be replaced");
        return Ok(Entry::New);
    };
    let sockets = predecessor.take().map_err(failed("waiting until it has stopped"))?;
    Ok(Entry::Taken(predecessor, sockets))
}

/// What the guest may rely on.
fn terms(image: &Path, options: &ServeArgs) -> std::io::Result<Terms> {
    let file = std::fs::metadata(image)?;
    Ok(Terms {
        device: file.dev(),
        inode: file.ino(),
        queues: options.num_queues,
        queue_size: options.queue_size,
        block: options.logical_block_size,
        read_only: options.read_only || options.snapshot.is_some(),
    })
}

/// Passes the socket to a successor. Returns the server if the successor has ended instead of serving.
fn give(server: Server, successor: &Successor) -> Result<Option<Server>, ProgramError> {
    let failed = |step| move |source| ProgramError::Host { step, source };
    let sockets = server.sockets().map_err(failed("copying the listening socket"))?;
    let served = match &sockets {
        Some(sockets) => successor.give(sockets),
        None => Ok(false),
    };
    match served {
        Ok(false) => Ok(Some(server)),
        Ok(true) => {
            info!("the new daemon serves");
            server.leave();
            Ok(None)
        }
        Err(source) => {
            // It may be about to open the image.
            server.leave();
            Err(failed("waiting until the new daemon serves")(source))
        }
    }
}

/// Opens the disk, serves it until it is stopped or asked for, and closes it.
fn serve_round(
    place: &Place,
    image: &Path,
    options: &ServeArgs,
    (shutdown, stop): (&Shutdown, &StopHandle),
    entry: Entry,
    control: &mut Option<ControlDoor>,
) -> Result<Ended, ProgramError> {
    let stages = Arc::new(Stages::default());
    let tells = Arc::clone(&stages);
    let tell = move |stage| {
        notify::send(&notify::status(stage));
        tells.tell(stage);
    };
    let offer = ServeOptions {
        poll_max: Duration::from_micros(options.poll_max),
        pulse: Arc::new(Pulse::new(options.num_queues, tell)),
        ..ServeOptions::new(options.num_queues, options.queue_size)
    };
    let device = match open(place, image, options, stop) {
        Ok(device) => Arc::new(device),
        Err(error) if stop.is_stopped() => {
            // The wait for the image's lock was given up.
            info!(%error, "stopped before the image was open again");
            return Ok(Ended::Stopped);
        }
        Err(error) => return Err(error),
    };
    let watch = device.watch();
    let totals = {
        // Dropped before the device is closed (`Shutdown::closing`): closing needs the last reference to the device.
        let (device, metrics) = (Arc::clone(&device), Arc::clone(&offer.metrics));
        move || {
            let image_bytes = device.glance().and_then(|disk| disk.allocated(0).ok()).unwrap_or(0);
            tell_totals(&metrics, device.watch().space_status(), map_bytes(&device), image_bytes);
        }
    };
    let resizer = Resizer::start(
        Arc::clone(&device),
        Arc::clone(&offer.back_channel),
        options.size_file.clone(),
        stop.clone(),
    )?;
    shutdown.serving(watch.clone(), totals, resizer.asker());
    let subject = || Steering {
        image: image.to_owned(),
        device: Arc::clone(&device),
        num_queues: options.num_queues,
        metrics: Arc::clone(&offer.metrics),
        stages: Arc::clone(&stages),
        back_channel: Arc::clone(&offer.back_channel),
        shutdown: shutdown.clone(),
        top_pointer: options.top_pointer,
        ending: AtomicBool::new(false),
    };
    let controlled = control.as_mut().map(|door| door.open(subject(), stages.hub())).transpose();
    let controlled = match controlled {
        // The guest is waiting for its disk, which is worth more than the socket.
        Err(error) if matches!(entry, Entry::Kept(_)) => {
            warn!("serving again without a control socket: {}", one_line(&with_causes(&error)));
            Ok(None)
        }
        other => other,
    };
    let served = controlled.and_then(|controlled| {
        let terms = terms(image, options);
        let served = serve(place, image, &device, &offer, (shutdown, stop), (entry, terms));
        // The socket answers until the last session has ended, and has no reference to the device afterwards.
        drop(controlled);
        served
    });
    shutdown.closing();
    drop(resizer);
    let map_bytes = map_bytes(&device);
    let closed = close(image, device);
    let ended = served?;
    closed?;
    // st_blocks counts 512 bytes, whatever the file system's blocks are.
    let image_bytes = std::fs::metadata(image).map_or(0, |metadata| metadata.blocks().saturating_mul(512));
    tell_totals(&offer.metrics, watch.space_status(), map_bytes, image_bytes);
    Ok(ended)
}

/// How the disk is opened.
fn disk_options(options: &ServeArgs) -> DiskOptions {
    DiskOptions {
        format: options.chain.format.into(),
        backing_format: options.chain.backing_format.map(Into::into),
        data_file: options.data.data_file.clone(),
        backing_data_files: options.data.backing_data_file.clone(),
        read_only: options.read_only,
        snapshot: options.snapshot.clone(),
        direct: options.chain.cache == Cache::Direct,
        backing_direct: options.backing_cache == Cache::Direct,
        // At most 64 GiB: the command line checks it.
        map_bytes: usize::try_from(options.map_cache_size.0).unwrap_or(usize::MAX),
        on_enospc: options.on_enospc.into(),
        detect_zeroes: options.detect_zeroes.into(),
        discards: options.discard.into(),
        discard_no_unref: options.discard_no_unref,
        lock_timeout: options.lock.timeout(LOCK_PATIENCE),
        ..DiskOptions::default()
    }
}

fn open(
    place: &Place,
    image: &Path,
    options: &ServeArgs,
    stop: &StopHandle,
) -> Result<HostDevice, ProgramError> {
    let purpose =
        if options.read_only || options.snapshot.is_some() { Purpose::ServeReadOnly } else { Purpose::Serve };
    let failed = |source| ProgramError::Open { image: image.to_owned(), purpose, source };
    let owner = place.owner();
    let storage = storage_of(options, owner, stop).map_err(ProgramError::ChainRoot)?;
    let (top, how) = top_of(image, options).map_err(|error| failed(error.into()))?;
    let serial = options.serial.unwrap_or_else(|| Serial::of_image(image)).0;
    let blocks = BlockSizes { logical: options.logical_block_size, physical: options.physical_block_size };
    let device = if options.incoming {
        let facts = facts_of_another(&storage, &top, &how).map_err(failed)?;
        DiskDevice::released(facts, serial, blocks, reopening(options, (owner, stop), image))
    } else {
        let disk = Disk::open(storage, &top, &how).map_err(failed)?;
        let reopening = (purpose == Purpose::Serve).then(|| reopening(options, (owner, stop), image));
        DiskDevice::releasable(disk, serial, blocks, reopening)
    };
    let (size, block) = (device.facts().size, options.logical_block_size);
    if !size.is_multiple_of(block.into()) {
        return Err(ProgramError::BlockSize { image: image.to_owned(), size, block });
    }
    Ok(device)
}

/// The image to open for the one that the command line names, and how: another one since a snapshot.
fn top_of(image: &Path, options: &ServeArgs) -> Result<(PathBuf, DiskOptions), StorageError> {
    let looking = options.lock.storage().confined(&options.chain.chain_root)?;
    top_pointer::follow(image, options.top_pointer, &disk_options(options), &looking)
}

/// A storage that has no file open yet. A stop ends its waits for locks.
fn storage_of(
    options: &ServeArgs,
    owner: Option<Owner>,
    stop: &StopHandle,
) -> Result<HostStorage, StorageError> {
    let stop = stop.clone();
    let storage = options.lock.storage().by(options.aio.into()).confined(&options.chain.chain_root)?;
    let storage = storage.giving_up(move || stop.is_stopped());
    Ok(match owner {
        Some(owner) => storage.owned_by(owner),
        None => storage,
    })
}

/// How the image is opened after it was released: by a storage of its own, as a storage closes its files at its end.
fn reopening(
    options: &ServeArgs,
    (owner, stop): (Option<Owner>, &StopHandle),
    image: &Path,
) -> Reopening<HostStorage> {
    let (options, image, stop) = (options.clone(), image.to_owned(), stop.clone());
    let patience = disk_options(&options).lock_timeout;
    let open = move |lock_timeout| {
        // Another daemon may have made a snapshot meanwhile.
        let (top, how) = top_of(&image, &options)?;
        Disk::open(storage_of(&options, owner, &stop)?, &top, &DiskOptions { lock_timeout, ..how })
    };
    Reopening::new(Box::new(open), patience)
}

/// What the guest sees of an image that another process may be writing to: what cannot change while it is served.
fn facts_of_another(storage: &HostStorage, image: &Path, how: &DiskOptions) -> Result<DiskFacts, OpenError> {
    let how = DiskOptions { read_only: true, ..how.clone() };
    let layers = disk::describe(storage, image, &how, Sharing::All, false)?;
    let layer = &layers[0].layer;
    let granule = layer.header.as_ref().map(|header| header.geometry().granule_size());
    let data = how.data_file.as_deref().unwrap_or(image);
    let (_, file) = storage.open_shared(data, how.direct)?;
    // A partial last sector is not served. Whether zeros are data shows when the image is open, before the first request.
    let size = layer.size / SECTOR * SECTOR;
    Ok(DiskFacts { size, granule, host_block: host_block(&file), read_only: false, zeros_are_data: true })
}

fn map_bytes(device: &HostDevice) -> usize {
    device.glance().map_or(0, |disk| disk.status().map_bytes)
}

/// Serves until it is stopped or asked for. The socket file is gone on return, unless a successor is to have it.
fn serve(
    place: &Place,
    image: &Path,
    device: &Arc<HostDevice>,
    offer: &ServeOptions,
    (shutdown, stop): (&Shutdown, &StopHandle),
    (entry, terms): (Entry, std::io::Result<Terms>),
) -> Result<Ended, ProgramError> {
    let (server, predecessor) = match entry {
        Entry::New => (place.listen()?, None),
        Entry::Kept(server) => (server, None),
        Entry::Taken(predecessor, sockets) => (place.listen_on(sockets)?, Some(predecessor)),
    };
    let asked = Arc::new(Mutex::new(None));
    let replaceable = offer_place(place, terms, shutdown, &asked);
    let _pings = Watchdog::start(Arc::clone(&offer.pulse))?;
    if let Some(predecessor) = predecessor {
        predecessor.tell_serving();
    }
    info!("serving {} on {place}: {}", shown(image), described(device, offer));
    notify::send(&format!("{}\n{}", notify::READY, notify::status(Stage::Waiting)));
    server.serve(device, offer, stop)?;
    drop(replaceable);
    let successor = asked.lock().unwrap_or_else(PoisonError::into_inner).take();
    Ok(match successor {
        Some(successor) => Ended::Asked(server, successor),
        None => Ended::Stopped,
    })
}

/// Waits for a successor on the handover socket, and puts it into `asked`.
fn offer_place(
    place: &Place,
    terms: std::io::Result<Terms>,
    shutdown: &Shutdown,
    asked: &Arc<Mutex<Option<Successor>>>,
) -> Option<Offer> {
    let Place::File { path, .. } = place else { return None };
    let (shutdown, asked) = (shutdown.clone(), Arc::clone(asked));
    let asked = move |successor| {
        let slot = || asked.lock().unwrap_or_else(PoisonError::into_inner);
        *slot() = Some(successor);
        if !shutdown.hand_over() {
            *slot() = None;
        }
    };
    let started = terms.and_then(|terms| Offer::start(path, terms, asked));
    started.unwrap_or_else(|error| {
        warn!(%error, "this daemon cannot be replaced while it serves: no socket for that next to its own");
        None
    })
}

/// Looks at the image of another daemon without a lock, and refuses what surely cannot be served.
fn examine(image: &Path, options: &ServeArgs) -> Result<(), ProgramError> {
    let storage =
        options.lock.storage().confined(&options.chain.chain_root).map_err(ProgramError::ChainRoot)?;
    let failed = |source| ProgramError::Open { image: image.to_owned(), purpose: Purpose::Serve, source };
    let (top, how) = top_of(image, options).map_err(|error| failed(error.into()))?;
    let layers = disk::describe(&storage, &top, &how, Sharing::All, true).map_err(failed)?;
    if let Some((path, source)) =
        layers.into_iter().find_map(|layer| Some((layer.layer.path, layer.unsupported?)))
    {
        return Err(failed(OpenError::Unsupported { path, source }));
    }
    Ok(())
}

/// A short description of the disk.
fn described(device: &HostDevice, offer: &ServeOptions) -> String {
    let Some(disk) = device.disk() else {
        return format!(
            "{}, which another process still uses: it is opened when the guest starts here",
            size::short(device.facts().size)
        );
    };
    let format = disk
        .cluster_size()
        .map_or("raw".to_owned(), |cluster| format!("qcow2 with clusters of {}", size::short(cluster)));
    let layers = match disk.layers().len() {
        1 => String::new(),
        count => format!(", a chain of {count} layers"),
    };
    let data = disk.data_file().map_or(String::new(), |file| format!(" and its data in {}", shown(file)));
    let access = if disk.is_read_only() { ", read-only" } else { "" };
    let queues = offer.num_queues;
    format!("{}, {format}{data}{layers}{access}, up to {queues} queues", size::short(disk.size()))
}

fn close(image: &Path, device: Arc<HostDevice>) -> Result<(), ProgramError> {
    let device = Arc::into_inner(device).ok_or_else(|| ProgramError::InUse { image: image.to_owned() })?;
    device.close().map_err(|source| ProgramError::Close { image: image.to_owned(), source })
}

/// Logs one line of totals, as `totals name=number …`; programs read it.
fn tell_totals(metrics: &Metrics, space: SpaceStatus, map_bytes: usize, image_bytes: u64) {
    let total = metrics.total();
    info!(
        reads = total.reads,
        writes = total.writes,
        flushes = total.flushes,
        discards = total.discards,
        write_zeroes = total.write_zeroes,
        others = total.others,
        read_bytes = total.read_bytes,
        written_bytes = total.written_bytes,
        errors = total.errors(),
        malformed = total.malformed,
        ring_errors = total.ring_errors,
        space_waits = space.waited,
        map_bytes,
        image_bytes,
        "totals"
    );
}

/// Each layer needs a file and each queue several descriptors: the usual soft limit of 1,024 is soon reached.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        Ok(()) => debug!(limit = limit.maximum, "raised the limit of open files"),
        Err(error) => warn!(%error, "the limit of open files could not be raised"),
    }
}
