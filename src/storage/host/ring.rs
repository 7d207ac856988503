//! Sets up a ring, probes the kernel's abilities, and translates calls and errors.
//!
//! It submits nothing and keeps no state.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::slots::Call;
use crate::error::{Step, StorageError};

/// The longest timeout passed to the kernel; a wait may return early.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(1 << 30);

/// How exclusively a ring belongs to its one thread; each flavour includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Flavour {
    /// No flag.
    Plain,
    /// The kernel does not interrupt the thread, and flags deferred work (Linux 5.19).
    Cooperative,
    /// Only this thread submits (Linux 6.0).
    SingleIssuer,
    /// Completions are processed only when this thread enters the kernel for them (Linux 6.1).
    Deferred,
}

/// All flavours, the best first.
pub(super) const FLAVOURS: [Flavour; 4] =
    [Flavour::Deferred, Flavour::SingleIssuer, Flavour::Cooperative, Flavour::Plain];

/// Abilities of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Abilities {
    /// A wait can have a timeout (Linux 5.11).
    pub(super) timed_wait: bool,
    /// The length of a file can be set by the ring (Linux 6.9).
    pub(super) truncate: bool,
}

pub(super) fn entry_of(call: &Call, fd: RawFd) -> squeue::Entry {
    let fd = Fd(fd);
    match *call {
        Call::Read { address, len, offset } => opcode::Read::new(fd, address, len).offset(offset).build(),
        Call::Write { address, len, offset } => opcode::Write::new(fd, address, len).offset(offset).build(),
        Call::Readv { iovecs, count, offset } => opcode::Readv::new(fd, iovecs, count).offset(offset).build(),
        Call::Writev { iovecs, count, offset } => {
            opcode::Writev::new(fd, iovecs, count).offset(offset).build()
        }
        Call::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
        }
        Call::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        Call::Truncate { len } => opcode::Ftruncate::new(fd, len).build(),
    }
}

/// Errors of io_uring_enter that change nothing and may pass: interrupted, no memory, or no room.
pub(super) fn is_passing(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(is_passing_errno)
}

pub(super) fn is_passing_errno(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
}

/// Waits with a timeout on kernels without a timed wait: the ring's descriptor is readable when there is a completion.
pub(super) fn poll_ring(fd: RawFd, timeout: Duration) {
    let millis = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd that outlives the call. Its result does not matter: a wait may end without a reason.
    unsafe { libc::poll(&mut poll, 1, millis) };
}

/// Creates a ring with the best flags that the kernel accepts.
pub(super) fn set_up(entries: u32, wanted: &[Flavour]) -> Result<IoUring, StorageError> {
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for flavour in wanted {
        let mut builder = IoUring::builder();
        builder.setup_clamp();
        if *flavour >= Flavour::Cooperative {
            builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        }
        if *flavour >= Flavour::SingleIssuer {
            builder.setup_single_issuer();
        }
        if *flavour >= Flavour::Deferred {
            builder.setup_defer_taskrun();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            // A flag that this kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(error) => return Err(ring_error(error)),
        }
    }
    Err(ring_error(refusal))
}

fn ring_error(source: io::Error) -> StorageError {
    match source.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => StorageError::UringRefused { source },
        _ => StorageError::Queue { step: Step::SetUpRing, source },
    }
}

impl Abilities {
    pub(super) fn ask(ring: &IoUring) -> Result<Self, StorageError> {
        let mut probe = Probe::new();
        // Linux 5.6 brought this probe and all the required operations.
        let asked = ring.submitter().register_probe(&mut probe);
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fallocate::CODE];
        if asked.is_err() || !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(StorageError::UringRefused { source: io::Error::from_raw_os_error(libc::ENOSYS) });
        }
        Ok(Abilities {
            timed_wait: ring.params().is_feature_ext_arg(),
            truncate: probe.is_supported(opcode::Ftruncate::CODE),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Storage;
    use crate::host::{Aio, HostQueue, HostStorage};

    #[test]
    fn the_error_names_the_settings_that_refuse_io_uring() {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
            let error = ring_error(io::Error::from_raw_os_error(errno));
            assert!(matches!(error, StorageError::UringRefused { .. }));
            let text = error.to_string();
            assert!(text.contains("kernel.io_uring_disabled") && text.contains("seccomp"), "{text}");
        }
        let other = ring_error(io::Error::from_raw_os_error(libc::ENOMEM));
        assert!(matches!(other, StorageError::Queue { step: Step::SetUpRing, .. }));
    }

    /// Makes io_uring_setup fail with `errno` in this thread from now on, as a container's filter does.
    fn forbid_io_uring(errno: i32) {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut filter = [
            // The system call's number is the first word; calls other than io_uring_setup are allowed.
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: a valid program of four steps that outlives both calls; they concern this thread alone.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, std::ptr::from_ref(&program))
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn threads_replace_a_forbidden_io_uring_unless_it_is_required() {
        for errno in [libc::EPERM, libc::ENOSYS] {
            let queues = std::thread::spawn(move || {
                forbid_io_uring(errno);
                let instead = HostStorage::new().queue(8).expect("a queue by threads");
                let is_by_threads = matches!(instead, HostQueue::Threads(_));
                (is_by_threads, HostStorage::new().by(Aio::IoUring).queue(8).map(|_| ()))
            });
            let (is_by_threads, demanded) = queues.join().expect("no panic");
            assert!(is_by_threads);
            match demanded {
                Err(StorageError::UringRefused { source }) => assert_eq!(source.raw_os_error(), Some(errno)),
                other => panic!("{other:?}"),
            }
        }
    }
}
