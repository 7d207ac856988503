//! The ring of records in memory that outlives the process. docs/protocol.md draws it word by word.
//!
//! Only this process stores to it while it is in use, under the engine's lock. The positions of the present journal are
//! in memory of our own, so nothing that others store there is believed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::journal::record::Record;
use crate::journal::seal::Seal;

/// Words of memory that outlive the process. Others may change them at any time.
pub type JournalMemory = Arc<dyn AsRef<[AtomicU64]> + Send + Sync>;

/// Marks a journal: the first word, as a number in the host's byte order.
const MAGIC: u64 = u64::from_ne_bytes(*b"STRATAJL");
/// The version of the layout.
const VERSION: u64 = 1;
/// Words before the first record.
const HEADER_WORDS: usize = 32;
/// Words of a record: three of [`Record::words`], then the seal.
const RECORD_WORDS: usize = 4;
/// The fewest records of a journal, so that each plan finds room in an empty one.
const SLOTS_MIN: u64 = 8;
/// Places of the words of the header.
const AT_VERSION: usize = 1;
const AT_SLOTS: usize = 2;
const AT_PROOF: usize = 3;
const AT_TAIL: usize = 8;
const AT_HEAD: usize = 16;

/// Why the records of a journal cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum JournalError {
    /// There is no journal, or one of another state of the image.
    #[error("there is no journal of this state of the image")]
    Foreign,
    /// The positions contradict each other.
    #[error("its records are {tail}..{head}, but it has room for {slots}")]
    Positions {
        /// The first record.
        tail: u64,
        /// Past the last record.
        head: u64,
        /// Room for records.
        slots: u64,
    },
    /// A record was changed, or is not there.
    #[error("the seal of record {position} does not fit it")]
    Seal {
        /// The record's position.
        position: u64,
    },
    /// A record makes no sense for this image.
    #[error("the record of guest cluster {cluster} makes no sense: {what}")]
    Record {
        /// The guest cluster.
        cluster: u64,
        /// The fault.
        what: &'static str,
    },
    /// Records name a host cluster that they cannot have.
    #[error("records name host cluster {cluster:#x}: {what}")]
    Host {
        /// The host cluster.
        cluster: u64,
        /// The fault.
        what: &'static str,
    },
}

/// A ring in use.
pub(crate) struct Ring {
    memory: JournalMemory,
    seal: Seal,
    slots: u64,
}

/// Room for records in so many words.
fn slots_of(words: usize) -> u64 {
    (words.saturating_sub(HEADER_WORDS) / RECORD_WORDS) as u64
}

/// What proves that a journal belongs to the number in the image's header.
fn proof(seal: Seal, slots: u64) -> u64 {
    seal.over([MAGIC, VERSION, slots, 0])
}

/// The words of the record at a position.
fn place(memory: &[AtomicU64], position: u64) -> &[AtomicU64] {
    let at = HEADER_WORDS + (position % slots_of(memory.len())) as usize * RECORD_WORDS;
    &memory[at..at + RECORD_WORDS]
}

impl Ring {
    /// Begins an empty journal at a position, with the seal of the number in the image's header; `None` if the memory is
    /// too small.
    pub fn begin(memory: JournalMemory, seal: Seal, position: u64) -> Option<Self> {
        let words = (*memory).as_ref();
        let slots = slots_of(words.len());
        if slots < SLOTS_MIN {
            return None;
        }
        // Until the last of these stores, which is the only one that the number fits, there is no journal.
        let proven = (AT_PROOF, proof(seal, slots));
        let header =
            [(AT_PROOF, 0), (0, MAGIC), (AT_VERSION, VERSION), (AT_SLOTS, slots), (AT_TAIL, position)];
        for (at, word) in header.into_iter().chain([(AT_HEAD, position), proven]) {
            words[at].store(word, Ordering::Release);
        }
        Some(Ring { memory, seal, slots })
    }

    /// Room for records.
    pub fn slots(&self) -> u64 {
        self.slots
    }

    fn words(&self) -> &[AtomicU64] {
        (*self.memory).as_ref()
    }

    /// Stores a record at a position. [`Ring::move_head`] publishes it.
    #[inline]
    pub fn store(&self, position: u64, record: &Record) {
        let [clusters, descriptor, bitmap] = record.words();
        let seal = self.seal.over([position, clusters, descriptor, bitmap]);
        let place = place(self.words(), position);
        for (word, value) in place.iter().zip([clusters, descriptor, bitmap, seal]) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Publishes the records before a position. A successor that loads the head (Acquire) sees all of each.
    #[inline]
    pub fn move_head(&self, head: u64) {
        self.words()[AT_HEAD].store(head, Ordering::Release);
    }

    /// The records before a position are no longer needed. Their places are used again only after this store.
    pub fn move_tail(&self, tail: u64) {
        self.words()[AT_TAIL].store(tail, Ordering::Release);
    }
}

/// The records of a journal that another process left, in their order.
///
/// # Errors
/// There is no journal for this number, or it was damaged.
pub(crate) fn read(memory: &JournalMemory, number: u64) -> Result<Vec<Record>, JournalError> {
    let words = (**memory).as_ref();
    let slots = slots_of(words.len());
    if slots < SLOTS_MIN {
        return Err(JournalError::Foreign);
    }
    let load = |at: usize| words[at].load(Ordering::Acquire);
    let seal = Seal::of(number);
    let header = [load(0), load(AT_VERSION), load(AT_SLOTS), load(AT_PROOF)];
    if header != [MAGIC, VERSION, slots, proof(seal, slots)] {
        return Err(JournalError::Foreign);
    }
    let (tail, head) = (load(AT_TAIL), load(AT_HEAD));
    if head.checked_sub(tail).is_none_or(|used| used > slots) {
        return Err(JournalError::Positions { tail, head, slots });
    }
    let record = |position: u64| {
        let mut copy = [0; RECORD_WORDS];
        for (word, shared) in copy.iter_mut().zip(place(words, position)) {
            *word = shared.load(Ordering::Relaxed);
        }
        let [clusters, descriptor, bitmap, sealed] = copy;
        if seal.over([position, clusters, descriptor, bitmap]) != sealed {
            return Err(JournalError::Seal { position });
        }
        Ok(Record::of_words([clusters, descriptor, bitmap]))
    };
    (tail..head).map(record).collect()
}
