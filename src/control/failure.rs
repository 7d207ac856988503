//! An error as programs see it: `{"error": {"kind", "message", "file", "structure", "offset", "hint"}}`.
//!
//! Owns that form and the kinds, for the control socket and for commands that print JSON. Every field is always present;
//! an unknown one is null.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::text;

/// The kind of an error. Programs depend on it, so the names never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The command line or the request is wrong.
    Usage,
    /// A file does not exist.
    NotFound,
    /// The host denies this user access.
    PermissionDenied,
    /// Another process uses the image or the socket.
    InUse,
    /// A file lies outside the allowed folders.
    Outside,
    /// The file is in another format, or is no image.
    WrongFormat,
    /// The image's bytes break its format.
    Damaged,
    /// The image needs a feature that is not implemented.
    Unsupported,
    /// The format has no metadata that could be checked.
    NothingToCheck,
    /// The request is valid, but this image does not allow it.
    Refused,
    /// An option must specify more, such as a format or a file.
    NotSpecified,
    /// The host has no space.
    NoSpace,
    /// The host's I/O failed.
    Io,
    /// The socket cannot be used.
    Socket,
    /// The host refused something else.
    Host,
    /// As much as the daemon does at a time is under way: try again later.
    Busy,
    /// The request was not complete in time.
    Timeout,
    /// The request is larger than it may be.
    TooLarge,
}

/// An error for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// What is wrong, in one line.
    pub message: String,
    /// The file that the error is about.
    pub file: Option<String>,
    /// The structure of the file.
    pub structure: Option<String>,
    /// The structure's offset in the file, in bytes.
    pub offset: Option<u64>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Failure {
    /// An error that is about no file.
    pub fn new(kind: Kind, message: &str) -> Self {
        let message = names::one_line(message.trim()).to_string();
        Failure { kind, message, file: None, structure: None, offset: None, hint: None }
    }

    /// A wrong command line.
    pub fn usage(message: &str) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// As JSON, under the key `error`.
    pub fn json(&self) -> String {
        text::json(&ErrorBody { error: self.clone() })
    }
}

/// The body of an answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: Failure,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_there_whatever_is_known() {
        let text = Failure::usage("error: it is\nwrong\n").json();
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let keys: Vec<&String> = value["error"].as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["file", "hint", "kind", "message", "offset", "structure"]);
        assert_eq!((&value["error"]["kind"], &value["error"]["file"]), (&"usage".into(), &().into()));
    }
}
