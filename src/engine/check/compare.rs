//! Judges the counts: metadata that overlaps something else, and refcounts that are too low or too high.
//!
//! Owns the judgements that need all references. It reads nothing from the file.

use super::report::{FindingKind, ImagePart};
use super::walk::Walk;

impl Walk {
    /// Reports metadata that shares a cluster with something else. This runs before the refcount structure is counted,
    /// so an overlap of that structure is reported as its own fault.
    pub fn find_overlaps(&mut self) {
        let size = self.geometry.cluster_size();
        for place in &self.places {
            for cluster in place.run.clusters() {
                let references = self.references.get(cluster);
                if references > 1 {
                    let kind = FindingKind::Overlap { part: place.part, references };
                    self.report.add(cluster * size, kind);
                }
            }
        }
        // Many L1 tables may name an L2 table, but nothing else may.
        for (cluster, times) in &self.l2 {
            let references = self.references.get(*cluster);
            if references != times.all() {
                self.report.add(cluster * size, FindingKind::Overlap { part: ImagePart::L2, references });
            }
        }
    }

    /// Compares all refcounts with the references. This is the last judgement.
    pub fn compare(&mut self) {
        let size = self.geometry.cluster_size();
        for place in &self.refcount_places {
            for cluster in place.run.clusters() {
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
            // A table that ends at the end of the file may name the cluster behind it. Otherwise the refcount of that
            // cluster does not matter.
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
