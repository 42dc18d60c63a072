#![no_main]

#[path = "../checks.rs"]
#[allow(dead_code)]
mod checks;

#[global_allocator]
static ALLOCATOR: checks::Counting = checks::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| checks::codec(data));
