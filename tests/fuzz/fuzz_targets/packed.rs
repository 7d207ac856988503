//! The target `packed` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| strata_fuzz_targets::target("packed").run(input));
