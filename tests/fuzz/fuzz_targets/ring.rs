//! The target `ring` under libFuzzer.
#![no_main]

#[path = "../../meter.rs"]
mod meter;
#[path = "../targets/mod.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::target("ring").run(input));
