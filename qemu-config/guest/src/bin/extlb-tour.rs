//! The tour.

fn main() {
    eprintln!("extlb-tour: not built yet");
    std::process::exit(1);
}
