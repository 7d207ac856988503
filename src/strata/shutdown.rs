//! From a signal to the end: stops the server, logs the progress, and reports requests that hang.
//!
//! Two threads: one handles signals, one watches the time. Neither ends the program while a disk is open: the main
//! thread does, when everything is done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;
use tracing::{info, warn};
use vhost_blk::StopHandle;

use crate::device::DeviceWatch;
use crate::error::ProgramError;
use crate::notify;

/// A shutdown that takes this long is reported as hanging, and again each time this has passed.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the main thread is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Opening,
    /// After a successor has ended instead of serving. The socket is open.
    Reopening,
    Serving,
    Closing,
    Done,
}

struct State {
    stage: Stage,
    /// Stops the server of the present round.
    stop: StopHandle,
    /// The shutdown is for a successor, which may fail: then the disk is served again.
    hands_over: bool,
    /// A signal came meanwhile: the disk is not served again.
    ends: bool,
    /// When the shutdown began.
    stopping: Option<Instant>,
    device: DeviceWatch,
    /// Logs the totals so far, while the disk is served. It does no I/O: a signal would wait for the lock meanwhile.
    totals: Option<Box<dyn Fn() + Send>>,
    /// Asks for a resize of the disk, while it is served.
    resize: Option<Box<dyn Fn() + Send>>,
}

struct Shared {
    /// The current state. No thread that holds another lock takes it (docs/concurrency.md, "Locks").
    state: Mutex<State>,
    changed: Condvar,
}

/// The progress of the shutdown, as the main thread reports it.
#[derive(Clone)]
pub struct Shutdown {
    shared: Arc<Shared>,
}

impl Shutdown {
    /// Handles signals. SIGTERM, SIGINT and SIGXCPU use `stop` from now on. SIGUSR1 logs the totals, SIGHUP resizes
    /// the disk, and SIGUSR2 does nothing.
    ///
    /// # Errors
    /// When the host refuses a thread or a handler.
    pub fn start(stop: StopHandle) -> Result<Self, ProgramError> {
        let failed = |step| move |source| ProgramError::Host { step, source };
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGXCPU, SIGHUP, SIGUSR1, SIGUSR2])
            .map_err(failed("setting signal handlers up"))?;
        let shutdown = Self::new(stop);
        let (takes, looks) = (shutdown.clone(), shutdown.clone());
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.to_owned()).spawn(body).map_err(failed("starting a thread"))
        };
        spawn("strata-signals", Box::new(move || signals.forever().for_each(|signal| takes.signal(signal))))?;
        spawn("strata-watch", Box::new(move || looks.look()))?;
        Ok(shutdown)
    }

    /// Before the disk is open, and without a thread.
    fn new(stop: StopHandle) -> Self {
        let state = State {
            stage: Stage::Opening,
            stop,
            hands_over: false,
            ends: false,
            stopping: None,
            device: DeviceWatch::default(),
            totals: None,
            resize: None,
        };
        Shutdown { shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk is open: from now on a signal starts a clean shutdown.
    pub fn serving(
        &self,
        device: DeviceWatch,
        totals: impl Fn() + Send + 'static,
        resize: impl Fn() + Send + 'static,
    ) {
        let mut state = self.state();
        (state.stage, state.device) = (Stage::Serving, device);
        state.totals = Some(Box::new(totals));
        state.resize = Some(Box::new(resize));
    }

    /// The last session has ended, and the image is being closed.
    pub fn closing(&self) {
        let mut state = self.state();
        state.stage = Stage::Closing;
        (state.totals, state.resize) = (None, None);
        self.begin(&mut state);
    }

    /// The image is closed, and nobody takes over.
    pub fn done(&self) {
        self.state().stage = Stage::Done;
        self.shared.changed.notify_all();
    }

    /// A successor asks for the disk: stops the server, which keeps its listener. False if the disk is not being served,
    /// or a shutdown has begun already.
    pub fn hand_over(&self) -> bool {
        let mut state = self.state();
        if state.stage != Stage::Serving || state.stopping.is_some() {
            return false;
        }
        info!("a new daemon takes over: finishing the requests in hand, then closing the image");
        state.hands_over = true;
        self.begin(&mut state);
        state.stop.hand_over();
        true
    }

    /// The successor has ended: the disk is to be served again, with this handle to stop it. False if a signal has come
    /// meanwhile.
    pub fn resume(&self, stop: StopHandle) -> bool {
        let mut state = self.state();
        if state.ends {
            return false;
        }
        (state.stage, state.stop, state.hands_over, state.stopping) = (Stage::Reopening, stop, false, None);
        state.device = DeviceWatch::default();
        true
    }

    fn begin(&self, state: &mut State) {
        if state.stopping.is_none() {
            state.stopping = Some(Instant::now());
            // A request that waits for space could keep its queue from ending for ever.
            state.device.stop_waiting();
            self.shared.changed.notify_all();
            if state.hands_over {
                return;
            }
            notify::send(&format!("{}\n{}", notify::STOPPING, notify::status(vhost_blk::Stage::Draining)));
        }
    }

    fn signal(&self, signal: i32) {
        let name = signal_name(signal).unwrap_or("a signal");
        let mut state = self.state();
        match (signal, &state.totals) {
            (SIGHUP, _) => match &state.resize {
                Some(resize) => return guarded("the resize", resize),
                None => return info!("SIGHUP: the disk is not being served, so it keeps its size"),
            },
            (SIGUSR1, Some(log_totals)) => return guarded("the totals", log_totals),
            (SIGUSR1 | SIGUSR2, _) => {
                return info!("{name}: nothing to do; SIGUSR1 logs the totals of a disk in use");
            }
            _ => {}
        }
        if state.stage == Stage::Opening {
            // Nothing is promised to any client yet. The lock keeps the main thread from continuing.
            info!("{name}: stopping before anything is served");
            std::process::exit(0);
        }
        self.stop(&mut state, name);
    }

    /// Begins to stop, as SIGTERM does, once the disk is open. `asker` is who wants it, for the log.
    pub fn ask(&self, asker: &str) {
        self.stop(&mut self.state(), asker);
    }

    fn stop(&self, state: &mut State, asker: &str) {
        if state.stopping.is_some() {
            state.ends = true;
            info!("{asker}: stopping already; {}", in_words(state));
            return;
        }
        info!("{asker}: finishing the requests in hand, then closing the image");
        self.begin(state);
        state.stop.stop();
    }

    /// Logs requests that hang, until the end.
    fn look(&self) {
        let mut state = self.state();
        while state.stage != Stage::Done {
            let Some(began) = state.stopping else {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let waited = self.shared.changed.wait_timeout(state, PATIENCE);
            let timed_out;
            (state, timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
            if timed_out.timed_out() && state.stage != Stage::Done {
                warn!("stopping for {} s now; {}", began.elapsed().as_secs(), in_words(&state));
            }
        }
    }
}

/// Runs a task of the thread that handles signals. A panic, as after one under a lock of the disk, must not end the
/// thread: then no signal would end the daemon.
fn guarded(name: &str, task: &dyn Fn()) {
    if catch_unwind(AssertUnwindSafe(task)).is_err() {
        warn!("{name}: the task panicked; signals are handled as before");
    }
}

/// What the shutdown is waiting for.
fn in_words(state: &State) -> String {
    let busy = state.device.in_flight();
    match state.stage {
        Stage::Reopening => "the image is being opened".to_owned(),
        Stage::Closing => "what is left of the metadata is on its way to the image".to_owned(),
        Stage::Done => "everything is done".to_owned(),
        _ if busy.is_empty() => "the session is ending".to_owned(),
        _ => {
            let each: Vec<String> =
                busy.iter().map(|(queue, count)| format!("{queue} has {count}")).collect();
            format!("requests are still at the host: {}", each.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_panics_ends_no_thread_of_signals() {
        let stop = StopHandle::new().expect("an eventfd");
        let shutdown = Shutdown::new(stop.clone());
        shutdown.serving(DeviceWatch::default(), || panic!("the totals"), || panic!("the resize"));
        shutdown.signal(SIGUSR1);
        shutdown.signal(SIGHUP);
        shutdown.signal(SIGTERM);
        assert!(stop.is_stopped());
    }
}
