#![no_main]
//! See `extlb_fuzz::commands`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| extlb_fuzz::commands::run(data));
