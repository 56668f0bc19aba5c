#![no_main]
//! See `extlb_fuzz::descriptors`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| extlb_fuzz::descriptors::run(data));
