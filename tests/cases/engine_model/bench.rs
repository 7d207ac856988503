//! An engine with its files as byte vectors, and what the tests carry out on them.

use std::sync::atomic::Ordering;
use std::task::Waker;

use engine::{
    Answer, Engine, EngineError, EngineSpec, Extent, FileIndex, FlushStep, LayerFormat, LayerSpec, Mapping,
    Source, TableSlot, TopSpec, Turn, WritePlan, ZeroMode, Zeroed,
};
use qcow2::{
    GuestCluster, GuestOffset, Header, HostCluster, HostOffset, L1Entry, L2Entry, NewImage, RawL2Entry,
    Subcluster, Version,
};
use strata_kit::ByteModel;
use strata_kit::model::{Operation, contents};

/// A chain as byte vectors. The top image is file 0; its external data file, if any, is the last.
#[derive(Clone)]
pub struct Files(pub Vec<Vec<u8>>);

impl Files {
    pub fn read(&self, file: FileIndex, offset: u64, length: u64) -> Vec<u8> {
        let bytes = &self.0[usize::from(file.0)];
        let mut out = vec![0; length as usize];
        let start = (offset as usize).min(bytes.len());
        let end = ((offset + length) as usize).min(bytes.len());
        out[..end - start].copy_from_slice(&bytes[start..end]);
        out
    }

    /// The file that holds the top image's data.
    pub fn data(&self) -> FileIndex {
        let last = self.0.len() - 1;
        FileIndex(if header(&self.0[0]).has_data_file() { last as u16 } else { 0 })
    }

    /// Writes to the file that holds the top image's data. An external file stays as long as the disk.
    pub fn write_data(&mut self, offset: u64, data: &[u8]) {
        let file = self.data();
        if file == FileIndex(0) {
            return self.write(offset, data);
        }
        self.0[usize::from(file.0)][offset as usize..offset as usize + data.len()].copy_from_slice(data);
    }

    /// Writes to the top image's file.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.0[0].len() < end {
            self.0[0].resize(end, 0);
        }
        self.0[0][offset as usize..end].copy_from_slice(data);
    }
}

/// The kind of a layer's clusters.
#[derive(Clone, Copy)]
pub struct Kind {
    pub cluster_bits: u32,
    pub extended_l2: bool,
    /// The data is in an external file. Only the top image may have one.
    pub apart: bool,
}

/// Clusters of this many bits.
pub const fn whole(cluster_bits: u32) -> Kind {
    Kind { cluster_bits, extended_l2: false, apart: false }
}

/// Clusters of this many bits, with subclusters.
pub const fn parts(cluster_bits: u32) -> Kind {
    Kind { extended_l2: true, ..whole(cluster_bits) }
}

/// The same kind with the data in an external file.
pub const fn apart(kind: Kind) -> Kind {
    Kind { apart: true, ..kind }
}

impl Kind {
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn granule_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / 32 } else { self.cluster_size() }
    }
}

/// An empty image, or an overlay.
pub fn image(version: Version, kind: Kind, size: u64, overlay: bool) -> Vec<u8> {
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

pub fn table(bytes: &[u8], offset: u64, entries: u64) -> Vec<u64> {
    let files = Files(vec![bytes.to_vec()]);
    let raw = files.read(FileIndex(0), offset, entries * 8);
    (0..entries as usize).map(|index| qcow2::entry(&raw, index)).collect()
}

pub fn header(bytes: &[u8]) -> Header {
    let cluster = Header::cluster_size_hint(bytes).expect("a header") as usize;
    Header::parse(&bytes[..cluster.min(bytes.len())], bytes.len() as u64).expect("a header")
}

/// The engine and its files.
pub struct Bench {
    pub engine: Engine,
    pub files: Files,
    /// Number of early commits.
    pub early_links: u32,
}

impl Bench {
    pub fn open(files: Files) -> Self {
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
    pub fn ask<T>(
        &mut self,
        question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, EngineError> {
        self.ask_in_turn(&Turn::default(), question)
    }

    /// The same for a question with a turn, which is over then.
    pub fn ask_in_turn<T>(
        &mut self,
        turn: &Turn,
        question: impl FnMut(&Engine, &Waker) -> Result<Answer<T>, EngineError>,
    ) -> Result<T, EngineError> {
        let answer = self.ask_until_ready(turn, question);
        self.engine.end_turn(turn);
        answer
    }

    pub fn ask_until_ready<T>(
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

    pub fn make_table(&mut self, slot: TableSlot) -> Result<(), EngineError> {
        let turn = Turn::default();
        let plan = self.ask_in_turn(&turn, |engine, waker| engine.plan_table(slot, &turn, waker))?;
        if let Some(plan) = plan {
            self.engine.commit_table(plan);
        }
        Ok(())
    }

    pub fn reserve(&mut self, turn: &Turn) -> Result<(), EngineError> {
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

    pub fn flush(&mut self) -> Result<(), EngineError> {
        let ticket = self.engine.begin_flush()?;
        while let FlushStep::Lead(cut) = self.engine.plan_flush(ticket, Waker::noop())? {
            // Bytes past the end of a file read as zero here, so there is nothing to do for its length.
            if let Some(length) = cut.lengthen {
                self.engine.file_was_lengthened(Some(length));
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
            let punched: Vec<bool> = plan.punches.iter().map(|run| run.offset.0 % 3 != 0).collect();
            for (run, punched) in plan.punches.iter().zip(&punched) {
                let bytes = vec![if *punched { 0 } else { 0xee }; run.length as usize];
                self.files.write(run.offset.0, &bytes);
            }
            self.engine.commit_reclaim(plan, &punched);
        }
        Ok(())
    }

    pub fn extents(&mut self, offset: u64, length: u64) -> Vec<Extent> {
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

    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
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
    pub fn agree_with_map(&self, offset: u64, bytes: &[u8]) {
        let within = offset % self.engine.unit();
        let length = (self.engine.unit() - within).min(bytes.len() as u64);
        let found = match self.engine.lookup(GuestOffset(offset)) {
            Mapping::Zero => vec![0; length as usize],
            Mapping::Data { file, offset, .. } => self.files.read(file, offset.0 + within, length),
            Mapping::Subclusters => return self.agree_with_parts(offset, within, bytes),
            Mapping::Mixed | Mapping::Unresolved => return,
        };
        assert!(found == bytes[..length as usize], "the map and the tables differ at {offset:#x}");
    }

    /// As [`Bench::agree_with_map`], for the first subcluster.
    pub fn agree_with_parts(&self, offset: u64, within: u64, bytes: &[u8]) {
        let cluster = self.engine.lookup_subclusters(GuestOffset(offset)).expect("nobody changes the map");
        let size = self.engine.unit() / 32;
        let length = (size - within % size).min(bytes.len() as u64);
        let found = match cluster.subclusters.at((within / size) as u32).0 {
            Subcluster::Zero => vec![0; length as usize],
            Subcluster::Data => self.files.read(cluster.file, cluster.offset.0 + within, length),
            Subcluster::Unallocated => return,
        };
        assert!(found == bytes[..length as usize], "the map and the tables differ at {offset:#x}");
    }

    /// Checks that no entry on the disk refers to a host cluster about to be written. An entry of another guest cluster
    /// is never allowed. One of the same guest cluster is forbidden if `by_nobody`, which holds after an early commit
    /// whose data could not be written. A cut may have removed that link.
    pub fn check_unnamed(&self, host: HostOffset, guest: u64, by_nobody: bool) {
        let header = header(&self.files.0[0]);
        let geometry = header.geometry();
        let (host, guest) = (geometry.host_cluster(host), geometry.guest_cluster(GuestOffset(guest)));
        for (owner, named) in data_clusters(&self.files.0[0], &header) {
            let named_here = geometry.host_cluster(named) == host;
            assert!(!named_here || (owner == guest && !by_nobody), "{owner:?} on the disk names {named:?}");
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), EngineError> {
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
                            drop(new);
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

    pub fn zero(&mut self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), EngineError> {
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
            at += match self.ask(|engine, waker| engine.apply_zero(GuestOffset(at), left, mode, waker))? {
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

    pub fn apply(&mut self, operation: &Operation, model: &mut ByteModel) {
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
pub fn l2_tables(bytes: &[u8], header: &Header) -> Vec<(u64, HostOffset)> {
    let geometry = header.geometry();
    let l1 = table(bytes, header.l1_offset.0, u64::from(header.l1_entries));
    let place = |(index, raw)| match L1Entry::decode(raw, &geometry).expect("aligned") {
        L1Entry::Table { offset, .. } => Some((index, offset)),
        L1Entry::Unallocated => None,
    };
    (0..).zip(l1).filter_map(place).collect()
}

/// The host clusters in the image file that its entries refer to, each with the guest cluster of the entry.
pub fn data_clusters(bytes: &[u8], header: &Header) -> Vec<(GuestCluster, HostOffset)> {
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
/// image without snapshots must be referenced once. Returns the leaks: clusters that are counted and not referenced.
pub fn check_references(bytes: &[u8]) -> Vec<usize> {
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
    let mut leaks = Vec::new();
    for (cluster, count) in references.into_iter().enumerate() {
        let block = HostCluster(cluster as u64).0 / geometry.refblock_entries();
        let offset =
            blocks.get(block as usize).map(|raw| qcow2::refblock_offset(*raw, &geometry).expect("aligned"));
        let Some(offset) = offset.flatten() else {
            assert_eq!(count, 0, "cluster {cluster:#x} is in use without a refblock");
            continue;
        };
        let index = cluster as u64 % geometry.refblock_entries();
        let start = offset.0 as usize;
        let refcount =
            qcow2::refcount(4, &bytes[start..start + geometry.cluster_size() as usize], index as usize);
        assert!(count <= 1, "cluster {cluster:#x} is used {count} times");
        assert!(count == 0 || refcount == 1, "cluster {cluster:#x} is in use with refcount {refcount}");
        if refcount > count {
            leaks.push(cluster);
        }
    }
    leaks
}
