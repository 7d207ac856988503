//! A daemon's answers as people read them.

use std::fmt::Write as _;

use control::api::{
    Chain, Counters, DiskState, Event, Format, Frontend, QueueStats, Resized, SnapshotTaken, Stats,
};
use names::shown;

use crate::size;

/// The disk, a fact a line.
pub fn disk(disk: &DiskState) -> String {
    let frontend = match disk.frontend {
        Frontend::Waiting => "waiting for one",
        Frontend::Attached => "attached",
        Frontend::Draining => "left; its requests are being finished",
    };
    let state = match disk {
        DiskState { failed: true, .. } => "failed: every later write and flush fails",
        DiskState { corrupt: true, .. } => "damaged: see the log, and `strata check`",
        DiskState { paused: true, .. } => "paused: requests wait until `strata ctl SOCKET resume`",
        DiskState { open: false, .. } => "not open here: another process may have the image",
        _ => "in order",
    };
    let access = if disk.ro { "read-only" } else { "writable" };
    let size = size::short(disk.virtual_size);
    format!(
        "image     {}\nsize      {size} ({} bytes)\naccess    {access}\nstate     {state}\nfrontend  {frontend}\n\
         queues    {} offered\n",
        shown(&disk.filename),
        disk.virtual_size,
        disk.num_queues
    )
}

/// The outcome of a snapshot.
pub fn snapshot(taken: &SnapshotTaken) -> String {
    let (top, below) = (shown(&taken.filename), shown(&taken.backing_filename));
    format!("{top} is the top image now; {below} has the disk as it was, and is only read\n")
}

/// The outcome of a resize.
pub fn resized(resized: &Resized) -> String {
    let told = match resized {
        Resized { frontend_told: true, .. } => "; the frontend has been told",
        Resized { previous_size, virtual_size, .. } if previous_size != virtual_size => {
            "; the guest sees it when its device starts anew"
        }
        _ => "",
    };
    let (now, before) = (size::in_words(resized.virtual_size), size::in_words(resized.previous_size));
    format!("the disk has {now} now, {before} before{told}\n")
}

/// The layers, the top image first.
pub fn chain(chain: &Chain) -> String {
    let mut rows = vec![["layer", "format", "size", "allocated", "cluster", "file"].map(str::to_owned)];
    for (index, layer) in chain.layers.iter().enumerate() {
        let format = if layer.format == Format::Qcow2 { "qcow2" } else { "raw" };
        let optional = |bytes: Option<u64>| bytes.map_or("-".to_owned(), size::short);
        let data = layer.data_file.as_ref();
        let data = data.map_or(String::new(), |file| format!(" (its data in {})", shown(file)));
        rows.push([
            index.to_string(),
            format.to_owned(),
            size::short(layer.virtual_size),
            optional(layer.actual_size),
            optional(layer.cluster_size),
            format!("{}{data}", shown(&layer.filename)),
        ]);
    }
    table(&rows)
}

/// The counters, a line for each queue, then the rest.
pub fn stats(stats: &Stats) -> String {
    let heads =
        ["queue", "busy", "reads", "writes", "flushes", "discards", "zeroes", "read", "written", "failed"];
    let mut rows = vec![heads.map(str::to_owned)];
    let mut in_flight = 0;
    for QueueStats { queue, in_flight: own, counters } in &stats.queues {
        in_flight += own;
        rows.push(row(&queue.to_string(), *own, counters));
    }
    rows.push(row("all", in_flight, &stats.total));
    let mut text = table(&rows);
    let _ = writeln!(
        text,
        "\nwaiting for space  {} now, {} since the image was opened",
        stats.space_waiting, stats.space_waited
    );
    if let Some(metadata) = &stats.metadata {
        let _ = writeln!(
            text,
            "map                {}\nmetadata           {} not durable yet, made durable {} times\nclusters           {} \
             freed and held back, {} reserved",
            size::short(metadata.map_bytes),
            size::short(metadata.dirty_bytes),
            metadata.cuts,
            metadata.quarantined_clusters,
            metadata.reserved_clusters
        );
    }
    text
}

fn row(queue: &str, in_flight: u32, of: &Counters) -> [String; 10] {
    let failed = of.failed_rd_operations
        + of.failed_wr_operations
        + of.failed_flush_operations
        + of.failed_unmap_operations
        + of.failed_write_zeroes_operations
        + of.failed_other_operations;
    [
        queue.to_owned(),
        in_flight.to_string(),
        of.rd_operations.to_string(),
        of.wr_operations.to_string(),
        of.flush_operations.to_string(),
        of.unmap_operations.to_string(),
        of.write_zeroes_operations.to_string(),
        size::short(of.rd_bytes),
        size::short(of.wr_bytes),
        failed.to_string(),
    ]
}

/// An event, on a line.
pub fn event(event: &Event) -> String {
    let name = serde_json::to_value(event.event).ok();
    let name = name.as_ref().and_then(|name| name.as_str()).unwrap_or_default();
    let waiting = event.data.waiting.map_or(String::new(), |count| format!(" waiting {count}"));
    let at = event.timestamp;
    format!("{}.{:06} {name}{waiting}\n", at.seconds, at.microseconds)
}

/// Columns as wide as their longest field, the last one as long as it is.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, field) in widths.iter_mut().zip(row) {
            *width = field.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let fields = row.iter().zip(widths).map(|(field, width)| format!("{field:<width$}"));
        text += fields.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::api::Layer;

    #[test]
    fn names_of_images_cannot_control_the_terminal() {
        let layer = Layer {
            filename: "a\x1b[2J\nb".to_owned(),
            format: Format::Qcow2,
            virtual_size: 1 << 30,
            actual_size: None,
            cluster_size: Some(65536),
            data_file: None,
        };
        let text = chain(&Chain { layers: vec![layer] });
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(!text.contains('\x1b') && text.contains("64 KiB") && text.contains("1 GiB"), "{text}");
    }

    #[test]
    fn failures_of_every_kind_are_summed() {
        let total = Counters { failed_rd_operations: 1, failed_other_operations: 2, ..Counters::default() };
        let text = stats(&Stats { total, ..Stats::default() });
        let all = text.lines().find(|line| line.starts_with("all")).expect("a sum");
        assert!(all.ends_with(" 3"), "{text}");
    }
}
