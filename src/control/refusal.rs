//! An error as an answer: its status and its body.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::failure::{Failure, Kind};

/// A request that is refused, or that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    status: StatusCode,
    failure: Box<Failure>,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Refusal { status: status_of(failure.kind), failure: Box::new(failure) }
    }
}

impl Refusal {
    /// A refusal with the status that its kind has.
    pub fn new(kind: Kind, message: &str) -> Self {
        Failure::new(kind, message).into()
    }

    /// A path that exists, with a method that it does not have.
    pub fn of_method() -> Self {
        let failure = Failure::usage("this path has no such method: /v1/openapi.json lists them");
        Refusal { status: StatusCode::METHOD_NOT_ALLOWED, failure: Box::new(failure) }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, [(header::CONTENT_TYPE, "application/json")], self.failure.json()).into_response()
    }
}

fn status_of(kind: Kind) -> StatusCode {
    match kind {
        Kind::Usage | Kind::NotSpecified => StatusCode::BAD_REQUEST,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::PermissionDenied | Kind::Outside => StatusCode::FORBIDDEN,
        Kind::InUse | Kind::Refused | Kind::NothingToCheck => StatusCode::CONFLICT,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Busy => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Timeout => StatusCode::REQUEST_TIMEOUT,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::WrongFormat | Kind::Damaged | Kind::Io | Kind::Socket | Kind::Host => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}
