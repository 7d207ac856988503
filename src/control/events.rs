//! Events: the hub that any thread reports to, and the streams by which clients hear of them.
//!
//! A stream has a bounded buffer. A client that lets it overflow is dropped, as it has missed events.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::sync::{Notify, OwnedSemaphorePermit, broadcast};
use tracing::debug;

use crate::api::{Event, EventData, EventName, Timestamp};
use crate::bounds::EVENTS_MAX;
use crate::stopped::Stopped;
use crate::text::json_line;

/// Hands events to all clients that listen.
#[derive(Debug)]
pub struct Hub {
    sender: broadcast::Sender<Event>,
    /// Notified when a client begins to listen.
    begun: Notify,
    /// How often a client began to listen while no other did. Relaxed: only the control thread uses it.
    firsts: AtomicU64,
}

impl Default for Hub {
    fn default() -> Self {
        Hub { sender: broadcast::Sender::new(EVENTS_MAX), begun: Notify::new(), firsts: AtomicU64::new(0) }
    }
}

impl Hub {
    /// Reports that something has happened just now. Never waits for a client.
    pub fn tell(&self, event: EventName, data: EventData) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = Timestamp { seconds: now.as_secs(), microseconds: now.subsec_micros() };
        // It fails if nobody listens.
        let _ = self.sender.send(Event { event, data, timestamp });
    }

    /// Waits until a client listens. Returns how often a client began to do so while no other did: clients that listen
    /// at two different numbers have no common member.
    pub async fn is_heard(&self) -> u64 {
        while self.sender.receiver_count() == 0 {
            self.begun.notified().await;
        }
        self.firsts.load(Ordering::Relaxed)
    }

    pub(crate) fn listen(&self) -> broadcast::Receiver<Event> {
        if self.sender.receiver_count() == 0 {
            self.firsts.fetch_add(1, Ordering::Relaxed);
        }
        let receiver = self.sender.subscribe();
        self.begun.notify_one();
        receiver
    }
}

/// How a stream writes its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A JSON object a line.
    Lines,
    /// Server-sent events.
    Sse,
}

impl Form {
    /// The form that a client's Accept header asks for.
    pub fn wanted(accept: Option<&str>) -> Self {
        let asks = accept.is_some_and(|accept| accept.contains("text/event-stream"));
        if asks { Form::Sse } else { Form::Lines }
    }

    fn content_type(self) -> &'static str {
        match self {
            Form::Lines => "application/x-ndjson",
            Form::Sse => "text/event-stream",
        }
    }

    fn write(self, event: &Event) -> String {
        let line = json_line(event);
        match self {
            Form::Lines => line,
            Form::Sse => format!("data: {line}\n"),
        }
    }
}

/// The events from now on, until the client leaves or lags behind, or the daemon ends.
pub fn stream(hub: &Hub, form: Form, stopped: Stopped, permit: OwnedSemaphorePermit) -> Response {
    let state = (hub.listen(), stopped, permit);
    let events = futures_util::stream::unfold(state, move |(mut events, mut stopped, permit)| async move {
        // The last events come before the end. An answer without an end would keep the daemon from ending.
        let next = tokio::select! {
            biased;
            next = events.recv() => next,
            () = stopped.wait() => return None,
        };
        match next {
            Ok(event) => {
                let bytes = Bytes::from(form.write(&event));
                Some((Ok::<_, Infallible>(bytes), (events, stopped, permit)))
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                debug!(missed, "a client does not read its events, and is dropped");
                None
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    });
    let headers = [(header::CONTENT_TYPE, form.content_type()), (header::CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(events)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_the_form_of_qmp() {
        let event = Event {
            event: EventName::SpaceWait,
            data: EventData { waiting: Some(3) },
            timestamp: Timestamp { seconds: 5, microseconds: 7 },
        };
        let line = "{\"event\":\"SPACE_WAIT\",\"data\":{\"waiting\":3},\
                    \"timestamp\":{\"seconds\":5,\"microseconds\":7}}\n";
        assert_eq!(Form::wanted(None).write(&event), line);
        assert_eq!(Form::wanted(Some("text/event-stream")).write(&event), format!("data: {line}\n"));
    }
    #[test]
    fn a_stream_ends_with_the_daemon_and_after_the_last_event() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let read = async {
            let (hub, (stop, stopped)) = (Hub::default(), Stopped::new());
            let permit = std::sync::Arc::new(tokio::sync::Semaphore::new(1)).acquire_owned().await;
            let answer = stream(&hub, Form::Lines, stopped, permit.expect("a permit"));
            hub.tell(EventName::FrontendLeft, EventData::default());
            stop.send(true).expect("the stream listens");
            axum::body::to_bytes(answer.into_body(), 1 << 16).await.expect("a body")
        };
        let read = async { tokio::time::timeout(std::time::Duration::from_secs(20), read).await };
        let bytes = runtime.block_on(read).expect("the stream ends");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.lines().count() == 1 && text.contains("FRONTEND_LEFT"), "{text}");
    }
}
