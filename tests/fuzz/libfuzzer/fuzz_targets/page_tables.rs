#![no_main]
//! See `extlb_fuzz::page_tables`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| extlb_fuzz::page_tables::run(data));
