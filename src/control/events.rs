//! Events: the hub that any thread reports to, and the streams by which clients hear of them.
//!
//! A stream has a bounded buffer. A client that lets it overflow is dropped, as it has missed events.

use std::convert::Infallible;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use tokio::sync::{Notify, OwnedSemaphorePermit, broadcast};
use tracing::debug;

use crate::api::{Event, EventData, EventName, Timestamp};
use crate::bounds::EVENTS_MAX;
use crate::text::json_line;

/// Hands events to all clients that listen.
#[derive(Debug)]
pub struct Hub {
    sender: broadcast::Sender<Event>,
    /// Notified when a client begins to listen.
    begun: Notify,
}

impl Default for Hub {
    fn default() -> Self {
        Hub { sender: broadcast::Sender::new(EVENTS_MAX), begun: Notify::new() }
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

    /// Waits until a client listens.
    pub async fn is_heard(&self) {
        while self.sender.receiver_count() == 0 {
            self.begun.notified().await;
        }
    }

    fn listen(&self) -> broadcast::Receiver<Event> {
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

/// The events from now on, until the client leaves or lags behind.
pub fn stream(hub: &Hub, form: Form, permit: OwnedSemaphorePermit) -> Response {
    let state = (hub.listen(), permit);
    let events = futures_util::stream::unfold(state, move |(mut events, permit)| async move {
        match events.recv().await {
            Ok(event) => {
                let bytes = Bytes::from(form.write(&event));
                Some((Ok::<_, Infallible>(bytes), (events, permit)))
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
}
