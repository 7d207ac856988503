//! Handles lost pages of guest memory. A page is lost if the frontend truncated the file, a sparse file's file
//! system is full, huge pages are used up, or the host's memory is damaged.
//!
//! A thread that touches such a page gets SIGBUS. The handler here looks the address up in a static table of the mapped
//! regions. In a region it maps a page of zeros at the fault and marks the session's memory as lost. From then on no
//! ring of the session gives a chain back ([`MemoryLoss::is_lost`]). So no request that read or wrote those zeros is
//! reported as done, and the session ends. A fault anywhere else goes to the previous action for SIGBUS.
//!
//! Owns the table and the handler. Everything that the handler calls is async-signal-safe: atomics and system calls.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::EventfdFlags;
use tracing::warn;

/// The most regions mapped at a time: a full table, its successor, and older regions that requests still use.
const SLOTS: usize = 2048;
/// After so many faults in a region the whole region is replaced, so that the number of mappings stays bounded.
const FAULTS_MAX: usize = 1024;

/// Whether some of a session's memory is lost.
#[derive(Debug, Default)]
pub(crate) struct MemoryLoss {
    /// Stored by the handler with Release.
    lost: AtomicBool,
    /// Becomes readable when a page is lost.
    event: Option<OwnedFd>,
}

impl MemoryLoss {
    /// A session's memory before any loss.
    ///
    /// # Errors
    /// When the host refuses an eventfd.
    pub(crate) fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(MemoryLoss { lost: AtomicBool::new(false), event: Some(event) })
    }

    /// Whether a page is lost that the calling thread touched before. The thread that touches the page takes the fault
    /// before its next instruction, so only the compiler must be kept from moving the load.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        compiler_fence(Ordering::SeqCst);
        self.lost.load(Ordering::Acquire)
    }

    /// The eventfd that becomes readable when a page is lost.
    pub(crate) fn event(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }

    /// Marks the loss; the handler calls it.
    fn tell(&self) {
        self.lost.store(true, Ordering::Release);
        if let Some(event) = &self.event {
            let one = 1u64;
            // SAFETY: eight bytes of ours are written to a descriptor of ours.
            let _ = unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
        }
    }
}

/// One region, in the handler's table.
struct Slot {
    /// Its first byte; 0 while the slot is free. Stored last, with Release, when a slot is taken.
    start: AtomicUsize,
    /// Bytes, whole pages.
    bytes: AtomicUsize,
    /// Bytes of one page of the region.
    page: AtomicUsize,
    faults: AtomicUsize,
    loss: AtomicPtr<MemoryLoss>,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        faults: AtomicUsize::new(0),
        loss: AtomicPtr::new(ptr::null_mut()),
    }
}; SLOTS];

/// Held while a slot is taken or freed. A leaf.
static CHANGING: Mutex<()> = Mutex::new(());

/// The previous action for SIGBUS.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapped region in the handler's table. It must be dropped before the mapping.
#[derive(Debug)]
pub(crate) struct Watch {
    slot: usize,
    /// Kept alive because the slot points to it.
    _loss: Arc<MemoryLoss>,
}

impl Watch {
    /// Puts a mapping into the table; `None` if the table is full.
    pub(crate) fn new(start: *const u8, bytes: usize, page: usize, loss: &Arc<MemoryLoss>) -> Option<Self> {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        install();
        let slot = TABLE.iter().position(|slot| slot.start.load(Ordering::Relaxed) == 0)?;
        let entry = &TABLE[slot];
        entry.bytes.store(bytes.next_multiple_of(page), Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.faults.store(0, Ordering::Relaxed);
        entry.loss.store(Arc::as_ptr(loss).cast_mut(), Ordering::Relaxed);
        entry.start.store(start.addr(), Ordering::Release);
        Some(Watch { slot, _loss: Arc::clone(loss) })
    }

    /// Whether a page of this region was lost.
    pub(crate) fn is_lost(&self) -> bool {
        TABLE[self.slot].faults.load(Ordering::Acquire) > 0
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.slot].start.store(0, Ordering::Release);
    }
}

/// Installs the handler, once. Call it with [`CHANGING`] held.
fn install() {
    if PREVIOUS.get().is_some() {
        return;
    }
    // SAFETY: plain data, for which zeros are a value.
    let (mut action, mut previous) = unsafe { std::mem::zeroed::<(libc::sigaction, libc::sigaction)>() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    action.sa_sigaction = handler as usize;
    // On the signal stack that Rust gives its threads, if there is one.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both point to values of ours, and the handler does only what a handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut previous) } != 0 {
        let error = io::Error::last_os_error();
        warn!(%error, "no handler for SIGBUS: a frontend that truncates its memory would end the daemon");
    }
    let _ = PREVIOUS.set(previous);
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    const OF_MEMORY: [libc::c_int; 4] =
        [libc::BUS_ADRERR, libc::BUS_OBJERR, libc::BUS_MCEERR_AR, libc::BUS_MCEERR_AO];
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole siginfo_t; errno is the thread's own.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().addr(), *libc::__errno_location()) };
    if !(OF_MEMORY.contains(&code) && replace(address)) {
        pass_on(signal, code);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Replaces the page at this address if it is guest memory; returns whether it did.
fn replace(address: usize) -> bool {
    for slot in &TABLE {
        let start = slot.start.load(Ordering::Acquire);
        let bytes = slot.bytes.load(Ordering::Relaxed);
        let page = slot.page.load(Ordering::Relaxed);
        let loss = slot.loss.load(Ordering::Relaxed);
        let within = start != 0 && address.checked_sub(start).is_some_and(|offset| offset < bytes);
        // Another thread may be changing a slot, but never the slot of a mapping which this thread is using.
        if !within || slot.start.load(Ordering::Acquire) != start {
            continue;
        }
        let faults = slot.faults.fetch_add(1, Ordering::AcqRel);
        // SAFETY: this thread uses the mapping, so its watch is there, which keeps the loss.
        unsafe { &*loss }.tell();
        let at = start + (address - start) / page * page;
        return (faults < FAULTS_MAX && map_zeros(at, page)) || map_zeros(start, bytes);
    }
    false
}

fn map_zeros(start: usize, bytes: usize) -> bool {
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let at = ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is whole pages of a mapping of guest memory, which is only ever accessed as memory that others
    // change at any time. `munmap` of the whole later takes the new pages as well.
    let mapped = unsafe { libc::mmap(at, bytes, access, flags | libc::MAP_NORESERVE, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// Passes the signal to the previous action. A faulting instruction runs again, and a signal that was sent is sent
/// again.
fn pass_on(signal: libc::c_int, code: libc::c_int) {
    let previous = PREVIOUS.get().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the previous action is as the kernel gave it. Before it is known there is no handler but the default.
    unsafe {
        if previous.is_null() {
            libc::signal(signal, libc::SIG_DFL);
        } else {
            libc::sigaction(signal, previous, ptr::null_mut());
        }
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use super::*;

    const PAGE: usize = 4096;

    /// A page of an empty file: touching it raises SIGBUS.
    fn nothing() -> *mut u8 {
        let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a new mapping, which stays.
        unsafe { rustix::mm::mmap(ptr::null_mut(), 2 * PAGE, access, flags, file, 0) }
            .expect("a mapping")
            .cast()
    }

    /// Runs one test in a process of its own, with this environment variable set.
    fn run_alone(test: &str, variable: &str) -> Output {
        let program = std::env::current_exe().expect("this program");
        Command::new(program).args(["--exact", test]).env(variable, "1").output().expect("it starts")
    }

    #[test]
    fn a_lost_page_reads_as_zero_and_is_reported() {
        let loss = Arc::new(MemoryLoss::new().expect("an eventfd"));
        let other = Arc::new(MemoryLoss::default());
        let (page, untouched) = (nothing(), nothing());
        let watch = Watch::new(page, 2 * PAGE, PAGE, &loss).expect("room");
        let unharmed = Watch::new(untouched, 2 * PAGE, PAGE, &other).expect("room");
        // SAFETY: the mapping stays, and no other code uses it.
        let read = unsafe { page.add(PAGE + 5).read_volatile() };
        assert_eq!(read, 0);
        assert!(loss.is_lost() && watch.is_lost());
        assert!(!other.is_lost() && !unharmed.is_lost());
        let mut count = [0; 8];
        rustix::io::read(loss.event().expect("an event"), &mut count).expect("it was signalled");
        assert_eq!(u64::from_ne_bytes(count), 1);
    }

    /// The test takes every slot, so it runs in a process of its own.
    #[test]
    fn a_slot_is_free_again_when_its_watch_is_gone() {
        const CHILD: &str = "STRATA_TEST_SLOTS";
        if std::env::var_os(CHILD).is_none() {
            let child = run_alone("loss::tests::a_slot_is_free_again_when_its_watch_is_gone", CHILD);
            return assert!(child.status.success(), "{child:?}");
        }
        let loss = Arc::new(MemoryLoss::default());
        let page = nothing();
        for _ in 0..3 * SLOTS {
            drop(Watch::new(page, PAGE, PAGE, &loss).expect("room"));
        }
        let all: Vec<_> = (0..).map_while(|_| Watch::new(page, PAGE, PAGE, &loss)).collect();
        assert_eq!(all.len(), SLOTS);
    }

    /// Faults elsewhere still end the program. The test runs itself as a child, which an environment variable makes
    /// fault.
    #[test]
    fn any_other_fault_is_fatal() {
        const CHILD: &str = "STRATA_TEST_FAULT";
        if std::env::var_os(CHILD).is_some() {
            let loss = Arc::new(MemoryLoss::default());
            let _watch = Watch::new(nothing(), PAGE, PAGE, &loss).expect("room");
            // SAFETY: the mapping stays, and no other code uses it.
            unsafe { nothing().read_volatile() };
            return;
        }
        let child = run_alone("loss::tests::any_other_fault_is_fatal", CHILD);
        assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
    }
}
