//! The control thread: accepts clients, serves each within bounds, and ends with the daemon.
//!
//! One thread with a current-thread runtime. Commands that do I/O run on threads of their own, which end soon after.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::bounds::{COMMANDS_MAX, CONNECTIONS_MAX, HEAD_MAX, HEAD_TIMEOUT, HEADERS_MAX, LEAVE_TIMEOUT};
use crate::events::Hub;
use crate::room::{Peer, Room};
use crate::routes;
use crate::stopped::Stopped;
use crate::subject::Subject;
use crate::watch::watch as watch_disk;

/// The pause after the host had no descriptor for a client.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long a thread for commands stays after its command.
const COMMAND_THREAD_STAYS: Duration = Duration::from_millis(100);

/// The running control thread.
pub struct Control {
    subject: Arc<dyn Subject>,
    stop: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Starts the thread on a listening socket.
    ///
    /// # Errors
    /// When the host refuses a thread or what a runtime needs.
    pub fn start(listener: UnixListener, subject: Arc<dyn Subject>, hub: Arc<Hub>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(COMMANDS_MAX)
            .thread_keep_alive(COMMAND_THREAD_STAYS)
            .thread_name("strata-command")
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = Stopped::new();
        let room = Room::new(Arc::clone(&subject), hub, stopped.clone());
        let body = move || runtime.block_on(serve(listener, room, stopped));
        let thread = thread::Builder::new().name("strata-control".to_owned()).spawn(body)?;
        Ok(Control { subject, stop, thread })
    }

    /// Takes no more requests, lets those under way end, and ends the thread. Nothing has the subject afterwards.
    pub fn stop(self) {
        self.subject.give_up();
        drop(self.subject);
        let _ = self.stop.send(true);
        if self.thread.join().is_err() {
            warn!("the control thread has ended in a panic");
        }
    }
}

async fn serve(listener: tokio::net::UnixListener, room: Room, mut stopped: Stopped) {
    let mut tasks = JoinSet::new();
    let watcher = tokio::spawn(watch_disk(Arc::clone(&room.subject), Arc::clone(&room.hub)));
    let router = routes::router().with_state(room);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // The last accept failed on the host.
    let mut failing = false;
    loop {
        while tasks.try_join_next().is_some() {}
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            biased;
            () = stopped.wait() => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                failing = false;
                let connection = serve_client(stream, router.clone(), stopped.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(slot);
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(%error, "a client of the control socket could not be accepted; trying again");
                }
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
    watcher.abort();
    // Commands under way go on to their ends, whoever waits for them: the runtime waits for their threads when it ends.
    while tasks.join_next().await.is_some() {}
}

/// Serves one client until it leaves, is too slow, or the daemon ends.
async fn serve_client(stream: UnixStream, router: Router, mut stopped: Stopped) {
    let credentials = stream.peer_cred().ok();
    let pid = credentials.and_then(|found| found.pid()).filter(|pid| *pid > 0);
    let peer = Peer { pid, uid: credentials.map(|found| found.uid()) };
    debug!("control: a client connected ({peer})");
    let service = TowerToHyperService::new(router.layer(axum::Extension(peer)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(crate::patient::Patient::new(stream)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped.wait() => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(LEAVE_TIMEOUT, connection).await {
                Ok(ended) => ended,
                Err(_) => Ok(()),
            }
        }
    };
    match ended {
        Ok(()) => debug!("control: a client left ({peer})"),
        Err(error) => debug!(%error, "control: a connection ends ({peer})"),
    }
}
