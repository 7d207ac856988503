//! The search for leaks after a writer that did not close the image. It reads the tables at a low rate while the
//! guest's I/O continues, and has the engine free clusters that nothing names.
//!
//! Runs on the housekeeper's thread. The engine decides which clusters are leaks (docs/concurrency.md, "The search
//! for leaks"). Damage ends the search and has no other effect.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use engine::bounds::TABLE_SLICE_BYTES_MAX;
use engine::{EngineError, LeakSearch, LeakSearchEnd, LiveTable};
use names::shown;
use qcow2::{Geometry, HostCluster, HostOffset};
use storage::{Errno, Kind, Operation, Part, Storage};
use thiserror::Error;
use tracing::{info, warn};

use crate::error::{OpenError, RequestError};
use crate::image::image_file::ImageFile;
use crate::range::ByteRange;
use crate::runtime::timers::Alarm;
use crate::serve::worker::Worker;

/// Bytes of a table read at a time.
const PIECE: u64 = 64 << 10;
/// Pieces read between two rests.
const PIECES_AT_ONCE: usize = 16;
/// Bytes of a snapshot's L1 table read at a time.
const L1_PIECE: u64 = 1 << 20;
/// The most L2 tables that snapshots may name.
const SNAPSHOT_TABLES_MAX: usize = 1 << 20;
/// A rest takes this many times as long as the reading before it, within the bounds below.
const REST_TIMES: u32 = 2;
const REST_MIN: Duration = Duration::from_millis(1);
const REST_MAX: Duration = Duration::from_millis(200);

/// The pause before checking whether some clusters that were taken back are free.
const ROOM_RETRY: Duration = Duration::from_millis(20);

/// Why a search stops early.
#[derive(Debug, Error)]
enum End {
    /// The disk is being closed, or the search is over.
    #[error("the disk is closed")]
    Stopped,
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Search(#[from] LeakSearchEnd),
    #[error("{0}")]
    Open(Box<OpenError>),
    #[error("{0}")]
    Flush(Box<RequestError>),
    #[error("reading a table at offset {offset}: {source}")]
    Io { offset: HostOffset, source: Errno },
    #[error("the L1 table of a snapshot at offset {0} makes no sense")]
    SnapshotL1(HostOffset),
    #[error("snapshots name more than {SNAPSHOT_TABLES_MAX} L2 tables")]
    ManyTables,
}

/// A piece of an L2 table or of a refblock that may change meanwhile.
#[derive(Clone, Copy)]
struct Piece {
    table: LiveTable,
    /// Its number within the table.
    number: u64,
}

impl<S: Storage> Worker<S> {
    /// True if the last writer left signs of leaks, and they have not been searched for.
    pub async fn has_leaks_to_search(&self) -> bool {
        let leaks = &self.shared.leaks;
        if leaks.half_replayed.load(Ordering::SeqCst) {
            return true;
        }
        if leaks.settled.load(Ordering::SeqCst) || !self.engine().status().searching {
            return false;
        }
        // Where the counts cannot be read now, the next writer looks again.
        Search::new(self).ends_in_free_clusters().await.unwrap_or(true)
    }

    /// Searches for leaks if the last writer of the image did not close it, until the disk is to be closed. A search that
    /// was stopped begins anew if the disk is used on.
    pub async fn search_leaks(&self) {
        let path = shown(&self.shared.layers[0].path);
        if self.shared.bell.stopped() {
            return;
        }
        let mut complete = false;
        if self.engine().status().searching {
            match Search::new(self).run().await {
                Ok(None) => {}
                Ok(Some(clusters)) => {
                    complete = true;
                    let bytes = clusters * self.engine().unit();
                    info!(%path, clusters, bytes, "space that an earlier crash left counted is given back");
                }
                Err(End::Stopped) => return,
                Err(error) => warn!(%path, %error,
                    "the search for space that an earlier crash left counted gives up; \
                     `strata check -r leaks` gives it back while nobody uses the image"),
            }
        }
        self.shared.leaks.settled.store(true, Ordering::SeqCst);
        self.engine().end_leak_search(complete);
    }
}

struct Search<'a, S: Storage> {
    worker: &'a Worker<S>,
    geometry: Geometry,
    /// When the work since the last rest began.
    since: Instant,
    pieces: usize,
}

impl<'a, S: Storage> Search<'a, S> {
    fn new(worker: &'a Worker<S>) -> Self {
        let header = worker.shared.layers[0].header.as_ref().expect("qcow2 images only");
        Search { worker, geometry: header.geometry(), since: worker.driver.now(), pieces: 0 }
    }

    /// Returns how many clusters were taken back; none if there was no need to search.
    async fn run(&mut self) -> Result<Option<u64>, End> {
        if !self.ends_in_free_clusters().await? {
            return Ok(None);
        }
        let path = shown(&self.worker.shared.layers[0].path);
        info!(%path, "the image was not closed by its last writer: space that it left counted is searched for");
        let snapshot_tables = self.snapshot_tables().await?;
        let (mut taken, mut from) = (0, 0);
        while let Some(mut search) = self.worker.engine().leak_search(from) {
            self.count_references(&mut search, &snapshot_tables).await?;
            self.compare(&mut search).await?;
            taken += self.give_back(&mut search).await?;
            from = search.next();
        }
        // The engine may have called the search off.
        if self.worker.engine().status().searching {
            Ok(Some(taken))
        } else {
            Err(LeakSearchEnd::CalledOff.into())
        }
    }

    /// Gives back the leaks that were found, in portions that leave the requests enough of the quarantine.
    async fn give_back(&mut self, search: &mut LeakSearch) -> Result<u64, End> {
        let failed = |error| End::Flush(Box::new(error));
        let mut taken = 0;
        loop {
            let portion = self.worker.engine().give_back_leaks(search)?;
            taken += portion;
            self.worker.shared.note_change();
            if self.worker.engine().wants_cut() {
                self.worker.flush().await.map_err(failed)?;
            }
            // Leaks wait for no cut, so a portion can be reclaimed at once. That makes room for the next one.
            while self.worker.reclaim_some().await.map_err(failed)? {
                self.rest(Duration::ZERO).await?;
            }
            if !search.has_leaks() {
                return Ok(taken);
            }
            self.rest(if portion > 0 { REST_MIN } else { ROOM_RETRY }).await?;
        }
    }

    /// True if the file ends in free clusters: the sign of a writer that did not close the image.
    async fn ends_in_free_clusters(&mut self) -> Result<bool, End> {
        let tail = self.worker.engine().tail_at_open();
        let mut free: HashSet<u64> = tail.clone().collect();
        let entries = self.geometry.refblock_entries();
        let per_piece = self.counts_in_piece();
        let mut cluster = tail.start;
        while cluster < tail.end {
            let first = cluster - cluster % entries % per_piece;
            let piece = Piece {
                table: LiveTable::Refblock(cluster / entries),
                number: cluster % entries / per_piece,
            };
            if let Some(bytes) = self.read(piece).await? {
                let count = |cluster: u64| {
                    qcow2::refcount(self.geometry.refcount_order, &bytes, (cluster - first) as usize)
                };
                free.retain(|cluster| !(first..first + per_piece).contains(cluster) || count(*cluster) == 0);
            }
            cluster = first + per_piece;
        }
        Ok(self.worker.engine().ends_in_free_clusters(|cluster| free.contains(&cluster)))
    }

    /// The number of refcounts in a piece of a refblock.
    fn counts_in_piece(&self) -> u64 {
        (self.piece_bytes() * 8) >> self.geometry.refcount_order
    }

    fn piece_bytes(&self) -> u64 {
        self.geometry.cluster_size().min(PIECE)
    }

    fn pieces_in_table(&self) -> u64 {
        self.geometry.cluster_size() / self.piece_bytes()
    }

    /// The L2 tables that snapshots name, in order, and how many L1 entries name each.
    async fn snapshot_tables(&mut self) -> Result<Vec<(HostCluster, u64)>, End> {
        let mut named: Vec<u64> = Vec::new();
        let mut tables: Vec<(HostCluster, u64)> = Vec::new();
        let shared = &self.worker.shared;
        let (file, info) = (shared.top_image(), &shared.top_image().info);
        let image = ImageFile { driver: &self.worker.driver, id: file.id, info };
        for table in &shared.leaks.snapshot_l1 {
            for piece in ByteRange::from(*table).pieces(L1_PIECE) {
                let read = image.read("L1 table of a snapshot", piece);
                let bytes = read.await.map_err(|error| End::Open(Box::new(error)))?;
                for word in bytes.as_chunks::<8>().0.iter().filter(|word| **word != [0; 8]) {
                    match qcow2::L1Entry::decode(u64::from_be_bytes(*word), &self.geometry) {
                        Ok(qcow2::L1Entry::Table { offset, .. }) => {
                            named.push(self.geometry.host_cluster(offset).0);
                        }
                        _ => return Err(End::SnapshotL1(table.offset)),
                    }
                }
                if named.len() >= SNAPSHOT_TABLES_MAX {
                    merge(&mut tables, &mut named);
                    if tables.len() > SNAPSHOT_TABLES_MAX {
                        return Err(End::ManyTables);
                    }
                }
                self.rest_after(PIECES_AT_ONCE).await?;
            }
        }
        merge(&mut tables, &mut named);
        Ok(tables)
    }

    async fn count_references(
        &mut self,
        search: &mut LeakSearch,
        snapshot_tables: &[(HostCluster, u64)],
    ) -> Result<(), End> {
        self.exclude_metadata(search);
        // Tables created from now on are in clusters that were reserved since the disk was opened.
        let mut from = 0;
        loop {
            let tables = self.worker.engine().active_tables_from(from)?;
            let Some((last, _)) = tables.last() else { break };
            from = last + 1;
            tables.iter().for_each(|(_, cluster)| search.count(*cluster, true, 1));
            if !self.worker.shared.has_data_file() {
                self.count_active(search, tables.iter().map(|(index, _)| *index)).await?;
            }
        }
        for some in snapshot_tables.chunks(PIECES_AT_ONCE) {
            some.iter().for_each(|(cluster, times)| search.count(*cluster, false, *times));
            self.count_snapshot_tables(search, some).await?;
        }
        Ok(())
    }

    fn exclude_metadata(&self, search: &mut LeakSearch) {
        let mut from = search.range().start;
        loop {
            let runs = self.worker.engine().metadata_from(from);
            let Some(last) = runs.last() else { break };
            from = last.run.end().0;
            runs.iter().filter(|run| !run.is_l2).for_each(|run| search.exclude(run.run));
        }
    }

    async fn count_active(
        &mut self,
        search: &mut LeakSearch,
        indices: impl Iterator<Item = u64>,
    ) -> Result<(), End> {
        let per_piece = self.piece_bytes() / self.geometry.l2_entry_size();
        for index in indices {
            for number in 0..self.pieces_in_table() {
                if let Some(bytes) = self.read(Piece { table: LiveTable::L2(index), number }).await? {
                    let first = index * self.geometry.l2_entries() + number * per_piece;
                    search.count_l2(first, &bytes, true, 1)?;
                }
                self.rest_after(1).await?;
            }
        }
        Ok(())
    }

    /// Tables of snapshots stay as they are while the disk is open.
    async fn count_snapshot_tables(
        &mut self,
        search: &mut LeakSearch,
        tables: &[(HostCluster, u64)],
    ) -> Result<(), End> {
        for (cluster, times) in tables {
            for number in 0..self.pieces_in_table() {
                let offset = self.geometry.host_offset(*cluster).0 + number * self.piece_bytes();
                let bytes = self.read_file(HostOffset(offset)).await?;
                search.count_l2(0, &bytes, false, *times)?;
                self.rest_after(1).await?;
            }
        }
        Ok(())
    }

    async fn compare(&mut self, search: &mut LeakSearch) -> Result<(), End> {
        let entries = self.geometry.refblock_entries();
        let per_piece = self.counts_in_piece();
        let range = search.range();
        for block in range.start / entries..range.end.div_ceil(entries) {
            for number in 0..self.pieces_in_table() {
                let first = block * entries + number * per_piece;
                if first >= range.end || first + per_piece <= range.start {
                    continue;
                }
                match self.read(Piece { table: LiveTable::Refblock(block), number }).await? {
                    Some(bytes) => search.compare(first, &bytes)?,
                    // Without a refblock a count is 0, and nothing may name the cluster.
                    None => search.compare(first, &vec![0; self.piece_bytes() as usize])?,
                }
                self.rest_after(1).await?;
            }
        }
        Ok(())
    }

    /// The present contents of a piece of a table; none if there is no such table.
    async fn read(&self, piece: Piece) -> Result<Option<Vec<u8>>, End> {
        // The epoch keeps the table's clusters from reuse while it is read.
        let epoch = self.worker.enter();
        let read = self.read_in_epoch(piece).await;
        self.worker.exit(epoch);
        read
    }

    async fn read_in_epoch(&self, piece: Piece) -> Result<Option<Vec<u8>>, End> {
        let slice_bytes = self.geometry.cluster_size().min(TABLE_SLICE_BYTES_MAX);
        let in_piece = (self.piece_bytes() / slice_bytes) as u32;
        let first = piece.number as u32 * in_piece;
        let Some(seen) = self.worker.engine().look_at_table(piece.table, first..first + in_piece)? else {
            return Ok(None);
        };
        let mut bytes = if seen.slices.iter().all(Option::is_some) {
            vec![0; self.piece_bytes() as usize]
        } else {
            self.read_file(seen.offset).await?
        };
        for (place, slice) in bytes.chunks_mut(seen.slice_bytes).zip(seen.slices) {
            if let Some(slice) = slice {
                place.copy_from_slice(&slice);
            }
        }
        Ok(Some(bytes))
    }

    /// A piece of the file.
    async fn read_file(&self, offset: HostOffset) -> Result<Vec<u8>, End> {
        let mut operation = Operation::bare(self.worker.shared.top_file(), Kind::Read, offset.0);
        operation.parts.push(Part::Owned(self.worker.buffer(self.piece_bytes() as usize)));
        let (ended, parts) = self.worker.driver.run(operation).await;
        let read = match (&ended, parts.first()) {
            (Ok(()), Some(Part::Owned(buffer))) => Ok(buffer.as_slice().to_vec()),
            _ => Err(End::Io { offset, source: ended.err().unwrap_or(Errno::EIO) }),
        };
        self.worker.driver.recycle(parts);
        read
    }

    /// Counts pieces that were read, and rests after every [`PIECES_AT_ONCE`] of them.
    async fn rest_after(&mut self, pieces: usize) -> Result<(), End> {
        self.pieces += pieces;
        if self.pieces < PIECES_AT_ONCE {
            return Ok(());
        }
        self.pieces = 0;
        let worked = self.worker.driver.now().saturating_duration_since(self.since);
        let rest = (worked * REST_TIMES).clamp(REST_MIN, REST_MAX);
        self.rest(rest).await?;
        self.since = self.worker.driver.now();
        Ok(())
    }

    /// Leaves the disk to other work for a time.
    async fn rest(&self, rest: Duration) -> Result<(), End> {
        let (bell, driver) = (&self.worker.shared.bell, &self.worker.driver);
        let mut alarm = driver.alarm(driver.now() + rest);
        poll_fn(|context| {
            if bell.stopped() || Alarm::is_over(&alarm) {
                return Poll::Ready(());
            }
            alarm.wake(context.waker());
            Poll::Pending
        })
        .await;
        if bell.stopped() || self.worker.engine().has_failed() {
            return Err(End::Stopped);
        }
        if !self.worker.engine().status().searching {
            return Err(LeakSearchEnd::CalledOff.into());
        }
        Ok(())
    }
}

/// Merges clusters, unordered and with repetitions, into those that are counted.
fn merge(tables: &mut Vec<(HostCluster, u64)>, named: &mut Vec<u64>) {
    tables.extend(named.drain(..).map(|cluster| (HostCluster(cluster), 1)));
    tables.sort_unstable_by_key(|(cluster, _)| *cluster);
    tables.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        if same {
            kept.1 += next.1;
        }
        same
    });
}
