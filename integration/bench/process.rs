//! The kernel's counters of a process and of the machine: CPU time, memory.
//!
//! Owns the reading of /proc. All tasks of a process count, also those that have ended. So do the kernel's io
//! workers (`iou-wrk-…`), which belong to the thread group that created their ring.

use anyhow::{Context, Result};
use std::fs;

/// Clock ticks per second in /proc, on x86-64 and arm64.
const TICKS: f64 = 100.0;

/// CPU seconds that a process has used.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The group's clock includes ended tasks but counts ticks; the clocks of live tasks count nanoseconds.
    let group = ticks_of_stat(&text).with_context(|| path)? as f64 / TICKS;
    Ok(group.max(living_seconds(pid)))
}

/// The sum of utime and stime, fields 14 and 15. The second field, in brackets, may contain blanks and brackets.
fn ticks_of_stat(text: &str) -> Option<u64> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// CPU seconds of the live tasks; 0 if the kernel does not count them.
fn living_seconds(pid: u32) -> f64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let one = |task: fs::DirEntry| -> Option<u64> {
        // A task may end between listing and reading.
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    tasks.flatten().filter_map(one).sum::<u64>() as f64 / 1e9
}

/// A process's resident memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// The total.
    pub total: u64,
    /// The shared part: guest memory that the process has touched.
    pub shared: u64,
}

impl Resident {
    /// Reads the current memory of a process.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        Self::parse(&text).context(path)
    }

    /// The memory without the guest's.
    pub fn own(self) -> u64 {
        self.total.saturating_sub(self.shared)
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
        };
        Some(Self { total: bytes("VmRSS:")?, shared: bytes("RssShmem:")? })
    }
}

/// CPU seconds that the whole machine has used, without idle and iowait.
pub fn machine_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // Columns: user nice system idle iowait irq softirq steal.
    let busy = [0, 1, 2, 5, 6, 7].into_iter().filter_map(|index| fields.get(index)).sum::<u64>();
    Ok(busy as f64 / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_after_the_name() {
        let text = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 31 11 0 0 20 0 1 0";
        assert_eq!(ticks_of_stat(text), Some(42));
        assert_eq!(ticks_of_stat("7 (a"), None);
    }

    #[test]
    fn memory_is_in_bytes() {
        let status = "VmRSS:\t    1768 kB\nRssAnon:\t 116 kB\nRssShmem:\t 8 kB\n";
        let resident = Resident::parse(status).expect("both lines");
        assert_eq!((resident.total, resident.own()), (1768 * 1024, 1760 * 1024));
    }

    #[test]
    fn counters_of_this_process_are_read() {
        let own = std::process::id();
        assert!(cpu_seconds(own).is_ok());
        assert!(Resident::of(own).is_ok_and(|resident| resident.total > 0));
        assert!(machine_seconds().is_ok_and(|seconds| seconds > 0.0));
    }
}
