//! Process 1 of the guest.

fn main() -> std::process::ExitCode {
    match extlb_guest::agent::main() {
        Ok(never) => match never {},
        Err(error) => {
            // Seen on the console; the kernel then panics because process 1 is gone, which is right:
            // the rig reports a dead guest together with this line.
            eprintln!("extlb-agent: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
