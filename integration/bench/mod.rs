//! The benchmark against a rival: one client, the same images, two servers in alternating turns.
//!
//! [`case`] lists the cases, [`gallery`] creates the images, [`server`] runs a server. [`measure`] takes one
//! sample, [`verify`] verifies the data, [`contest`] runs the turns, [`report`] shows the outcome. Two limits are
//! measured too: a bare loop on the file ([`bare`]) and a device that does nothing ([`null`]).

pub mod bare;
pub mod case;
pub mod contest;
pub mod gallery;
pub mod measure;
pub mod null;
pub mod process;
pub mod report;
pub mod server;
pub mod statistics;
pub mod touch;
pub mod verify;
