//! Real guests on real daemons. Every test ends with `qemu-img check`. After an orderly shutdown of the guest, the
//! contents that it read are compared with those that QEMU's tools read.
//!
//! `STRATA_TEST_BACKEND` chooses the daemon (default strata), and `STRATA_REQUIRE_TOOLS=1` turns a skip into a
//! failure. `STRATA_GUEST_KILLS` is the number of kills of the daemon under a guest (3), `STRATA_GUEST_RESTARTS`
//! that of kills under a guest that lives on (5). `STRATA_KILL_SEED` chooses the moments. `cargo verify` or `cargo
//! demo` prepares the machine; these tests install nothing.
//! `STRATA_TEST_QEMU` is another QEMU for the machines, such as version 7.2 beside the installed one.

mod clients;

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use strata_integration::crash::{self, Moment, Record};
use strata_integration::daemon::{Backend, Profile, ServeSpec};
use strata_integration::guest::GuestKit;
use strata_integration::image::{self, Backing};
use strata_integration::machine::Accelerator;
use strata_integration::scenario::{self, Work};
use strata_integration::stand::{self, Restart, Stand, Visit};
use strata_integration::{picture, setup};
use strata_kit::random::Random;

const MIB: u64 = 1 << 20;
/// The disks' size.
const DISK_MIB: u64 = 256;

/// Allows one machine at a time, because a machine uses both cores. This is for plain `cargo test`; nextest, which runs
/// each test in its own process, has a test group for it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number from the environment.
fn setting(name: &str, fallback: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} must be a number, not {text}")),
        Err(_) => Ok(fallback),
    }
}

/// The guest, or the reason why it is not prepared.
fn guest() -> Result<std::result::Result<GuestKit, String>> {
    let missing: Vec<&str> = setup::missing_tools().iter().map(|tool| tool.program).collect();
    if !missing.is_empty() {
        return Ok(Err(missing.join(" ")));
    }
    Ok(GuestKit::find()?.ok_or_else(|| "a prepared guest".to_owned()))
}

/// Skips a test with a message.
fn skip(name: &str, reason: &str) -> Result<()> {
    let required = std::env::var("STRATA_REQUIRE_TOOLS").is_ok_and(|value| value == "1");
    anyhow::ensure!(!required, "{reason} missing, and STRATA_REQUIRE_TOOLS=1: run cargo verify");
    writeln!(std::io::stderr(), "SKIPPED {name}: {reason} missing (cargo verify prepares the machine)")?;
    Ok(())
}

/// Runs `test` on a stand, or skips it with a message. The message goes to standard error directly, because the harness
/// hides what a passing test prints.
fn with_stand(name: &str, test: impl FnOnce(&Stand, &Path) -> Result<()>) -> Result<()> {
    with_rings(name, false, test)
}

/// As [`with_stand`]; the guest may use packed rings if `packed` is true.
fn with_rings(name: &str, packed: bool, test: impl FnOnce(&Stand, &Path) -> Result<()>) -> Result<()> {
    let _alone = alone();
    let kit = match guest()? {
        Ok(kit) => kit,
        Err(reason) => return skip(name, &reason),
    };
    let scratch = stand::scratch()?;
    let program = Backend::from_environment()?.program(Profile::Dev)?;
    let accelerator = Accelerator::choose(&kit)?;
    let serve = ServeSpec {
        image: scratch.path().join("top.qcow2"),
        format: "qcow2".to_owned(),
        socket: scratch.path().join("disk.sock"),
        queues: 2,
        serial: "vm-test".to_owned(),
        io_thread: false,
    };
    let stand = Stand { kit, accelerator, program, serve, packed, folder: scratch.path().join("runs") };
    test(&stand, scratch.path())
}

/// Runs both visits, then checks the image from the host.
fn file_system_lives(stand: &Stand, folder: &Path, work: &Work) -> Result<()> {
    let flat = folder.join("before.raw");
    image::flatten(&stand.serve.image, &stand.serve.format, &flat)?;
    let base = image::md5(&flat, work.base_mib)?;
    std::fs::remove_file(&flat)?;
    let first = scenario::first_visit(stand, "first", work, &base, &mut |_| {})?;
    image::expect_clean(&stand.serve.image)?;
    let second = scenario::second_visit(stand, "second", DISK_MIB, &first.files)?;
    scenario::host_agrees(stand, &second, DISK_MIB, &first.files, folder)?;
    if stand.program.backend == Backend::Strata {
        assert_eq!(first.visit.fact("disk.serial")?, stand.serve.serial);
    }
    println!(
        "{} files kept, fio wrote {}, {} trimmed, visits {} and {}",
        first.files.len(),
        picture::bytes(first.fio.write.bytes),
        picture::bytes(first.visit.number("trimmed")?),
        picture::seconds(first.visit.took),
        picture::seconds(second.took),
    );
    Ok(())
}

#[test]
fn a_file_system_on_an_overlay_survives_a_reboot() -> Result<()> {
    with_stand("a_file_system_on_an_overlay_survives_a_reboot", |stand, folder| {
        let base = folder.join("base.qcow2");
        image::create(&base, "qcow2", DISK_MIB * MIB, None, "")?;
        image::write_pattern(&base, "qcow2", 0, 20 * MIB, 0xb1)?;
        image::write_pattern(&base, "qcow2", 21 * MIB + 512, 4096, 0xb2)?;
        let below = Backing { image: &base, format: "qcow2" };
        image::create(&stand.serve.image, "qcow2", DISK_MIB * MIB, Some(below), "")?;
        let work = Work { fio_mib: 12, mkfs_options: String::new(), base_mib: 32 };
        file_system_lives(stand, folder, &work)
    })
}

/// Creates a chain of raw, qcow2 with small clusters, qcow2 version 2, qcow2. Each covers a part of the image below;
/// the lower images are shorter than the disk.
fn four_layers(folder: &Path, top: &Path) -> Result<()> {
    let [raw, small, old] = ["base.raw", "small.qcow2", "old.qcow2"].map(|name| folder.join(name));
    image::create(&raw, "raw", 160 * MIB, None, "")?;
    image::write_pattern(&raw, "raw", 0, 160 * MIB, 0x11)?;
    let below = Backing { image: &raw, format: "raw" };
    image::create(&small, "qcow2", 200 * MIB, Some(below), "cluster_size=4k")?;
    image::write_pattern(&small, "qcow2", 8 * MIB + 4096, 16 * MIB, 0x22)?;
    image::write_pattern(&small, "qcow2", 170 * MIB, 10 * MIB, 0x23)?;
    let below = Backing { image: &small, format: "qcow2" };
    image::create(&old, "qcow2", DISK_MIB * MIB, Some(below), "compat=0.10")?;
    image::write_pattern(&old, "qcow2", 16 * MIB + 512, 20 * MIB, 0x33)?;
    image::write_pattern(&old, "qcow2", 190 * MIB, 30 * MIB, 0x34)?;
    let below = Backing { image: &old, format: "qcow2" };
    image::create(top, "qcow2", DISK_MIB * MIB, Some(below), "")?;
    image::write_pattern(top, "qcow2", 30 * MIB + 1024, 5 * MIB, 0x44)
}

#[test]
fn a_file_system_on_a_chain_of_four_survives_a_reboot() -> Result<()> {
    with_stand("a_file_system_on_a_chain_of_four_survives_a_reboot", |stand, folder| {
        four_layers(folder, &stand.serve.image)?;
        // No discard at mkfs, so that the file system writes over the layers' data.
        let work = Work { fio_mib: 12, mkfs_options: "-E nodiscard".to_owned(), base_mib: DISK_MIB };
        file_system_lives(stand, folder, &work)
    })
}

#[test]
fn synced_data_survives_killed_daemons() -> Result<()> {
    with_stand("synced_data_survives_killed_daemons", |stand, folder| {
        let kills = setting("STRATA_GUEST_KILLS", 3)?;
        let seed = setting("STRATA_KILL_SEED", 1)?;
        // Half of fio's area lies over the base image.
        let (base, base_mib, byte) = (folder.join("base.raw"), crash::FILES_MIB + 24, 0x5a);
        image::create(&base, "raw", base_mib * MIB, None, "")?;
        image::write_pattern(&base, "raw", 0, base_mib * MIB, byte)?;
        let below = Backing { image: &base, format: "raw" };
        image::create(&stand.serve.image, "qcow2", crash::DISK_MIB * MIB, Some(below), "")?;
        let mut random = Random::new(seed);
        let mut record = Record::new(base_mib, byte);
        for kill in 1..=kills {
            let moment = Moment { passes: 2 + random.below(3) as usize, files: random.below(24) as usize };
            let crash = record.life(stand, moment, folder).with_context(|| format!("seed {seed}"))?;
            let (files, passes) = crash.synced;
            println!(
                "kill {kill} of {kills}, seed {seed}: {files} files and {passes} passes of fio synced, {:?}, image {:?}",
                crash.found, crash.health,
            );
        }
        record.last_life(stand).with_context(|| format!("seed {seed}"))?;
        match image::check(&stand.serve.image)? {
            image::Health::Broken(words) => bail!("seed {seed}: the image is damaged at the end:\n{words}"),
            image::Health::Clean | image::Health::Leaks(_) => Ok(()),
        }
    })
}

/// Expects that QEMU reads the same from the image as the guest did: the disk's first `sum_mib` MiB.
fn expect_same_disk(stand: &Stand, folder: &Path, visit: &Visit, sum_mib: u64) -> Result<()> {
    let flat = folder.join("flat.raw");
    image::flatten(&stand.serve.image, &stand.serve.format, &flat)?;
    assert_eq!(visit.fact("disk.md5")?, image::md5(&flat, sum_mib)?);
    Ok(())
}

/// The passes of fio that the guest wrote and verified. QEMU must read the same as the guest.
fn verified_passes(stand: &Stand, folder: &Path, visit: &Visit, sum_mib: u64) -> Result<usize> {
    expect_same_disk(stand, folder, visit, sum_mib)?;
    Ok(visit.facts.iter().filter(|(key, _)| key == "passes").count())
}

/// Restarts the daemon under a guest that writes and verifies with its write cache off, and checks the image.
fn lives_on(stand: &Stand, folder: &Path, restarts: u64, how: Restart) -> Result<()> {
    if stand.program.backend != Backend::Strata {
        return Ok(());
    }
    let seed = setting("STRATA_KILL_SEED", 1)?;
    const AREA_MIB: u64 = 8;
    image::create(&stand.serve.image, "qcow2", DISK_MIB * MIB, None, "")?;
    let script = stand::verifying(AREA_MIB, "write through");
    let visit = stand.restarts("restarts", &script, (restarts, how), &mut Random::new(seed));
    let visit = visit.with_context(|| format!("seed {seed}"))?;
    assert_eq!(visit.number("errors")?, 0, "the guest saw errors");
    assert_eq!(visit.number("packed")?, u64::from(stand.packed), "the kind of its rings");
    for key in ["disk.cache", "disk.cache.end"] {
        assert_eq!(visit.fact(key)?, "write through");
    }
    let passes = verified_passes(stand, folder, &visit, 2 * AREA_MIB)?;
    println!("{restarts} restarts ({how:?}), seed {seed}: {passes} passes of fio written and verified");
    Ok(())
}

/// Kills the daemon under a guest that lives on.
fn lives_on_after_kills(stand: &Stand, folder: &Path) -> Result<()> {
    lives_on(stand, folder, setting("STRATA_GUEST_RESTARTS", 5)?, Restart::Kill)?;
    match image::check(&stand.serve.image)? {
        image::Health::Broken(words) => bail!("the image is damaged at the end:\n{words}"),
        image::Health::Clean | image::Health::Leaks(_) => Ok(()),
    }
}

#[test]
fn a_guest_does_not_notice_killed_daemons() -> Result<()> {
    with_stand("a_guest_does_not_notice_killed_daemons", lives_on_after_kills)
}

#[test]
fn a_guest_with_packed_rings_does_not_notice_killed_daemons() -> Result<()> {
    with_rings("a_guest_with_packed_rings_does_not_notice_killed_daemons", true, lives_on_after_kills)
}

/// Migrates a guest that writes and verifies, and checks the image.
fn moves(stand: &Stand, folder: &Path) -> Result<()> {
    if stand.program.backend != Backend::Strata {
        return Ok(());
    }
    let moves = setting("STRATA_GUEST_MOVES", 2)?;
    const AREA_MIB: u64 = 8;
    image::create(&stand.serve.image, "qcow2", DISK_MIB * MIB, None, "")?;
    let script = stand::verifying(AREA_MIB, "write back");
    let (visit, moved) = stand.migrations("migration", &script, moves)?;
    assert_eq!(visit.number("errors")?, 0, "the guest saw errors");
    assert_eq!(visit.number("packed")?, u64::from(stand.packed), "the kind of its rings");
    let passes = verified_passes(stand, folder, &visit, 2 * AREA_MIB)?;
    image::expect_clean(&stand.serve.image)?;
    println!("{moved:?}; {passes} passes of fio written and verified");
    Ok(())
}

#[test]
fn a_guest_does_not_notice_that_it_is_migrated() -> Result<()> {
    with_stand("a_guest_does_not_notice_that_it_is_migrated", moves)
}

#[test]
fn a_guest_with_packed_rings_does_not_notice_that_it_is_migrated() -> Result<()> {
    with_rings("a_guest_with_packed_rings_does_not_notice_that_it_is_migrated", true, moves)
}

/// Replaces the daemon under a guest that lives on.
fn lives_on_after_replacements(stand: &Stand, folder: &Path) -> Result<()> {
    lives_on(stand, folder, setting("STRATA_GUEST_RESTARTS", 5)?, Restart::Planned)?;
    image::expect_clean(&stand.serve.image)
}

#[test]
fn a_guest_does_not_notice_replaced_daemons() -> Result<()> {
    with_stand("a_guest_does_not_notice_replaced_daemons", lives_on_after_replacements)
}

#[test]
fn a_guest_with_packed_rings_does_not_notice_replaced_daemons() -> Result<()> {
    with_rings(
        "a_guest_with_packed_rings_does_not_notice_replaced_daemons",
        true,
        lives_on_after_replacements,
    )
}

#[test]
fn a_guest_sees_its_disk_grow_under_load() -> Result<()> {
    with_stand("a_guest_sees_its_disk_grow_under_load", |stand, folder| {
        if stand.program.backend != Backend::Strata {
            return Ok(());
        }
        const GROWN_MIB: u64 = DISK_MIB + 64;
        image::create(&stand.serve.image, "qcow2", DISK_MIB * MIB, None, "")?;
        let size_file = folder.join("size");
        let option = size_file.to_str().context("the path is text")?;
        let script = format!("AREA_MIB=8\n{}", include_str!("guest/resize.sh"));
        let blocks = ["--logical-block-size", "4096", "--physical-block-size", "16K"];
        let options = [&["--size-file", option][..], &blocks].concat();
        let visit = stand.attended("resize", &script, &options, &mut |daemon, _| {
            std::fs::write(&size_file, format!("{GROWN_MIB}M\n"))?;
            daemon.hang_up()
        })?;
        let limits = ["logical", "physical", "minimum", "optimal"]
            .map(|limit| visit.number(&format!("block.{limit}")));
        let limits = limits.into_iter().collect::<Result<Vec<_>>>()?;
        assert_eq!(limits, [4096, 16384, 16384, 65536]);
        assert_eq!(visit.number("sectors.before")?, DISK_MIB * MIB / 512);
        assert_eq!(
            visit.number("sectors.after")?,
            GROWN_MIB * MIB / 512,
            "the guest does not see the new size"
        );
        assert_eq!((visit.number("new.other_bytes")?, visit.number("errors")?), (0, 0));
        image::expect_clean(&stand.serve.image)?;
        expect_same_disk(stand, folder, &visit, GROWN_MIB)
    })
}
