//! The control socket of a daemon: HTTP/1.1 with JSON on a unix socket, its description as OpenAPI, its metrics, and the
//! client for it.
//!
//! Owns the form of every answer (`api`), the routes, the bounds on clients, and the thread that serves them. Knows no
//! image and no virtual machine: it asks a [`Subject`], and gets events from a [`Hub`]. No lock of the data path is held
//! here while anything is waited for.
#![forbid(unsafe_code)]

pub mod api;
mod body;
mod bounds;
pub mod client;
mod events;
mod failure;
mod metrics;
mod patient;
mod refusal;
mod room;
mod routes;
mod server;
mod stopped;
mod subject;
pub mod text;
mod watch;

pub use events::Hub;
pub use failure::{Failure, Kind};
pub use server::Control;
pub use subject::Subject;
