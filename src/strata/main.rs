//! The program `strata`: command line and the gluing of a disk to a vhost-user session.
fn main() {}
