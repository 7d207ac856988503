//! The routes of version 1, each with its description.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use names::shown;
use serde::Serialize;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::{
    Chain, DiskState, Event, LogLevel, Ping, Resize, Resized, Snapshot, SnapshotTaken, Stats, Version,
};
use crate::body::Body;
use crate::events::{self, Form};
use crate::failure::{ErrorBody, Kind};
use crate::metrics;
use crate::refusal::Refusal;
use crate::room::{Peer, Room, log_command};
use crate::text;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Strata's control socket",
        description = "HTTP/1.1 on the unix socket of `strata serve --control-socket`. Every error has the body of \
                       ErrorBody; only bytes that are no HTTP are answered by a status alone.",
        license(name = "Apache-2.0 OR MIT"),
    ),
    components(schemas(Event, ErrorBody))
)]
struct Description;

fn described() -> OpenApiRouter<Room> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(ping))
        .routes(routes!(version))
        .routes(routes!(disk))
        .routes(routes!(chain))
        .routes(routes!(stats))
        .routes(routes!(metrics))
        .routes(routes!(events))
        .routes(routes!(openapi))
        .routes(routes!(log_level))
        .routes(routes!(size))
        .routes(routes!(flush))
        .routes(routes!(snapshots))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(shutdown))
}

/// All routes, and an answer for whatever is none.
pub fn router() -> Router<Room> {
    let (router, _) = described().split_for_parts();
    router.fallback(no_such_path).method_not_allowed_fallback(async || Refusal::of_method())
}

/// The description of all routes, as JSON.
pub fn document() -> String {
    let (_, document) = described().split_for_parts();
    text::json(&document)
}

/// A value as the body of an answer.
struct Json<T>(T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], text::json(&self.0)).into_response()
    }
}

async fn no_such_path(uri: Uri) -> Refusal {
    let message = format!("there is no {}: /v1/openapi.json lists the paths", shown(uri.path()));
    Refusal::new(Kind::NotFound, &message)
}

/// Shows that the daemon answers
#[utoipa::path(get, path = "/v1/ping", responses((status = 200, description = "It does", body = Ping)))]
async fn ping() -> Json<Ping> {
    Json(Ping { pid: std::process::id() })
}

/// The version of the program
#[utoipa::path(get, path = "/v1/version", responses((status = 200, description = "The version", body = Version)))]
async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").to_owned() })
}

/// The disk, its state and its frontend
#[utoipa::path(get, path = "/v1/disk", responses((status = 200, description = "The disk", body = DiskState)))]
async fn disk(State(room): State<Room>) -> Json<DiskState> {
    Json(room.subject.disk())
}

/// The layers of the disk, the top image first
#[utoipa::path(
    get,
    path = "/v1/chain",
    responses(
        (status = 200, description = "The layers", body = Chain),
        (status = 409, description = "Another process has the image", body = ErrorBody),
        (status = 503, description = "A snapshot of the disk is being taken", body = ErrorBody),
    )
)]
async fn chain(State(room): State<Room>) -> Result<Json<Chain>, Refusal> {
    Ok(Json(room.subject.chain()?))
}

/// All counters
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, description = "The counters", body = Stats)))]
async fn stats(State(room): State<Room>) -> Json<Stats> {
    Json(room.subject.stats())
}

/// All counters in the text format of OpenMetrics, which Prometheus reads
#[utoipa::path(
    get,
    path = "/v1/metrics",
    responses((status = 200, description = "The counters", body = String, content_type = "application/openmetrics-text"))
)]
async fn metrics(State(room): State<Room>) -> impl IntoResponse {
    // While another process has the image, the rest is still worth knowing.
    let layers = room.subject.chain().map_or(Vec::new(), |chain| chain.layers);
    let text = metrics::text(&room.subject.disk(), &layers, &room.subject.stats());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)
}

/// The events from now on: a JSON object a line, or server-sent events if Accept asks for text/event-stream
///
/// The answer ends with the daemon. A client that does not read is dropped, and has to look at the disk's state again. So
/// has a client that begins to listen while another one does.
#[utoipa::path(
    get,
    path = "/v1/events",
    responses(
        (status = 200, description = "The events", body = Event, content_type = "application/x-ndjson"),
        (status = 503, description = "As many clients as may listen do so", body = ErrorBody),
    )
)]
async fn events(State(room): State<Room>, headers: HeaderMap) -> Result<Response, Refusal> {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let permit = room.stream()?;
    Ok(events::stream(&room.hub, Form::wanted(accept), room.stopped, permit))
}

/// This description
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    responses((status = 200, description = "The description", body = Object, content_type = "application/json"))
)]
async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], document())
}

/// Changes what is logged, until the daemon ends
#[utoipa::path(
    put,
    path = "/v1/disk/log-level",
    request_body = LogLevel,
    responses((status = 204, description = "Done"), (status = 400, description = "It is no level and no filter", body = ErrorBody))
)]
async fn log_level(
    State(room): State<Room>,
    Extension(peer): Extension<Peer>,
    Body(wanted): Body<LogLevel>,
) -> Result<StatusCode, Refusal> {
    log_command(peer, "change the log level");
    room.subject.set_log_level(&wanted.level)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives the disk another size, while it is in use
#[utoipa::path(
    put,
    path = "/v1/disk/size",
    request_body = Resize,
    responses(
        (status = 200, description = "It has that size now", body = Resized),
        (status = 400, description = "It is no size of a disk", body = ErrorBody),
        (status = 409, description = "The disk cannot have that size now, or would lose data", body = ErrorBody),
        (status = 500, description = "The host refused, or the disk has failed", body = ErrorBody),
        (status = 503, description = "Other commands are under way, or the daemon ends", body = ErrorBody),
        (status = 507, description = "The host has no space", body = ErrorBody),
    )
)]
async fn size(
    State(room): State<Room>,
    Extension(peer): Extension<Peer>,
    Body(wanted): Body<Resize>,
) -> Result<Json<Resized>, Refusal> {
    log_command(peer, "resize the disk");
    Ok(Json(room.run(move |subject| subject.resize(wanted)).await?))
}

/// Makes every write durable that was acknowledged before
#[utoipa::path(
    post,
    path = "/v1/disk/flush",
    responses(
        (status = 204, description = "Done"),
        (status = 409, description = "Another process has the image, or the guest of a killed daemon is not back", body = ErrorBody),
        (status = 500, description = "The host refused, or the disk has failed", body = ErrorBody),
        (status = 503, description = "Other commands are under way", body = ErrorBody),
        (status = 507, description = "The host has no space for metadata", body = ErrorBody),
    )
)]
async fn flush(State(room): State<Room>, Extension(peer): Extension<Peer>) -> Result<StatusCode, Refusal> {
    log_command(peer, "flush");
    room.run(|subject| subject.flush()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a snapshot of the disk in use: an overlay becomes the top image, and the old top stays as the disk was
///
/// The next daemon finds the overlay by a pointer beside the image that its command line names.
#[utoipa::path(
    post,
    path = "/v1/disk/snapshots",
    request_body = Snapshot,
    responses(
        (status = 200, description = "The overlay is the top image", body = SnapshotTaken),
        (status = 400, description = "The overlay has no absolute path", body = ErrorBody),
        (status = 403, description = "The overlay would lie where it may not", body = ErrorBody),
        (status = 404, description = "Its folder does not exist", body = ErrorBody),
        (status = 409, description = "The disk cannot have one now, or the file exists", body = ErrorBody),
        (status = 500, description = "The host refused, or the disk has failed", body = ErrorBody),
        (status = 503, description = "Requests in flight do not end, or other commands are under way", body = ErrorBody),
        (status = 507, description = "The host has no space", body = ErrorBody),
    )
)]
async fn snapshots(
    State(room): State<Room>,
    Extension(peer): Extension<Peer>,
    Body(wanted): Body<Snapshot>,
) -> Result<Json<SnapshotTaken>, Refusal> {
    log_command(peer, "take a snapshot");
    Ok(Json(room.run(move |subject| subject.snapshot(wanted)).await?))
}

/// Pauses the disk: requests in flight end, everything becomes durable, and later requests wait until it is resumed
///
/// Pausing a paused disk makes everything durable again. The daemon can be stopped or replaced meanwhile.
/// A successor is not paused: it serves at once.
#[utoipa::path(
    post,
    path = "/v1/disk/pause",
    responses(
        (status = 204, description = "It is paused"),
        (status = 500, description = "The host refused, or the disk has failed", body = ErrorBody),
        (status = 503, description = "Requests in flight do not end, or other commands are under way", body = ErrorBody),
        (status = 507, description = "The host has no space for metadata", body = ErrorBody),
    )
)]
async fn pause(State(room): State<Room>, Extension(peer): Extension<Peer>) -> Result<StatusCode, Refusal> {
    log_command(peer, "pause the disk");
    room.run(|subject| subject.pause()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Ends a pause of the disk; without one it does nothing
#[utoipa::path(post, path = "/v1/disk/resume", responses((status = 204, description = "Requests pass")))]
async fn resume(State(room): State<Room>, Extension(peer): Extension<Peer>) -> StatusCode {
    log_command(peer, "resume the disk");
    room.subject.resume();
    StatusCode::NO_CONTENT
}

/// Begins to end the daemon, as SIGTERM does: requests in hand are finished, and the image is closed
#[utoipa::path(post, path = "/v1/shutdown", responses((status = 202, description = "The end has begun")))]
async fn shutdown(State(room): State<Room>, Extension(peer): Extension<Peer>) -> StatusCode {
    log_command(peer, "shut down");
    room.subject.shut_down();
    StatusCode::ACCEPTED
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To write the file anew after a change: `STRATA_WRITE_API=1 cargo test -p control`.
    #[test]
    fn the_document_in_docs_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api/openapi.json");
        let document = document();
        if std::env::var_os("STRATA_WRITE_API").is_some() {
            std::fs::write(path, &document).expect("the document is written");
        }
        let kept = std::fs::read_to_string(path).expect("docs/api/openapi.json");
        assert!(kept == document, "docs/api/openapi.json is not current: STRATA_WRITE_API=1 writes it anew");
    }
}
