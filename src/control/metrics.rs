//! The counters in the text format of OpenMetrics.
//!
//! Nothing is kept here: each text is made of one set of answers.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{Counters, DiskState, Frontend, Layer, Stats};

/// The content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics.
pub fn text(disk: &DiskState, layers: &[Layer], stats: &Stats) -> String {
    let mut registry = Registry::with_prefix("strata");
    let source = Source { disk: disk.clone(), layers: layers.to_vec(), stats: stats.clone() };
    registry.register_collector(Box::new(source));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a string takes every text");
    text
}

#[derive(Debug)]
struct Source {
    disk: DiskState,
    layers: Vec<Layer>,
    stats: Stats,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabels {
    queue: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    queue: u16,
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LayerLabels {
    layer: usize,
    file: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FileLabels {
    file: String,
}

impl Collector for Source {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.requests(&mut encoder)?;
        self.queues(&mut encoder)?;
        self.space(&mut encoder)?;
        self.metadata(&mut encoder)?;
        self.disk(&mut encoder)?;
        self.chain(&mut encoder)
    }
}

impl Source {
    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.per_operation(encoder, "requests", "Requests done, without those that failed", None, |of| {
            named([
                of.rd_operations,
                of.wr_operations,
                of.flush_operations,
                of.unmap_operations,
                of.write_zeroes_operations,
                of.other_operations,
            ])
        })?;
        self.per_operation(encoder, "request_errors", "Requests that failed", None, |of| {
            named([
                of.failed_rd_operations,
                of.failed_wr_operations,
                of.failed_flush_operations,
                of.failed_unmap_operations,
                of.failed_write_zeroes_operations,
                of.failed_other_operations,
            ])
        })?;
        let moved = "Bytes of reads and writes that did not fail";
        self.per_operation(encoder, "request", moved, Some(&Unit::Bytes), |of| {
            named([of.rd_bytes, of.wr_bytes])
        })
    }

    fn per_operation(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl Fn(&Counters) -> Vec<(&'static str, u64)>,
    ) -> fmt::Result {
        let samples = self.stats.queues.iter().flat_map(|of| {
            let labels = |operation| OperationLabels { queue: of.queue, operation };
            let named = values(&of.counters).into_iter();
            named.map(move |(operation, value)| (labels(operation), ConstCounter::new(value)))
        });
        family(encoder, (name, help, unit), samples)
    }

    fn queues(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut each = |name, help, value: fn(&Counters) -> u64| {
            let samples = self
                .stats
                .queues
                .iter()
                .map(|of| (QueueLabels { queue: of.queue }, ConstCounter::new(value(&of.counters))));
            family(encoder, (name, help, None), samples)
        };
        each("malformed_chains", "Chains without a usable status byte", |of| of.malformed)?;
        each("ring_errors", "Times a ring was corrupt or its thread failed", |of| of.ring_errors)?;
        each("interrupts", "Interrupts sent", |of| of.interrupts)?;
        each("sleeps", "Times the thread of a queue went to sleep", |of| of.sleeps)?;
        let samples = self.stats.queues.iter().map(|of| {
            let labels = QueueLabels { queue: of.queue };
            (labels, ConstGauge::new(i64::from(of.in_flight)))
        });
        family(encoder, ("requests_in_flight", "Requests in flight", None), samples)
    }

    fn space(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let waiting = gauge(self.stats.space_waiting);
        single(encoder, ("space_waiting", "Requests that wait for space on the host", None), waiting)?;
        let waited = ConstCounter::new(self.stats.space_waited);
        let help = "Requests that have waited for space since the image was opened";
        single(encoder, ("space_waits", help, None), waited)
    }

    fn metadata(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(metadata) = &self.stats.metadata else { return Ok(()) };
        let bytes = Some(&Unit::Bytes);
        single(encoder, ("map", "Memory of the map of clusters", bytes), gauge(metadata.map_bytes))?;
        let help = "Metadata that is not durable yet, about";
        single(encoder, ("dirty_metadata", help, bytes), gauge(metadata.dirty_bytes))?;
        let help = "Freed clusters that cannot be used again yet";
        single(encoder, ("quarantined_clusters", help, None), gauge(metadata.quarantined_clusters))?;
        let help = "Clusters that are reserved for coming writes";
        single(encoder, ("reserved_clusters", help, None), gauge(metadata.reserved_clusters))?;
        let help = "Times that metadata was made durable since the image was opened";
        single(encoder, ("metadata_cuts", help, None), ConstCounter::new(metadata.cuts))
    }

    fn disk(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let disk = &self.disk;
        let labels = FileLabels { file: disk.filename.clone() };
        let size = [(labels, gauge(disk.virtual_size))];
        family(encoder, ("disk_size", "Size of the disk", Some(&Unit::Bytes)), size.into_iter())?;
        let mut yes = |name, help, value: bool| single(encoder, (name, help, None), gauge(value.into()));
        yes("disk_open", "The image is open here", disk.open)?;
        yes("disk_failed", "Every later write and flush fails", disk.failed)?;
        yes("image_corrupt", "Damage was found while the image was in use", disk.corrupt)?;
        yes("frontend_attached", "A frontend is attached", disk.frontend == Frontend::Attached)
    }

    fn chain(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        if self.layers.is_empty() {
            return Ok(());
        }
        single(encoder, ("chain_layers", "Layers of the disk", None), gauge(self.layers.len() as u64))?;
        let samples = self.layers.iter().enumerate().filter_map(|(layer, of)| {
            Some((LayerLabels { layer, file: of.filename.clone() }, gauge(of.actual_size?)))
        });
        let help = "Bytes that the host has allocated for a layer, the top image being 0";
        family(encoder, ("layer_allocated", help, Some(&Unit::Bytes)), samples)
    }
}

/// The operations that have labels, in the order in which [`named`] takes their values.
const OPERATIONS: [&str; 6] = ["read", "write", "flush", "discard", "write_zeroes", "other"];

/// The values of the first `N` operations, with their names.
fn named<const N: usize>(values: [u64; N]) -> Vec<(&'static str, u64)> {
    OPERATIONS.into_iter().zip(values).collect()
}

/// A gauge takes no more than an `i64`.
fn gauge(value: u64) -> ConstGauge {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

/// A metric with one sample.
fn single(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<&Unit>),
    metric: impl EncodeMetric,
) -> fmt::Result {
    let encoder = encoder.encode_descriptor(name, help, unit, metric.metric_type())?;
    metric.encode(encoder)
}

/// A metric with a sample for each set of labels; none at all without samples.
fn family<L: EncodeLabelSet, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, unit): (&str, &str, Option<&Unit>),
    samples: impl Iterator<Item = (L, M)>,
) -> fmt::Result {
    let mut samples = samples.peekable();
    let Some((_, first)) = samples.peek() else { return Ok(()) };
    let mut encoder = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
    for (labels, metric) in samples {
        metric.encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Format, QueueStats};

    #[test]
    fn names_labels_and_values_are_in_the_text() {
        let disk = DiskState {
            filename: "a\"b\n".to_owned(),
            virtual_size: 1 << 20,
            ro: false,
            open: true,
            failed: false,
            corrupt: false,
            paused: false,
            frontend: Frontend::Attached,
            num_queues: 2,
        };
        let layer = Layer {
            filename: "top".to_owned(),
            format: Format::Qcow2,
            virtual_size: 1 << 20,
            actual_size: Some(4096),
            cluster_size: Some(65536),
            data_file: None,
        };
        let counters =
            Counters { rd_operations: 7, rd_bytes: 512, failed_wr_operations: 1, ..Counters::default() };
        let stats = Stats {
            queues: vec![QueueStats { queue: 3, in_flight: 2, counters }],
            space_waited: 5,
            ..Stats::default()
        };
        let text = text(&disk, &[layer], &stats);
        for line in [
            "strata_requests_total{queue=\"3\",operation=\"read\"} 7\n",
            "strata_request_bytes_total{queue=\"3\",operation=\"read\"} 512\n",
            "strata_request_errors_total{queue=\"3\",operation=\"write\"} 1\n",
            "strata_requests_in_flight{queue=\"3\"} 2\n",
            "strata_space_waits_total 5\n",
            "strata_disk_size_bytes{file=\"a\\\"b\\n\"} 1048576\n",
            "strata_frontend_attached 1\n",
            "strata_layer_allocated_bytes{layer=\"0\",file=\"top\"} 4096\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(!text.contains("map_bytes") && text.ends_with("# EOF\n"), "{text}");
    }
}
