//! Shared by the tests of this crate: a disk in memory, a server on a socket, and a hand-driven guest.
//!
//! The crate itself uses nothing of this.
#![allow(dead_code, reason = "every test program uses another part")]

pub mod cloud;
pub mod disk;
pub mod guest;
pub mod host;
pub mod log;
pub mod packed;
pub mod raw;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use tempfile::TempDir;
use vhost_blk::{BlockDevice, ServeOptions, Server, SessionError, StopHandle};

/// A server on its own thread, stopped when dropped.
pub struct TestServer {
    pub path: PathBuf,
    pub stop: StopHandle,
    pub options: ServeOptions,
    thread: Option<JoinHandle<Result<(), SessionError>>>,
    _directory: TempDir,
}

impl TestServer {
    pub fn start<D: BlockDevice>(device: Arc<D>, options: ServeOptions) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.sock");
        let server = Server::bind(&path).expect("a socket");
        let stop = StopHandle::new().expect("a stop handle");
        let (its_stop, its_options) = (stop.clone(), options.clone());
        let thread = std::thread::spawn(move || server.serve(&device, &its_options, &its_stop));
        TestServer { path, stop, options, thread: Some(thread), _directory: directory }
    }

    /// Stops the server and returns its result.
    pub fn finish(mut self) -> Result<(), SessionError> {
        self.stop.stop();
        self.thread.take().expect("joined once").join().expect("the server does not panic")
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the server does not panic").expect("the server ends well");
            }
        }
    }
}
