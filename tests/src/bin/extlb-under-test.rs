//! The rig's command line, built with the tests so that they can start it.

fn main() {
    std::process::exit(extlb::cli::main());
}
