//! Finds the process that holds an image lock, for error messages.
//!
//! The kernel reports no process for locks of open file descriptions, but /proc/PID/fdinfo lists the locks of each
//! descriptor. So the holder is searched there, as a best effort within a time limit; only root sees other users'
//! processes. Only /proc is read, never a file of the process, which could block for ever.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::Holder;

/// The time limit of a search.
const SEARCH_TIME: Duration = Duration::from_millis(300);
/// The longest name of a program in bytes (`TASK_COMM_LEN`).
const PROGRAM_MAX: usize = 16;

/// A file as the kernel names it in its lists of locks: device and inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LockKey(String);

/// The key of a file that this process has locked.
pub(super) fn key_of(file: &File) -> Option<LockKey> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    info.lines().find_map(lock_of_line).map(|lock| LockKey(lock.key.to_owned()))
}

/// A process with a lock on this byte of the file. `file` itself does not count.
pub(super) fn find(file: &File, key: &LockKey, byte: u64) -> Option<Holder> {
    let deadline = Instant::now() + SEARCH_TIME;
    let own = std::process::id();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = number(&process.file_name()) else { continue };
        // Other users' processes, and those that have just ended, cannot be read.
        for descriptor in fs::read_dir(process.path().join("fdinfo")).into_iter().flatten().flatten() {
            if Instant::now() >= deadline {
                return None;
            }
            let is_own =
                pid == own && number(&descriptor.file_name()) == Some(file.as_raw_fd().unsigned_abs());
            let Ok(info) = fs::read_to_string(descriptor.path()) else { continue };
            let holds = |lock: &Lock| lock.key == key.0 && (lock.start..=lock.end).contains(&byte);
            if !is_own && info.lines().filter_map(lock_of_line).any(|lock| holds(&lock)) {
                return Some(Holder { pid, program: program(&process.path()) });
            }
        }
    }
    None
}

fn number(name: &std::ffi::OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// The program's name. A process chooses it, so characters that are not plain are replaced.
fn program(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    let plain = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '_' };
    name.iter().take(PROGRAM_MAX).map(plain).collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Lock<'a> {
    key: &'a str,
    /// The first and the last byte.
    start: u64,
    end: u64,
}

/// A line such as `lock: 1: OFDLCK  ADVISORY  READ -1 fd:01:1234 100 103`; the end may be `EOF`. Locks of whole files
/// (FLOCK, LEASE) are not image locks.
fn lock_of_line(line: &str) -> Option<Lock<'_>> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
    if !matches!(words.next()?, "OFDLCK" | "POSIX") {
        return None;
    }
    let mut words = words.skip(3);
    let (key, start, end) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
    let end = if end == "EOF" { u64::MAX } else { end.parse().ok()? };
    Some(Lock { key, start, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_read_from_the_kernels_lines() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fd:01:1234 100 103";
        assert_eq!(lock_of_line(line), Some(Lock { key: "fd:01:1234", start: 100, end: 103 }));
        let line = "lock:\t2: POSIX  ADVISORY  WRITE 77 00:2f:9 0 EOF";
        assert_eq!(lock_of_line(line), Some(Lock { key: "00:2f:9", start: 0, end: u64::MAX }));
        for other in [
            "",
            "pos:\t0",
            "lock:",
            "lock:\t1: FLOCK  ADVISORY  WRITE 7 fd:01:2 0 EOF",
            "lock:\t1: OFDLCK a b",
        ] {
            assert_eq!(lock_of_line(other), None, "{other}");
        }
    }
}
