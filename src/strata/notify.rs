//! The service manager: reports the state of the daemon to it (the sd_notify protocol, without its library), and finds the
//! sockets that it passes.

use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::{debug, warn};
use vhost_blk::Stage;

/// The daemon accepts frontends.
pub const READY: &str = "READY=1";
/// The daemon is ending.
pub const STOPPING: &str = "STOPPING=1";
/// The daemon gets on.
pub const WATCHDOG: &str = "WATCHDOG=1";

/// Sends a state to the socket that `NOTIFY_SOCKET` names, if it is set. A failure to send is ignored.
pub fn send(state: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    match send_to(&name, state) {
        Ok(()) => {}
        // The manager has not read earlier states; nobody may be held up by that.
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            debug!("the service manager has no room for {state}");
        }
        Err(error) => warn!(%error, "the service manager could not be told {state}"),
    }
}

/// What the server does, as the service manager shows it.
pub fn status(stage: Stage) -> String {
    let text = match stage {
        Stage::Waiting => "waiting for a frontend",
        Stage::Attached => "attached to a frontend",
        Stage::Draining => "draining the requests in hand",
    };
    format!("STATUS={text}")
}

fn send_to(name: &OsString, state: &str) -> std::io::Result<()> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let sent = socket.send_to_addr(state.as_bytes(), &address)?;
    if sent == state.len() { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
}

/// How many sockets a service manager passes to this process (sd_listen_fds(3)).
pub fn passed_sockets() -> u32 {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") == Some(std::process::id()) { number("LISTEN_FDS").unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_arrive_by_path_and_by_abstract_name() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("notify");
        let by_path = UnixDatagram::bind(&path).expect("bound");
        send_to(&path.into_os_string(), READY).expect("sent");
        let name = format!("strata-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let by_name = UnixDatagram::bind_addr(&address).expect("bound");
        send_to(&format!("@{name}").into(), STOPPING).expect("sent");
        let mut buffer = [0; 64];
        let length = by_path.recv(&mut buffer).expect("received");
        assert_eq!(&buffer[..length], READY.as_bytes());
        let length = by_name.recv(&mut buffer).expect("received");
        assert_eq!(&buffer[..length], STOPPING.as_bytes());
        assert!(send_to(&"/nowhere/at/all".into(), READY).is_err());
    }
}
