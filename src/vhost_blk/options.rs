//! What a server offers its frontends: the options, and their ranges.

use std::sync::Arc;
use std::time::Duration;

use crate::back_channel::BackChannel;
use crate::error::SessionError;
use crate::metrics::Metrics;
use crate::pulse::Pulse;

/// `vhost` uses 8 bits for the queue in messages that carry descriptors.
const MAX_QUEUES: u16 = 256;
/// Virtio 1.2, 2.7.
const MAX_QUEUE_SIZE: u16 = 32768;

/// What a server offers its frontends.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Queues on offer, 1 to 256. Unused queues cost nothing.
    pub num_queues: u16,
    /// The largest ring, in descriptors: a power of two from 2 to 32,768.
    pub queue_size: u16,
    /// The longest time that a queue without work polls before it sleeps; zero to sleep at once.
    pub poll_max: Duration,
    /// How long a message may take from its first byte to its last.
    pub message_timeout: Duration,
    /// The counters of the queues, for at least `num_queues` queues.
    pub metrics: Arc<Metrics>,
    /// Shows what the server does and whether its threads get on, for at least `num_queues` queues.
    pub pulse: Arc<Pulse>,
    /// The way to the frontend that is being served.
    pub back_channel: Arc<BackChannel>,
}

impl ServeOptions {
    /// The defaults, with the given number and size of queues.
    pub fn new(num_queues: u16, queue_size: u16) -> Self {
        ServeOptions {
            num_queues,
            queue_size,
            poll_max: Duration::from_micros(100),
            message_timeout: Duration::from_secs(10),
            metrics: Arc::new(Metrics::new(num_queues)),
            pulse: Arc::new(Pulse::new(num_queues, |_| {})),
            back_channel: Arc::default(),
        }
    }

    /// Refuses options outside their ranges.
    pub(crate) fn check(&self) -> Result<(), SessionError> {
        let refuse =
            |name, value: u16, range| Err(SessionError::Option { name, value: u32::from(value), range });
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return refuse("the number of queues", self.num_queues, "from 1 to 256");
        }
        if !self.queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return refuse("the queue size", self.queue_size, "a power of two from 2 to 32768");
        }
        if self.metrics.queues() < usize::from(self.num_queues) {
            return refuse("the number of queues", self.num_queues, "at most that of the metrics");
        }
        if self.pulse.queues() < usize::from(self.num_queues) {
            return refuse("the number of queues", self.num_queues, "at most that of the pulse");
        }
        Ok(())
    }
}

impl Default for ServeOptions {
    /// 64 queues of up to 1,024 descriptors.
    fn default() -> Self {
        Self::new(64, 1024)
    }
}
