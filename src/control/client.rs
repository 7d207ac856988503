//! The client of a control socket.

use std::io;
use std::path::Path;

use http_body_util::{BodyExt as _, Full};
pub use hyper::Method;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::failure::{ErrorBody, Failure};

/// A longer answer is not read.
const ANSWER_MAX: usize = 64 << 20;

/// Why a request has no good answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody can be reached on the socket.
    #[error("connecting failed: {0}")]
    Connect(io::Error),
    /// What answers does not speak HTTP, or has hung up.
    #[error("the other side gave no answer: {0}")]
    Http(#[from] hyper::Error),
    /// The daemon has refused, or failed.
    #[error("{}", .0.message)]
    Refused(Box<Failure>),
    /// It answered something that is not the daemon's.
    #[error("the answer makes no sense (status {0})")]
    Answer(u16),
}

/// A connection to a daemon.
pub struct Client {
    runtime: Runtime,
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens on the socket, or the host refuses.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let build = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = build.map_err(ClientError::Connect)?;
        let stream = runtime.block_on(UnixStream::connect(socket)).map_err(ClientError::Connect)?;
        let (sender, connection) = runtime.block_on(http1::handshake(TokioIo::new(stream)))?;
        // Its end shows in the requests.
        runtime.spawn(connection);
        Ok(Client { runtime, sender })
    }

    /// Sends a request, with a body in JSON if there is one, and returns the body of the answer.
    ///
    /// # Errors
    /// When there is no answer, or it is an error.
    pub fn request(
        &mut self,
        method: Method,
        path: &'static str,
        body: Option<String>,
    ) -> Result<Vec<u8>, ClientError> {
        let Client { runtime, sender } = self;
        runtime.block_on(async {
            let response = send(sender, method, path, body).await?;
            let status = response.status();
            let bytes = read(response).await?;
            if status.is_success() {
                return Ok(bytes);
            }
            let parsed = serde_json::from_slice::<ErrorBody>(&bytes);
            let refused = parsed.map_err(|_| ClientError::Answer(status.as_u16()))?;
            Err(ClientError::Refused(Box::new(refused.error)))
        })
    }

    /// Listens to the events, and hands on each piece of their text until `take` returns false or the daemon ends.
    ///
    /// # Errors
    /// When there is no answer, or the connection breaks.
    pub fn events(&mut self, mut take: impl FnMut(&[u8]) -> bool) -> Result<(), ClientError> {
        let Client { runtime, sender } = self;
        runtime.block_on(async {
            let mut response = send(sender, Method::GET, "/v1/events", None).await?;
            if !response.status().is_success() {
                return Err(ClientError::Answer(response.status().as_u16()));
            }
            while let Some(frame) = response.frame().await {
                if frame?.data_ref().is_some_and(|bytes| !take(bytes)) {
                    break;
                }
            }
            Ok(())
        })
    }
}

async fn send(
    sender: &mut http1::SendRequest<Full<Bytes>>,
    method: Method,
    path: &'static str,
    body: Option<String>,
) -> Result<Response<Incoming>, ClientError> {
    let body = Full::new(Bytes::from(body.unwrap_or_default()));
    let request = Request::builder().method(method).uri(path).header("Host", "strata").body(body);
    Ok(sender.send_request(request.expect("a path of this program is valid")).await?)
}

async fn read(mut response: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::new();
    while let Some(frame) = response.frame().await {
        bytes.extend_from_slice(frame?.data_ref().map_or(&[][..], |data| data));
        if bytes.len() > ANSWER_MAX {
            return Err(ClientError::Answer(response.status().as_u16()));
        }
    }
    Ok(bytes)
}
