//! Prints `FAULTS.md`.

fn main() {
    print!("{}", extlb_device::fault::document());
}
