//! Times one way to the device; see [`extlb_guest::bench`].

fn main() -> std::process::ExitCode {
    extlb_guest::bench::main()
}
