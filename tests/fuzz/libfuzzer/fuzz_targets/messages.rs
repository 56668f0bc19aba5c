#![no_main]
//! See `extlb_fuzz::messages`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| extlb_fuzz::messages::run(data));
