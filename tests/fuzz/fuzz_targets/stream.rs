//! See `freeflow_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| freeflow_tests::fuzz::stream(data));
