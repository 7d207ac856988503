//! Guest memory for requests in flight: one arena per thread, divided into windows.

use std::cell::OnceCell;

use storage::GuestSlice;

use super::stamp::SECTOR;

/// Requests in flight at a time, at most.
pub const SLOTS: usize = 8;
/// Bytes of a window.
pub const WINDOW: usize = 256 << 10;
/// The most sectors of a request. They fit in a window at an odd address, too.
pub const SECTORS_MAX: u64 = WINDOW as u64 / SECTOR - 1;
const ALIGNMENT: usize = 4096;

thread_local! {
    /// Leaked, so that its slices are 'static. One per thread, so that little leaks.
    static ARENA: OnceCell<GuestSlice> = const { OnceCell::new() };
}

fn arena() -> GuestSlice {
    ARENA.with(|arena| {
        *arena.get_or_init(|| {
            let bytes = Box::leak(vec![0u8; SLOTS * WINDOW + ALIGNMENT].into_boxed_slice());
            let skip = bytes.as_ptr().align_offset(ALIGNMENT);
            GuestSlice::from(&mut bytes[skip..skip + SLOTS * WINDOW])
        })
    })
}

/// Memory for a request: aligned and whole, at an odd address, or in two slices.
pub fn memory(slot: usize, count: u64, manner: u64) -> Vec<GuestSlice> {
    let length = (count * SECTOR) as usize;
    let shift = if manner == 1 { 8 } else { 0 };
    assert!(length + shift <= WINDOW, "a request fits its window");
    let whole = arena().subslice(slot * WINDOW + shift, length).expect("within the arena");
    if manner != 2 || count < 2 {
        return vec![whole];
    }
    let (first, second) = whole.split_at(SECTOR as usize).expect("a cut within");
    vec![first, second]
}

/// Copies bytes into slices that hold as many.
pub fn scatter(bytes: &[u8], slices: &[GuestSlice]) {
    let mut rest = bytes;
    for slice in slices {
        let (head, after) = rest.split_at(slice.len());
        slice.copy_from(head);
        rest = after;
    }
}

/// The bytes of slices.
pub fn gather(slices: &[GuestSlice]) -> Vec<u8> {
    let mut bytes = vec![0; slices.iter().map(|slice| slice.len()).sum()];
    let mut rest = &mut bytes[..];
    for slice in slices {
        let (head, after) = rest.split_at_mut(slice.len());
        slice.copy_to(head);
        rest = after;
    }
    bytes
}
