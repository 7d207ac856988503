//! Images in which the checker finds nothing but leaks: every operation must leave them so.

use disk::check::{FindingKind, Report, Verdict};
use qcow2::{Header, entry, refblock_offset, refcount};
use storage_sim::SimWorld;

use super::host::checked;

/// A sound image, as it was.
pub struct Sound {
    /// The checker's report.
    pub report: Report,
    /// Clusters past the end of the file with a refcount: they become leaks when the file grows there.
    hidden: u64,
    /// A cluster is referenced more than once, but by no snapshot: by two entries, or by an entry and a compressed
    /// cluster. When one reference goes, the other cannot be found, so its flag COPIED stays clear, as with QEMU.
    /// This costs a copy.
    shares: bool,
}

impl Sound {
    /// The image with these bytes, if it is sound.
    pub fn of(world: &SimWorld, file: &[u8]) -> Option<Sound> {
        let report = checked(world).ok()?;
        let sound = report.verdict() != Verdict::Corrupt && report.notes == 0;
        sound.then(|| {
            let counts = counts(file);
            let end = counts.end;
            let hidden = counts.of.iter().filter(|(cluster, count)| *cluster >= end && *count != 0).count();
            let shares = !counts.snapshots && counts.of.iter().any(|(_, count)| *count > 1);
            Sound { report, hidden: hidden as u64, shares }
        })
    }

    /// Checks the image again.
    ///
    /// # Panics
    /// If it is worse than before.
    pub fn judge(&self, world: &SimWorld, what: &str) {
        let (before, after) = (&self.report, checked(world).expect("it can be checked as before"));
        let leaks_max = before.leaked_clusters + self.hidden;
        let shy = after.findings.iter().filter(|finding| self.shares && is_shy(&finding.kind)).count() as u64;
        let sound = after.corruptions + after.notes == shy && after.leaked_clusters <= leaks_max;
        assert!(sound, "{what}: {before:#?}\nbecame\n{after:#?}\nwith {} leaks hidden", self.hidden);
    }
}

/// A clear flag COPIED at a cluster that is not shared.
fn is_shy(kind: &FindingKind) -> bool {
    matches!(kind, FindingKind::Copied { raw, refcount: 1, .. } if raw >> 63 == 0)
}

/// The refcounts of an image.
#[derive(Default)]
struct Counts {
    /// Cluster numbers with their refcounts.
    of: Vec<(u64, u64)>,
    /// The first cluster past the end of the file.
    end: u64,
    /// It has internal snapshots.
    snapshots: bool,
}

fn counts(file: &[u8]) -> Counts {
    let Ok(header) = Header::parse(file, file.len() as u64) else { return Counts::default() };
    let geometry = header.geometry();
    let (size, entries) = (geometry.cluster_size() as usize, geometry.refblock_entries());
    let table = file.get(header.refcount_table_offset.0 as usize..).unwrap_or_default();
    let table = &table[..table.len().min(header.refcount_table_clusters as usize * size)];
    let mut of = Vec::new();
    for block in 0..table.len() / 8 {
        let Ok(Some(offset)) = refblock_offset(entry(table, block), &geometry) else { continue };
        let Some(bytes) = file.get(offset.0 as usize..) else { continue };
        // The end of the file may truncate the block.
        let mut bytes = bytes[..bytes.len().min(size)].to_vec();
        bytes.resize(size, 0);
        let counted =
            (0..entries).map(|index| (index, refcount(geometry.refcount_order, &bytes, index as usize)));
        let used = counted.filter(|(_, count)| *count != 0);
        of.extend(used.map(|(index, count)| (block as u64 * entries + index, count)));
    }
    Counts { of, end: geometry.clusters_for(file.len() as u64), snapshots: header.snapshots != 0 }
}
