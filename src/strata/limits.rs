//! Limits of the host: failures caused by one or by a service of the host, anywhere in the program, and what to do
//! about them.

use std::error::Error;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// The longest path of a unix socket in bytes: 108 with the terminating zero.
pub const SOCKET_PATH_MAX: usize = 107;

/// What to do, if one of the error's causes is such a host failure.
pub fn hint(error: &(dyn Error + 'static)) -> Option<String> {
    let own = error.downcast_ref::<io::Error>().and_then(Errno::from_io_error).and_then(hint_of);
    own.or_else(|| hint(error.source()?))
}

fn hint_of(errno: Errno) -> Option<String> {
    match errno {
        Errno::MFILE => Some(format!(
            "this process may have {} files open at a time: raise the hard limit (`ulimit -Hn`, LimitNOFILE= of a \
             systemd unit)",
            getrlimit(Resource::Nofile).current.map_or("any number of".to_owned(), |limit| limit.to_string())
        )),
        Errno::NFILE => Some("the host's limit of open files is reached: raise sysctl fs.file-max".to_owned()),
        Errno::NOLCK => Some(
            "the file system's lock service does not answer (NFS: is rpc.statd running, and the server reachable?); \
             --allow-unlocked goes on without a lock, if no other program uses the image"
                .to_owned(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("it failed")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_cause_deep_inside_is_found() {
        let of = |errno: Errno| hint(&Outer(errno.into()));
        let limit = getrlimit(Resource::Nofile).current.expect("a limit").to_string();
        assert!(of(Errno::MFILE).expect("a hint").contains(&limit));
        assert!(of(Errno::NFILE).expect("a hint").contains("fs.file-max"));
        assert!(of(Errno::NOLCK).expect("a hint").contains("--allow-unlocked"));
        assert_eq!(of(Errno::NOENT), None);
    }
}
