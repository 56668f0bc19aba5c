//! The tour: shows in the guest what the device can do.

fn main() -> std::process::ExitCode {
    extlb_guest::tour::main()
}
