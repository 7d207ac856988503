//! The engine alone, without files or threads, against a byte-array model. The test carries out plans on byte vectors.
//! After every flush the bytes are reopened, as after a crash. They must equal the flushed contents, with exact
//! refcounts except for leaks.

use std::sync::atomic::Ordering;
use std::task::Waker;

use engine::{
    Answer, Engine, EngineError, EngineSpec, Extent, FileIndex, FlushStep, LayerFormat, LayerSpec, Mapping,
    Source, TableSlot, TopSpec, Turn, WritePlan, ZeroMode, Zeroed,
};
use proptest::prelude::*;
use qcow2::{
    GuestCluster, GuestOffset, Header, HostCluster, HostOffset, L1Entry, L2Entry, NewImage, RawL2Entry,
    Subcluster, Version,
};
use strata_kit::ByteModel;
use strata_kit::model::{DiscardRule, Geometry, Operation, contents, sequences, sequences_of_parts};

/// A chain as byte vectors. The top image is file 0; its external data file, if any, is the last.
#[derive(Clone)]
struct Files(Vec<Vec<u8>>);

impl Files {
    fn read(&self, file: FileIndex, offset: u64, length: u64) -> Vec<u8> {
        let bytes = &self.0[usize::from(file.0)];
        let mut out = vec![0; length as usize];
        let start = (offset as usize).min(bytes.len());
        let end = ((offset + length) as usize).min(bytes.len());
        out[..end - start].copy_from_slice(&bytes[start..end]);
        out
    }

    /// The file that holds the top image's data.
    fn data(&self) -> FileIndex {
        let last = self.0.len() - 1;
        FileIndex(if header(&self.0[0]).has_data_file() { last as u16 } else { 0 })
    }

    /// Writes to the file that holds the top image's data. An external file stays as long as the disk.
    fn write_data(&mut self, offset: u64, data: &[u8]) {
        let file = self.data();
        if file == FileIndex(0) {
            return self.write(offset, data);
        }
        self.0[usize::from(file.0)][offset as usize..offset as usize + data.len()].copy_from_slice(data);
    }

    /// Writes to the top image's file.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.0[0].len() < end {
            self.0[0].resize(end, 0);
        }
        self.0[0][offset as usize..end].copy_from_slice(data);
    }
}

/// The kind of a layer's clusters.
#[derive(Clone, Copy)]
struct Kind {
    cluster_bits: u32,
    extended_l2: bool,
    /// The data is in an external file. Only the top image may have one.
    apart: bool,
}

/// Clusters of this many bits.
const fn whole(cluster_bits: u32) -> Kind {
    Kind { cluster_bits, extended_l2: false, apart: false }
}

/// Clusters of this many bits, with subclusters.
const fn parts(cluster_bits: u32) -> Kind {
    Kind { extended_l2: true, ..whole(cluster_bits) }
}

/// The same kind with the data in an external file.
const fn apart(kind: Kind) -> Kind {
    Kind { apart: true, ..kind }
}

impl Kind {
    fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    fn granule_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }
}

/// An empty image, or an overlay.
fn image(version: Version, kind: Kind, size: u64, overlay: bool) -> Vec<u8> {
    let Kind { cluster_bits, extended_l2, apart } = kind;
    let geometry = qcow2::Geometry { version, cluster_bits, refcount_order: 4, extended_l2, size };
    let mut image = NewImage::new(geometry);
    if overlay {
        image.backing_file = Some(b"below".to_vec());
        image.backing_format = Some("qcow2".into());
    }
    let mut bytes = Vec::new();
    for (offset, piece) in image.layout().expect("a valid image") {
        bytes.resize(offset.0 as usize, 0);
        bytes.extend(piece);
    }
    if apart {
        bytes[qcow2::position::INCOMPATIBLE + 7] |= qcow2::Incompatible::DATA_FILE.0 as u8;
    }
    bytes
}

fn table(bytes: &[u8], offset: u64, entries: u64) -> Vec<u64> {
    let files = Files(vec![bytes.to_vec()]);
    let raw = files.read(FileIndex(0), offset, entries * 8);
    (0..entries as usize).map(|index| qcow2::entry(&raw, index)).collect()
}

fn header(bytes: &[u8]) -> Header {
    let cluster = Header::cluster_size_hint(bytes).expect("a header") as usize;
    Header::parse(&bytes[..cluster.min(bytes.len())], bytes.len() as u64).expect("a header")
}

/// The engine and its files.
struct Bench {
    engine: Engine,
    files: Files,
    /// Number of early commits.
    early_links: u32,
}

impl Bench {
    fn open(files: Files) -> Self {
        let data = Some(files.data()).filter(|data| *data != FileIndex(0));
        let images = files.0.len() - usize::from(data.is_some());
        let headers: Vec<Header> = files.0[..images].iter().map(|bytes| header(bytes)).collect();
        let layers = headers.iter().zip(&files.0).enumerate().map(|(file, (header, bytes))| LayerSpec {
            file: FileIndex(file as u16),
            format: LayerFormat::Qcow2 {
                geometry: header.geometry(),
                l1: table(bytes, header.l1_offset.0, u64::from(header.l1_entries)).into_iter().collect(),
                data_file: data.filter(|_| file == 0),
            },
        });
        let top = &headers[0];
        let cluster = top.geometry().cluster_size();
        let entries = u64::from(top.refcount_table_clusters) * cluster / 8;
        let engine = Engine::new(EngineSpec {
            layers: layers.collect(),
            writable: true,
            top: Some(TopSpec {
                l1_offset: top.l1_offset,
                refcount_table_offset: top.refcount_table_offset,
                refcount_table: table(&files.0[0], top.refcount_table_offset.0, entries)
                    .into_iter()
                    .collect(),
                file_length: files.0[0].len() as u64,
                bitmaps: Vec::new(),
                snapshots: Default::default(),
                keep_discarded: false,
                may_search_leaks: false,
            }),
            // Small, so that slices and tables are evicted all the time.
            map_bytes: 2 * 4096,
            table_bytes: 6 * 4096,
            workers: 2,
        })
        .expect("an engine");
        Bench { engine, files, early_links: 0 }
    }

    /// Repeats a question to the engine until it answers, and does the I/O that it requests.
    fn ask<T>(
        &mut self,
        question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, EngineError> {
        self.ask_in_turn(&Turn::default(), question)
    }

    /// The same for a question with a turn, which is over then.
    fn ask_in_turn<T>(
        &mut self,
        turn: &Turn,
        question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, EngineError> {
        let answer = self.ask_until_ready(turn, question);
        self.engine.end_turn(turn);
        answer
    }

    fn ask_until_ready<T>(
        &mut self,
        turn: &Turn,
        mut question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, EngineError> {
        loop {
            match question(&self.engine, Waker::noop())? {
                Answer::Ready(value) => return Ok(value),
                Answer::Load(loads) => {
                    for load in loads {
                        let bytes = self.files.read(load.file, load.offset.0, load.length as u64);
                        self.engine.table_loaded(&load, bytes.into());
                    }
                }
                Answer::Allocate(places) => {
                    places.iter().for_each(|place| self.engine.table_allocated(place));
                }
                Answer::Crowded => self.flush()?,
                Answer::Reserve => self.reserve(turn)?,
                Answer::Flush => self.flush()?,
                Answer::Table(slot) => self.make_table(slot)?,
                Answer::Wait => panic!("there is nobody to wait for"),
            }
        }
    }

    fn make_table(&mut self, slot: TableSlot) -> Result<(), EngineError> {
        let turn = Turn::default();
        let plan = self.ask_in_turn(&turn, |engine, waker| engine.plan_table(slot, &turn, waker))?;
        if let Some(plan) = plan {
            self.engine.commit_table(plan);
        }
        Ok(())
    }

    fn reserve(&mut self, turn: &Turn) -> Result<(), EngineError> {
        let plan = self.ask(|engine, waker| engine.plan_reserve(turn, waker))?;
        let Some(plan) = plan else { return Ok(()) };
        if let Some(length) = plan.file_length
            && (self.files.0[0].len() as u64) < length
        {
            self.files.0[0].resize(length as usize, 0);
        }
        self.engine.commit_reserve(plan);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        let ticket = self.engine.begin_flush()?;
        while let FlushStep::Lead(cut) = self.engine.plan_flush(ticket, Waker::noop())? {
            // Bytes past the end of a file read as zero here, so there is nothing to do for its length.
            if let Some(length) = cut.lengthen {
                self.engine.file_was_lengthened(length);
            }
            for write in cut.stage0.iter().chain(&cut.stage1) {
                self.files.write(write.offset.0, &write.bytes);
            }
            if let Some(switch) = cut.header {
                let (offset, clusters) = (switch.refcount_table_offset, switch.refcount_table_clusters);
                let patch = qcow2::position::patch_refcount_table(offset, clusters);
                self.files.write(patch.offset.0, &patch.bytes);
            }
            for write in &cut.stage2 {
                self.files.write(write.offset.0, &write.bytes);
            }
            self.engine.commit_cut(&cut);
        }
        let idle = self.engine.sweep_map(0);
        // Clears the words, as if the host had taken their memory away.
        idle.pages().flatten().for_each(|word| word.store(0, Ordering::Relaxed));
        drop(idle);
        while let Some(plan) = self.ask(|engine, waker| engine.plan_reclaim(waker))? {
            // Punched ranges read as zero. The result must not depend on punches that are left out.
            let punched: Vec<bool> = plan.punches.iter().map(|(offset, _)| offset.0 % 3 != 0).collect();
            for ((offset, length), punched) in plan.punches.clone().into_iter().zip(&punched) {
                let bytes = vec![if *punched { 0 } else { 0xee }; length as usize];
                self.files.write(offset.0, &bytes);
            }
            self.engine.commit_reclaim(plan, &punched);
        }
        Ok(())
    }

    fn extents(&mut self, offset: u64, length: u64) -> Vec<Extent> {
        let mut all = Vec::new();
        let mut done = 0;
        while done < length {
            let at = GuestOffset(offset + done);
            for extent in
                self.ask(|engine, waker| engine.plan_read(at, length - done, waker)).expect("readable")
            {
                done += extent.length;
                all.push(extent);
            }
        }
        all
    }

    fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for extent in self.extents(offset, length) {
            match extent.source {
                Source::Zero => bytes.resize(bytes.len() + extent.length as usize, 0),
                Source::Compressed { .. } => panic!("nothing here is compressed"),
                Source::Data { file, offset } => bytes.extend(self.files.read(file, offset.0, extent.length)),
            }
        }
        self.agree_with_map(offset, &bytes);
        bytes
    }

    /// Checks that the map agrees with the bytes read from the first cluster, if the map has it.
    fn agree_with_map(&self, offset: u64, bytes: &[u8]) {
        let within = offset % self.engine.unit();
        let length = (self.engine.unit() - within).min(bytes.len() as u64);
        let found = match self.engine.lookup(GuestOffset(offset)) {
            Mapping::Zero => vec![0; length as usize],
            Mapping::Data { file, offset, .. } => self.files.read(file, offset.0 + within, length),
            Mapping::Parts => return self.agree_with_parts(offset, within, bytes),
            Mapping::Mixed | Mapping::Unresolved => return,
        };
        assert!(found == bytes[..length as usize], "the map and the tables differ at {offset:#x}");
    }

    /// As [`Bench::agree_with_map`], for the first subcluster.
    fn agree_with_parts(&self, offset: u64, within: u64, bytes: &[u8]) {
        let cluster = self.engine.lookup_parts(GuestOffset(offset)).expect("nobody changes the map");
        let size = self.engine.unit() / 32;
        let length = (size - within % size).min(bytes.len() as u64);
        let found = match cluster.parts.at((within / size) as u32).0 {
            Subcluster::Zero => vec![0; length as usize],
            Subcluster::Data => self.files.read(cluster.file, cluster.offset.0 + within, length),
            Subcluster::Unallocated => return,
        };
        assert!(found == bytes[..length as usize], "the map and the tables differ at {offset:#x}");
    }

    /// Checks that no entry on the disk refers to a host cluster about to be written. An entry of another guest cluster
    /// is never allowed. One of the same guest cluster is forbidden if `by_nobody`, which holds after an early commit
    /// whose data could not be written. A cut may have removed that link.
    fn check_unnamed(&self, host: HostOffset, guest: u64, by_nobody: bool) {
        let header = header(&self.files.0[0]);
        let geometry = header.geometry();
        let (host, guest) = (geometry.host_cluster(host), geometry.guest_cluster(GuestOffset(guest)));
        for (owner, named) in data_clusters(&self.files.0[0], &header) {
            let named_here = geometry.host_cluster(named) == host;
            assert!(!named_here || (owner == guest && !by_nobody), "{owner:?} on the disk names {named:?}");
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), EngineError> {
        let (mut done, mut failed) = (0, None);
        while done < data.len() {
            let (at, left) = (offset + done as u64, (data.len() - done) as u64);
            let turn = Turn::default();
            let plan = self
                .ask_in_turn(&turn, |engine, waker| engine.plan_write(GuestOffset(at), left, &turn, waker))?;
            match plan {
                WritePlan::InPlace { file, offset, length } => {
                    assert_eq!(file, self.files.data(), "only the top image is written");
                    self.files.write_data(offset.0, &data[done..done + length as usize]);
                    done += length as usize;
                }
                WritePlan::Allocate(mut new) => {
                    self.check_unnamed(new.offset, at - new.head, failed == Some(new.offset));
                    if let Some(link) = self.engine.link_early(&mut new) {
                        self.early_links += 1;
                        self.files.write(link.offset.0, &link.bytes);
                        check_references(&self.files.0[0]);
                        if self.early_links.is_multiple_of(3) {
                            // The data could not be written. The retry must not use a host cluster that the disk may
                            // refer to.
                            failed = Some(new.offset);
                            self.engine.abort_write(new);
                            continue;
                        }
                    }
                    let size = self.engine.size();
                    let head = self.read(at - new.head, new.head);
                    let end = at + new.length;
                    let mut tail = self.read(end, new.tail.min(size - end));
                    tail.resize(new.tail as usize, 0);
                    let whole = [&head[..], &data[done..done + new.length as usize], &tail].concat();
                    if new.known_zero {
                        let there = self.files.read(FileIndex(0), new.offset.0, whole.len() as u64);
                        assert!(there.iter().all(|byte| *byte == 0), "known to be zero, but it is not");
                    }
                    assert_eq!(new.file, self.files.data(), "only the top image is written");
                    self.files.write_data(new.offset.0, &whole);
                    done += new.length as usize;
                    self.engine.commit_write(new);
                }
            }
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), EngineError> {
        let unit = self.engine.granule();
        let end = offset + length;
        let start = offset.next_multiple_of(unit);
        let whole_end = if end == self.engine.size() { end } else { end / unit * unit };
        if mode != ZeroMode::Discard {
            if start >= whole_end {
                return self.write(offset, &vec![0; length as usize]);
            }
            self.write(offset, &vec![0; (start - offset) as usize])?;
            self.write(whole_end, &vec![0; (end - whole_end) as usize])?;
        }
        let mut at = start;
        while at < whole_end {
            let left = whole_end - at;
            at += match self.ask(|engine, waker| engine.zero(GuestOffset(at), left, mode, waker))? {
                Zeroed::Done { bytes, .. } => {
                    if mode != ZeroMode::Keep && self.files.data() != FileIndex(0) {
                        // The cluster may be punched, or hold anything: no entry may refer to it.
                        self.files.write_data(at, &vec![0xee; bytes as usize]);
                    }
                    bytes
                }
                Zeroed::NeedsData(bytes) => {
                    self.write(at, &vec![0; bytes as usize])?;
                    bytes
                }
            };
        }
        Ok(())
    }

    fn apply(&mut self, operation: &Operation, model: &mut ByteModel) {
        let done = match *operation {
            Operation::Read { offset, length } => {
                let found = self.read(offset, length);
                model
                    .compare(offset, &found)
                    .unwrap_or_else(|difference| panic!("{operation:?}: {difference}"));
                Ok(())
            }
            Operation::Write { offset, length, seed } => self.write(offset, &contents(seed, offset, length)),
            Operation::Discard { offset, length } => self.zero(offset, length, ZeroMode::Discard),
            Operation::WriteZeroes { offset, length, unmap } => {
                self.zero(offset, length, if unmap { ZeroMode::Unmap } else { ZeroMode::Keep })
            }
            Operation::Flush => self.flush(),
        };
        done.unwrap_or_else(|error| panic!("{operation:?}: {error}"));
        model.apply(operation);
    }
}

/// The L2 tables of an image: the index of each in the L1 table, and its offset.
fn l2_tables(bytes: &[u8], header: &Header) -> Vec<(u64, HostOffset)> {
    let geometry = header.geometry();
    let l1 = table(bytes, header.l1_offset.0, u64::from(header.l1_entries));
    let place = |(index, raw)| match L1Entry::decode(raw, &geometry).expect("aligned") {
        L1Entry::Table { offset, .. } => Some((index, offset)),
        L1Entry::Unallocated => None,
    };
    (0..).zip(l1).filter_map(place).collect()
}

/// The host clusters in the image file that its entries refer to, each with the guest cluster of the entry.
fn data_clusters(bytes: &[u8], header: &Header) -> Vec<(GuestCluster, HostOffset)> {
    let geometry = header.geometry();
    let mut named = Vec::new();
    for (index, offset) in l2_tables(bytes, header) {
        if header.has_data_file() {
            break;
        }
        let start = offset.0 as usize;
        let table = &bytes[start..start + geometry.cluster_size() as usize];
        for entry in 0..geometry.l2_entries() {
            let raw = RawL2Entry::load(table, entry as usize, &geometry);
            if let Some(host) = L2Entry::decode(raw, &geometry).expect("sound").host() {
                named.push((GuestCluster(index * geometry.l2_entries() + entry), host.offset));
            }
        }
    }
    named
}

/// Checks that each cluster has no more references, counted from the tables, than its refcount. Each data cluster of an
/// image without snapshots must be referenced once.
fn check_references(bytes: &[u8]) {
    let header = header(bytes);
    let geometry = header.geometry();
    let mut references = vec![0u64; geometry.clusters_for(bytes.len() as u64) as usize + 1];
    let mut refer = |offset: HostOffset, length: u64| {
        for cluster in 0..geometry.clusters_for(length) {
            references[(geometry.host_cluster(offset).0 + cluster) as usize] += 1;
        }
    };
    refer(HostOffset(0), 1);
    refer(header.l1_offset, u64::from(header.l1_entries) * 8);
    let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    refer(header.refcount_table_offset, table_bytes);
    let blocks = table(bytes, header.refcount_table_offset.0, table_bytes / 8);
    for raw in &blocks {
        if let Some(offset) = qcow2::refblock_offset(*raw, &geometry).expect("aligned") {
            refer(offset, geometry.cluster_size());
        }
    }
    for (_, offset) in l2_tables(bytes, &header) {
        refer(offset, geometry.cluster_size());
    }
    for (_, offset) in data_clusters(bytes, &header) {
        refer(offset, 1);
    }
    for (cluster, count) in references.iter().enumerate().filter(|(_, count)| **count > 0) {
        let block = HostCluster(cluster as u64).0 / geometry.refblock_entries();
        let offset =
            qcow2::refblock_offset(blocks[block as usize], &geometry).expect("aligned").expect("a block");
        let index = cluster as u64 % geometry.refblock_entries();
        let start = offset.0 as usize;
        let refcount =
            qcow2::refcount(4, &bytes[start..start + geometry.cluster_size() as usize], index as usize);
        assert_eq!(*count, 1, "cluster {cluster:#x} is used {count} times");
        assert_eq!(refcount, 1, "cluster {cluster:#x} is in use with refcount {refcount}");
    }
}

/// Opens the bytes as they are now, without the state in memory, and compares them with the flushed contents.
fn reopen_and_compare(files: &Files, flushed: &ByteModel) {
    check_references(&files.0[0]);
    let mut bench = Bench::open(files.clone());
    let found = bench.read(0, bench.engine.size());
    flushed.compare_all(&found).unwrap_or_else(|difference| panic!("reopened after a flush: {difference}"));
}

/// Runs sessions on a chain. `kinds` are its layers from the top down, and `version` is that of the top.
fn run(version: Version, kinds: &[Kind], size: u64, sessions: &[Vec<Operation>], below: &[Operation]) {
    let granule = kinds[0].granule_size();
    let layer = |kind: Kind, version, overlay| image(version, kind, size, overlay);
    let mut chain: Vec<Vec<u8>> = Vec::new();
    let mut model = ByteModel::new(size, granule, DiscardRule::ZeroesClusters);
    // The layers below, from the base up. Each is written through its own engine.
    for (depth, kind) in kinds.iter().enumerate().skip(1).rev() {
        let mut files = vec![layer(*kind, Version::V3, !chain.is_empty())];
        files.extend(chain);
        let mut bench = Bench::open(Files(files));
        let mut own = ByteModel::with_contents(
            &bench.read(0, size),
            size,
            kind.granule_size(),
            DiscardRule::ZeroesClusters,
        );
        for operation in below.iter().skip(depth - 1) {
            bench.apply(operation, &mut own);
        }
        bench.flush().expect("flush");
        chain = bench.files.0;
        model = ByteModel::with_contents(&own.read(0, size), size, granule, DiscardRule::ZeroesClusters);
    }
    let over = !chain.is_empty();
    if over && version == Version::V2 {
        model = ByteModel::with_contents(&model.read(0, size), size, granule, DiscardRule::Nothing);
    }
    let mut files = vec![layer(kinds[0], version, over)];
    files.extend(chain);
    if kinds[0].apart {
        // The guest must never see bytes that no entry refers to.
        files.push(vec![0xee; size.next_multiple_of(512) as usize]);
    }
    let mut files = Files(files);
    for operations in sessions {
        let mut bench = Bench::open(files);
        for operation in operations {
            bench.apply(operation, &mut model);
            if *operation == Operation::Flush {
                reopen_and_compare(&bench.files, &model);
            }
        }
        bench.flush().expect("flush");
        reopen_and_compare(&bench.files, &model);
        files = bench.files;
    }
}

#[test]
fn a_vast_disk_is_served_beyond_what_the_map_keeps() {
    // With tiny bounds the map's directory has an entry for every few clusters.
    let (size, far) = if engine::BOUNDS_ARE_TINY { (1 << 44, 1 << 26) } else { (1 << 60, 1 << 42) };
    let mut bench = Bench::open(Files(vec![image(Version::V3, whole(21), size, false)]));
    let mut written = Vec::new();
    for n in 0..1200 {
        let at = n * far + 4096;
        assert_eq!(bench.read(at, 512), [0; 512], "{at:#x}");
        if n % 400 == 399 {
            let data = contents(n as u32, at, 512);
            bench.write(at, &data).expect("a write");
            written.push((at, data));
        }
    }
    bench.flush().expect("flush");
    let mut bench = Bench::open(bench.files);
    for (at, data) in written {
        assert_eq!(bench.read(at, 512), data, "{at:#x}");
        bench.zero(at, 512, ZeroMode::Unmap).expect("zeroes");
        assert_eq!(bench.read(at, 512), [0; 512], "{at:#x}");
    }
}

#[test]
fn a_link_is_written_beside_its_data_where_a_flush_follows_each() {
    let size = 300 << 10;
    let mut bench = Bench::open(Files(vec![image(Version::V3, whole(10), size, false)]));
    let mut model = ByteModel::new(size, 1 << 10, DiscardRule::ZeroesClusters);
    // From now on a reservation, whose counts are written first, provides all clusters for the rest of the test.
    for offset in [128 << 10, 160 << 10] {
        bench.apply(&Operation::Write { offset, length: 32 << 10, seed: 0 }, &mut model);
    }
    bench.flush().expect("a flush");
    let mut write = |bench: &mut Bench, cluster: u64| {
        let write = Operation::Write { offset: (cluster << 10) + 512, length: 512, seed: cluster as u32 };
        bench.apply(&write, &mut model);
        model.clone()
    };
    let mut links = |bench: &mut Bench, flushed: &[u64], then: u64| {
        for cluster in flushed {
            let model = write(bench, *cluster);
            bench.flush().expect("a flush");
            reopen_and_compare(&bench.files, &model);
        }
        let before = bench.early_links;
        let model = write(bench, then);
        (bench.early_links - before, model)
    };
    assert_eq!(links(&mut bench, &[0], 1).0, 0, "once is no habit");
    assert_eq!(links(&mut bench, &[2], 3).0, 0, "two writes to a flush");
    bench.flush().expect("a flush");
    let (count, model) = links(&mut bench, &[4, 5], 6);
    assert_eq!(count, 1);
    // The disk holds everything written, flushed or not.
    reopen_and_compare(&bench.files, &model);
    assert_eq!(links(&mut bench, &[], 7).0, 0, "no flush followed");
    bench.flush().expect("a flush");
    assert_eq!(links(&mut bench, &[], 8).0, 0, "two writes to a flush again");
    bench.flush().expect("a flush");
    assert_eq!(links(&mut bench, &[9, 10], 2).0, 0, "nothing to link");
    assert_eq!(bench.early_links, 3, "the first attempt at the data of the last failed");
    assert_eq!(links(&mut bench, &[], 11).0, 0, "the count of what that gave back is not on the disk");
    bench.flush().expect("a flush");
    let (count, model) = links(&mut bench, &[12], 13);
    assert_eq!(count, 1, "what is overwritten counts for nothing");
    reopen_and_compare(&bench.files, &model);
}

macro_rules! model_test {
    ($name:ident, $version:expr, $kinds:expr, $size:expr) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
            #[test]
            fn $name(
                sessions in proptest::collection::vec(operations($kinds[0], $size, 40), 1..3),
                below in operations($kinds[$kinds.len() - 1], $size, 12),
            ) {
                run($version, &$kinds, $size, &sessions, &below);
                run($version, &$kinds, $size, &each_flushed(&sessions), &below);
            }
        }
    };
}

/// The same sessions with a flush after each operation.
fn each_flushed(sessions: &[Vec<Operation>]) -> Vec<Vec<Operation>> {
    let flushed = |session: &Vec<Operation>| {
        session.iter().flat_map(|operation| [*operation, Operation::Flush]).collect()
    };
    sessions.iter().map(flushed).collect()
}

fn operations(kind: Kind, size: u64, count_max: usize) -> BoxedStrategy<Vec<Operation>> {
    let geometry = Geometry { size, cluster_size: kind.cluster_size(), transfer_max: 64 << 10 };
    if kind.extended_l2 {
        sequences_of_parts(geometry, kind.granule_size(), count_max).boxed()
    } else {
        sequences(geometry, count_max).boxed()
    }
}

model_test!(one_image_of_small_clusters, Version::V3, [whole(9)], 300 * 512);
model_test!(one_image_of_several_slices, Version::V3, [whole(9)], 1300 * 512);
model_test!(one_image_version_2, Version::V2, [whole(12)], 100 * 4096 + 512);
model_test!(an_overlay, Version::V3, [whole(12), whole(12)], 100 * 4096);
model_test!(an_overlay_version_2, Version::V2, [whole(12), whole(12)], 100 * 4096);
model_test!(large_over_small_over_large, Version::V3, [whole(14), whole(10), whole(16)], 40 * 16384 + 1536);
model_test!(small_over_large, Version::V3, [whole(9), whole(14), whole(12)], 20 * 16384);
model_test!(subclusters, Version::V3, [parts(14)], 12 * 16384 + 512);
model_test!(subclusters_over_subclusters, Version::V3, [parts(14), parts(14)], 12 * 16384);
model_test!(subclusters_over_larger_ones, Version::V3, [parts(14), parts(16), whole(12)], 12 * 16384 + 1024);
model_test!(subclusters_over_smaller_ones, Version::V3, [parts(15), parts(14), whole(16)], 6 * 32768);
model_test!(data_apart, Version::V3, [apart(whole(12))], 100 * 4096 + 512);
model_test!(data_apart_over_clusters, Version::V3, [apart(whole(9)), whole(12)], 300 * 512);
model_test!(data_apart_in_subclusters, Version::V3, [apart(parts(14)), parts(14)], 12 * 16384 + 1024);
model_test!(clusters_over_subclusters, Version::V3, [whole(10), parts(15)], 5 * 32768);
