//! Images in which the checker finds nothing but leaks: what is done to such a one must leave it so.

use disk::check::{Report, Verdict};
use qcow2::{Header, entry, refblock_offset, refcount};
use storage::sim::SimWorld;

use super::host::checked;

/// Such an image, as it was.
pub struct Sound {
    /// What the checker said.
    pub report: Report,
    /// Clusters past the end of the file that are counted: they become leaks when the file grows there.
    hidden: u64,
}

impl Sound {
    /// The image with these bytes, if it is sound.
    pub fn of(world: &SimWorld, file: &[u8]) -> Option<Sound> {
        let report = checked(world).ok()?;
        let sound = report.verdict() != Verdict::Corrupt && report.notes == 0;
        sound.then(|| Sound { report, hidden: counted_past_end(file) })
    }

    /// Checks the image again.
    ///
    /// # Panics
    /// If it is worse.
    pub fn judge(&self, world: &SimWorld, what: &str) {
        let (before, after) = (&self.report, checked(world).expect("it can be checked as before"));
        let leaks_max = before.leaked_clusters + self.hidden;
        let sound = after.corruptions + after.notes == 0 && after.leaked_clusters <= leaks_max;
        assert!(sound, "{what}: {before:#?}\nbecame\n{after:#?}\nwith {} leaks hidden", self.hidden);
    }
}

fn counted_past_end(file: &[u8]) -> u64 {
    let Ok(header) = Header::parse(file, file.len() as u64) else { return 0 };
    let geometry = header.geometry();
    let (size, entries) = (geometry.cluster_size() as usize, geometry.refblock_entries());
    let end = geometry.clusters_for(file.len() as u64);
    let table = file.get(header.refcount_table_offset.0 as usize..).unwrap_or_default();
    let table = &table[..table.len().min(header.refcount_table_clusters as usize * size)];
    let mut counted = 0;
    for block in 0..table.len() / 8 {
        let Ok(Some(offset)) = refblock_offset(entry(table, block), &geometry) else { continue };
        let Some(bytes) = file.get(offset.0 as usize..) else { continue };
        // The end of the file may cut it.
        let mut bytes = bytes[..bytes.len().min(size)].to_vec();
        bytes.resize(size, 0);
        let past = (0..entries).filter(|index| block as u64 * entries + index >= end);
        let used = past.filter(|index| refcount(geometry.refcount_order, &bytes, *index as usize) != 0);
        counted += used.count() as u64;
    }
    counted
}
