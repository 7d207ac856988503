//! The JSON body of a request: bounded in size and in time, and refused with a reason.

use axum::extract::{FromRequest, Request};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::bounds::{BODY_MAX, BODY_TIMEOUT};
use crate::failure::Kind;
use crate::refusal::Refusal;

/// A body. Its content type does not matter: it is JSON in any case.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let whole = Limited::new(request.into_body(), BODY_MAX).collect();
        let Ok(collected) = tokio::time::timeout(BODY_TIMEOUT, whole).await else {
            return Err(Refusal::new(Kind::Timeout, &format!("the body took more than {BODY_TIMEOUT:?}")));
        };
        let bytes = match collected {
            Ok(collected) => collected.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                return Err(Refusal::new(Kind::TooLarge, &format!("a body has at most {BODY_MAX} bytes")));
            }
            Err(error) => {
                return Err(Refusal::new(Kind::Usage, &format!("the body cannot be read: {error}")));
            }
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Body).map_err(|error| Refusal::new(Kind::Usage, &format!("the body is wrong: {error}")))
    }
}
