#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| packmule::fuzzing::access_log(bytes));
