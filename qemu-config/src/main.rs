//! The rig's command line.

fn main() {
    std::process::exit(extlb::cli::main());
}
