//! Examines a crash state with the checker, and by opening the disk and reading all of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use disk::check::{Finding, FindingKind, Report, check};
use disk::snapshot::list;
use disk::{Completed, Disk, DiskOptions, Request, RequestId};
use qcow2::feature::COMPATIBLE_LAZY_REFCOUNTS;
use qcow2::{Header, Incompatible, L1Entry, L2Entry, RawL2Entry};
use storage_sim::{Image, SimOptions, SimWorld};

use super::bitmap;
use super::memory::{WINDOW, gather, memory};
use super::shape::{Shape, Snapshots, Start};
use super::stamp::{SECTOR, Value, read_stamps};

/// The contents and faults of an image.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The values by sector. Empty if they could not be read.
    pub values: Vec<Value>,
    /// The external data file as a raw image, by sector.
    pub raw_view: Option<Vec<Value>>,
    /// The values of a hidden snapshot, by sector.
    pub snapshot: Option<Vec<Value>>,
    /// Clusters leaked, as the checker counts them.
    pub leaks: u64,
    /// Clusters past the end of the file that have a refcount. The file's length was lost, and they become leaks when
    /// it grows again.
    pub hidden_leaks: u64,
    /// Entries for clusters past the end of the disk.
    pub past_end: u64,
    /// Clusters of the refcount table.
    pub table_clusters: u64,
    /// The image was marked dirty. Opening it rebuilds its refcounts, and they were checked after that.
    pub dirty: bool,
    /// The snapshots by name, in the order of the table.
    pub snapshots: Snapshots,
    /// The image has a bitmap that is marked up to date.
    pub trusted_bitmap: bool,
    /// Some COPIED flags are clear that could be set. This costs only a copy. Version 2 has no mark for a change in
    /// progress.
    pub shy: bool,
    /// A fault of the image that no crash may leave, regardless of the journal.
    pub wrong: Option<String>,
}

/// Examines an image that was made from `start`. A panic counts as a fault.
pub fn examine(image: &Image, start: &Start) -> Seen {
    let looked = catch_unwind(AssertUnwindSafe(|| look(image, start)));
    let wrong = match looked {
        Ok(Ok(seen)) => return seen,
        Ok(Err(wrong)) => wrong,
        Err(panic) => format!("the recovery panicked: {}", panic_text(&*panic)),
    };
    Seen { wrong: Some(wrong), ..Seen::default() }
}

/// The message of a panic.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

fn look(image: &Image, start: &Start) -> Result<Seen, String> {
    let shape = &start.shape;
    let world = SimWorld::from_image(image.clone(), 1, SimOptions::calm());
    if !shape.is_qcow2() {
        return Ok(Seen { values: read_all(&world, &start.top, &shape.options())?, ..Seen::default() });
    }
    let before = header(image, &start.top)?;
    let dirty = before.incompatible.contains(Incompatible::DIRTY);
    if shape.lazy && before.compatible & COMPATIBLE_LAZY_REFCOUNTS == 0 {
        return Err("the flag of lazy refcounts is gone".to_owned());
    }
    let trusted_bitmap = bitmap::is_trusted(image, &before);
    let before = if dirty { None } else { Some(report(image, start)?) };
    let values = read_all(&world, &start.top, &shape.options())?;
    let snapshots = read_snapshots(&world, start)?;
    let report = match before {
        Some(report) => report,
        None => report(&world.image(), start)?,
    };
    let wrong_at_all = report.corruptions + report.notes > 0;
    let shy = shape.version == 2 && wrong_at_all && report.findings.iter().all(is_shy);
    let wrong = (wrong_at_all && !shy).then(|| findings(&report));
    let hidden_leaks = counted_past_end(&world.image(), &start.top)?;
    let past_end = entries_past_end(&world.image(), &start.top)?;
    let snapshot = start.hidden.as_ref().map(|hidden| {
        let world = SimWorld::from_image(hidden.as_it_was(image), 1, SimOptions::calm());
        let options = DiskOptions { read_only: true, ..shape.options() };
        read_all(&world, &start.top, &options).map_err(|error| format!("the snapshot: {error}"))
    });
    let table_clusters = u64::from(header(image, &start.top)?.refcount_table_clusters);
    Ok(Seen {
        values,
        raw_view: shape.raw_view(image),
        snapshot: snapshot.transpose()?,
        leaks: report.leaked_clusters,
        hidden_leaks,
        past_end,
        table_clusters,
        dirty,
        snapshots,
        trusted_bitmap,
        shy,
        wrong,
    })
}

/// The checker's report on the image with a hidden snapshot revealed.
fn report(image: &Image, start: &Start) -> Result<Report, String> {
    let world = SimWorld::from_image(start.revealed(image), 1, SimOptions::calm());
    check(&world.storage(), Path::new(&start.top), &start.shape.options())
        .map_err(|error| format!("the checker could not look: {error}"))
}

/// True for a leak, and for a clear flag of a cluster that is not shared.
fn is_shy(finding: &Finding) -> bool {
    match finding.kind {
        FindingKind::Copied { raw, refcount, .. } => raw & qcow2::entry::COPIED == 0 && refcount == 1,
        kind => kind.is_leak(),
    }
}

/// The values of a closed disk.
///
/// # Errors
/// Why it cannot be read.
pub fn values_now(image: &Image, top: &str, shape: &Shape) -> Result<Arc<[Value]>, String> {
    let world = SimWorld::from_image(image.clone(), 1, SimOptions::calm());
    read_all(&world, top, &DiskOptions { read_only: true, ..shape.options() }).map(Arc::from)
}

fn read_snapshots(world: &SimWorld, start: &Start) -> Result<Snapshots, String> {
    let shape = &start.shape;
    let found = list(&world.storage(), Path::new(&start.top), &shape.options())
        .map_err(|error| format!("its snapshots cannot be listed: {error}"))?;
    let read = |snapshot: disk::snapshot::Snapshot| {
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        let options = DiskOptions { snapshot: Some(name.clone()), ..shape.options() };
        let values =
            read_all(world, &start.top, &options).map_err(|error| format!("snapshot {name}: {error}"))?;
        Ok((name, Arc::from(values)))
    };
    found.into_iter().map(read).collect()
}

/// The top image's header.
fn header(image: &Image, top: &str) -> Result<Header, String> {
    let contents = image.file(Path::new(top)).ok_or("there is no image")?;
    let unreadable = |error| format!("the header: {error}");
    let mut prefix = vec![0; Header::PREFIX_MAX];
    contents.read(0, &mut prefix);
    let mut area = vec![0; Header::cluster_size_hint(&prefix).map_err(unreadable)? as usize];
    contents.read(0, &mut area);
    Header::parse(&area, contents.length()).map_err(unreadable)
}

/// Clusters past the end of the file that have a refcount.
pub fn counted_past_end(image: &Image, top: &str) -> Result<u64, String> {
    let contents = image.file(Path::new(top)).ok_or("there is no image")?;
    let read = |offset: u64, length: u64| {
        let mut bytes = vec![0; length as usize];
        contents.read(offset, &mut bytes);
        bytes
    };
    let header = header(image, top)?;
    let geometry = header.geometry();
    let (cluster, entries) = (geometry.cluster_size(), geometry.refblock_entries());
    let table = read(header.refcount_table_offset.0, u64::from(header.refcount_table_clusters) * cluster);
    let end = geometry.clusters_for(contents.length());
    let mut counted = 0;
    for block in end / entries..table.len() as u64 / 8 {
        let raw = qcow2::entry(&table, block as usize);
        let Ok(Some(offset)) = qcow2::refblock_offset(raw, &geometry) else { continue };
        let bytes = read(offset.0, cluster);
        let past = |index: &u64| block * entries + index >= end;
        let used = |index: &u64| qcow2::refcount(geometry.refcount_order, &bytes, *index as usize) != 0;
        counted += (0..entries).filter(past).filter(used).count() as u64;
    }
    Ok(counted)
}

/// The entries of the active L2 tables for clusters past the end of the disk.
pub fn entries_past_end(image: &Image, top: &str) -> Result<u64, String> {
    let contents = image.file(Path::new(top)).ok_or("there is no image")?;
    let read = |offset: u64, length: u64| {
        let mut bytes = vec![0; length as usize];
        contents.read(offset, &mut bytes);
        bytes
    };
    let header = header(image, top)?;
    let geometry = header.geometry();
    let end = geometry.clusters_for(header.size);
    let l1 = read(header.l1_offset.0, u64::from(header.l1_entries) * 8);
    let mut entries = 0;
    for index in end / geometry.l2_entries()..u64::from(header.l1_entries) {
        let raw = qcow2::entry(&l1, index as usize);
        let Ok(L1Entry::Table { offset, .. }) = L1Entry::decode(raw, &geometry) else { continue };
        let table = read(offset.0, geometry.cluster_size());
        let first = index * geometry.l2_entries();
        let past = (first.max(end) - first..geometry.l2_entries())
            .map(|at| RawL2Entry::load(&table, at as usize, &geometry));
        entries +=
            past.filter(|raw| L2Entry::decode(*raw, &geometry) != Ok(L2Entry::Unallocated)).count() as u64;
    }
    Ok(entries)
}

fn findings(report: &Report) -> String {
    let corrupt = report.findings.iter().filter(|finding| !finding.kind.is_leak());
    let lines: Vec<String> = corrupt.take(8).map(|finding| format!("\n    {finding}")).collect();
    format!("the checker finds {} corruptions:{}", report.corruptions + report.notes, lines.concat())
}

/// Opens the disk and reads all of it. Unless the options say otherwise it is opened for writing, so that a dirty image
/// is repaired.
fn read_all(world: &SimWorld, top: &str, options: &DiskOptions) -> Result<Vec<Value>, String> {
    let disk = Disk::open_unkept(world.storage(), Path::new(top), options)
        .map_err(|error| format!("it does not open: {error}"))?;
    let mut queue = disk.queue(64).map_err(|error| format!("no queue: {error}"))?;
    let mut values = Vec::new();
    let most = WINDOW as u64 / SECTOR;
    let sectors = disk.size() / SECTOR;
    while (values.len() as u64) < sectors {
        let first = values.len() as u64;
        let slices = memory(0, most.min(sectors - first), 0);
        queue.submit(RequestId(0), Request::Read { offset: first * SECTOR }, &slices);
        let mut done: Vec<Completed> = Vec::new();
        loop {
            queue.poll(&mut done);
            if !done.is_empty() {
                break;
            }
            queue.wait(None);
        }
        for completed in done {
            completed.result.map_err(|error| format!("reading sector {first} and on: {error}"))?;
        }
        values.extend(read_stamps(first, &gather(&slices)));
    }
    Ok(values)
}
