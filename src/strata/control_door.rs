//! The control socket between the rounds of serving: where it is, and when it answers.
//!
//! A socket file is gone while another daemon may take this one's place, so that the other can make its own. An inherited
//! listener stays open for the next round.

use std::sync::Arc;

use control::{Control, Hub, Subject};
use tracing::info;
use vhost_blk::Listening;

use crate::cli::ControlArgs;
use crate::error::ProgramError;
use crate::listen::Place;

/// Where the control socket is.
pub struct ControlDoor {
    place: Place,
    /// An inherited listener, while no round of serving uses it.
    kept: Option<Listening>,
}

/// A control socket that answers, until dropped. Nothing has its subject afterwards.
pub struct Controlled<'a> {
    door: &'a mut ControlDoor,
    /// Both are taken by the drop.
    thread: Option<Control>,
    socket: Option<Listening>,
}

impl ControlDoor {
    /// Chooses the control socket from the options, if there is to be one.
    ///
    /// # Errors
    /// As [`Place::of_control`].
    pub fn choose(options: &ControlArgs) -> Result<Option<Self>, ProgramError> {
        let place = Place::of_control(options).map_err(of_control)?;
        Ok(place.map(|place| ControlDoor { place, kept: None }))
    }

    /// Listens and answers for `subject`.
    ///
    /// # Errors
    /// When another program listens on the socket, or the host refuses.
    pub fn open(&mut self, subject: impl Subject, hub: Arc<Hub>) -> Result<Controlled<'_>, ProgramError> {
        let listens = || Ok(self.place.listen()?.into_listening()?);
        let socket = match self.kept.take() {
            Some(socket) => socket,
            None => listens().map_err(of_control)?,
        };
        let started = socket.listener().try_clone();
        let started = started.and_then(|listener| Control::start(listener, Arc::new(subject), hub));
        let thread =
            started.map_err(|source| ProgramError::Host { step: "starting the control thread", source })?;
        info!("control socket: {}", self.place);
        Ok(Controlled { door: self, thread: Some(thread), socket: Some(socket) })
    }
}

impl Drop for Controlled<'_> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.stop();
        }
        let inherited = matches!(self.door.place, Place::Descriptor(_));
        self.door.kept = self.socket.take().filter(|_| inherited);
    }
}

fn of_control(error: ProgramError) -> ProgramError {
    ProgramError::ControlSocket(Box::new(error))
}
