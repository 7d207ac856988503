//! The summary at the end: steps with their times, requests by kind, space used and given back.
//!
//! Owns layout and units. It prints nothing: it returns text, which is readable without colours too.

use crate::stand::Requests;
use crate::steps::{Colours, StepTime};
use std::time::Duration;

/// Columns of the longest bar.
const BAR: usize = 36;

/// A bar for `value` on a scale up to `most`, in eighths of a column, padded to the full width.
pub fn bar(value: f64, most: f64) -> String {
    let share = if most > 0.0 { (value / most).clamp(0.0, 1.0) } else { 0.0 };
    let eighths = (share * BAR as f64 * 8.0).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        text.push(['▏', '▎', '▍', '▌', '▋', '▊', '▉'][eighths % 8 - 1]);
    } else if eighths == 0 && value > 0.0 {
        text.push('▏');
    }
    let used = text.chars().count();
    text + &" ".repeat(BAR - used)
}

/// Bytes in a unit of suitable size.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// Seconds with one decimal.
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// A heading with a line under it.
pub fn heading(title: &str, colours: Colours) -> String {
    format!("\n{}\n{}\n", colours.paint("1", title), "─".repeat(title.chars().count()))
}

/// A bar for each named value, scaled to the largest.
pub fn bars(rows: &[(String, f64, String)], style: &str, colours: Colours) -> String {
    let most = rows.iter().map(|row| row.1).fold(0.0, f64::max);
    let width = rows.iter().map(|row| row.0.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value, label) in rows {
        let painted = colours.paint(style, &bar(*value, most));
        text.push_str(&format!("  {name:width$}  {painted}  {label}\n"));
    }
    text
}

/// The steps with their times.
pub fn steps(times: &[StepTime], colours: Colours) -> String {
    let rows: Vec<_> =
        times.iter().map(|step| (step.name.clone(), step.took.as_secs_f64(), seconds(step.took))).collect();
    heading("Time", colours) + &bars(&rows, "36", colours)
}

/// Space on the host, one row per moment, with the space used or given back since the row before.
pub fn space(moments: &[(String, u64)], colours: Colours) -> String {
    let mut before = 0;
    let mut rows = Vec::new();
    for (name, allocated) in moments {
        let change = if *allocated >= before {
            format!("+{}", bytes(allocated - before))
        } else {
            format!("−{} given back", bytes(before - allocated))
        };
        rows.push((name.clone(), *allocated as f64, format!("{:>10}  {change}", bytes(*allocated))));
        before = *allocated;
    }
    heading("Space that the image occupies on the host", colours) + &bars(&rows, "33", colours)
}

/// Requests by kind, as the guest's kernel counted them.
pub fn requests(all: Requests, colours: Colours) -> String {
    let row = |name: &str, count: u64, moved: Option<u64>| {
        let label =
            moved.map_or_else(|| format!("{count:>7}"), |moved| format!("{count:>7}  {}", bytes(moved)));
        (name.to_owned(), count as f64, label)
    };
    let rows = [
        row("read", all.reads, Some(all.read_bytes)),
        row("write", all.writes, Some(all.written_bytes)),
        row("discard", all.discards, Some(all.discarded_bytes)),
        row("flush", all.flushes, None),
    ];
    heading("Requests, counted in the guest", colours) + &bars(&rows, "35", colours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_padded_and_show_small_values() {
        assert_eq!(bar(1.0, 1.0), "█".repeat(BAR));
        assert_eq!(bar(0.0, 1.0), " ".repeat(BAR));
        assert!(bar(0.0001, 1.0).starts_with('▏'));
        assert_eq!(bar(0.0, 0.0), " ".repeat(BAR));
        for step in 0..=100 {
            assert_eq!(bar(f64::from(step), 100.0).chars().count(), BAR);
        }
    }

    #[test]
    fn bytes_have_a_suitable_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
    }

    #[test]
    fn space_used_and_given_back_is_shown() {
        let moments =
            [("new".to_owned(), 1 << 20), ("work".to_owned(), 3 << 20), ("trim".to_owned(), 2 << 20)];
        let text = space(&moments, Colours::none());
        assert!(text.contains("+2.0 MiB") && text.contains("−1.0 MiB given back"), "{text}");
        assert!(!text.contains('\x1b'));
    }
}
