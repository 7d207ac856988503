//! What the counts mean: metadata that something else lies upon, refcounts that are too low or too high.
//!
//! Owns the judgements that need all references. It reads nothing.

use super::report::{FindingKind, Part};
use super::walk::Walk;

impl Walk {
    /// Metadata must have its clusters for itself. Asked before the refcount structure is counted, so that one that
    /// lies upon something is found as its own fault.
    pub fn find_overlaps(&mut self) {
        let size = self.geometry.cluster_size();
        for place in &self.places {
            for cluster in place.first..place.first + place.count {
                let references = self.references.get(cluster);
                if references > 1 {
                    let kind = FindingKind::Overlap { part: place.part, references };
                    self.report.add(cluster * size, kind);
                }
            }
        }
        // An L2 table may be named by many L1 tables, but by nothing else.
        for (cluster, times) in &self.l2 {
            let references = self.references.get(*cluster);
            if references != times.all() {
                self.report.add(cluster * size, FindingKind::Overlap { part: Part::L2, references });
            }
        }
    }

    /// The last judgement.
    pub fn compare(&mut self) {
        let size = self.geometry.cluster_size();
        for place in &self.refcount_places {
            for cluster in place.first..place.first + place.count {
                let references = self.references.get(cluster);
                if references > 1 {
                    let kind = FindingKind::Overlap { part: place.part, references };
                    self.report.add(cluster * size, kind);
                }
            }
        }
        let max = qcow2::refcount_max(self.geometry.refcount_order);
        for cluster in self.references.touched(&self.recorded) {
            let (recorded, references) = (self.recorded.get(cluster), self.references.get(cluster));
            if references > max {
                self.report.add(cluster * size, FindingKind::RefcountOverflow { references, max });
            }
            // The cluster behind the file may be named by a table that ends there. If it is not, nobody asks for its
            // refcount.
            if references == 0 && (recorded == 0 || cluster >= self.clusters) {
                continue;
            }
            self.report.image_end_offset = (cluster + 1) * size;
            if recorded > references {
                self.report.add(cluster * size, FindingKind::Leak { recorded, references });
            } else if recorded < references.min(max) {
                self.report.add(cluster * size, FindingKind::RefcountTooLow { recorded, references });
            }
        }
    }
}
