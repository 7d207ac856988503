//! The bounds on clients of the control socket: how many, how much they send, and how long they take.

use std::time::Duration;

/// Connections at a time. More wait in the backlog of the socket.
pub const CONNECTIONS_MAX: usize = 64;
/// Streams of events at a time, so that some connections are always left for requests.
pub const STREAMS_MAX: usize = 16;
/// Commands that do I/O at a time, each on a thread of its own.
pub const COMMANDS_MAX: usize = 2;
/// Bytes of a request line and its headers.
pub const HEAD_MAX: usize = 16 << 10;
/// Headers of a request.
pub const HEADERS_MAX: usize = 64;
/// Bytes of a request's body.
pub const BODY_MAX: usize = 64 << 10;
/// Events that a stream may lag behind before it is dropped.
pub const EVENTS_MAX: usize = 128;
/// From the start of the wait for a request to the end of its headers. So it is also how long an idle connection stays.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// From the first byte of a body to its last.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may leave an answer unread.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long clients get to read their last answers when the daemon ends.
pub const LEAVE_TIMEOUT: Duration = Duration::from_millis(500);
/// The time between two looks for changes of the disk that nobody reports.
pub const WATCH_EVERY: Duration = Duration::from_millis(500);
