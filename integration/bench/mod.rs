//! The benchmark against a rival: one client, the same images, two servers by turns.
//!
//! [`case`] says what is measured, [`gallery`] makes the images, [`server`] runs a server, [`measure`] takes one
//! sample, [`verify`] looks whether the data is right, [`contest`] has the turns, [`report`] shows the outcome. Two
//! limits go along: a bare loop on the file ([`bare`]) and a device that does nothing ([`null`]).

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
