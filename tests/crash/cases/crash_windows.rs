//! The crash windows in which QEMU 10 loses flushed data, by name (docs/durability.md, "Freed clusters").

use std::time::Duration;

use strata_crash::journal::Op;
use strata_crash::shape::Start;
use strata_crash::tally::Tally;
use strata_crash::walk::Walker;
use strata_crash::windows::{compressed, discard, start, try_all, unmap, written_anew, written_over};

fn check(name: &str, start: &Start, free: &[Op]) {
    let tally = Tally::new(Duration::from_secs(600));
    for finding in try_all(start, free, &mut Walker::new(&tally)) {
        tally.found(finding);
    }
    tally.conclude(name);
}

#[test]
fn a_freed_cluster_is_not_reused_before_its_unlink_is_durable_after_discard() {
    check("after a discard", &start(), &discard());
}

#[test]
fn a_freed_cluster_is_not_reused_before_its_unlink_is_durable_after_write_zeroes_with_unmap() {
    check("after write zeroes with unmap", &start(), &unmap());
}

#[test]
fn a_freed_cluster_is_not_reused_before_its_unlink_is_durable_after_it_was_written_anew() {
    check("after the address was written anew", &start(), &written_anew());
}

#[test]
fn the_space_of_a_compressed_cluster_is_not_reused_before_its_unlink_is_durable() {
    check("after a compressed cluster was written over", &compressed(), &written_over());
}
