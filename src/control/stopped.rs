//! Whether the daemon ends, for tasks of the control thread that would wait for other things.

use tokio::sync::watch;

/// Says when the daemon ends.
#[derive(Clone, Debug)]
pub struct Stopped(watch::Receiver<bool>);

impl Stopped {
    /// With the handle that says so: by `true`, or by going away.
    pub fn new() -> (watch::Sender<bool>, Self) {
        let (stop, stopped) = watch::channel(false);
        (stop, Stopped(stopped))
    }

    /// Waits until the daemon ends.
    pub async fn wait(&mut self) {
        // It fails if the handle is gone, which is an end, too.
        let _ = self.0.wait_for(|stopped| *stopped).await;
    }
}
