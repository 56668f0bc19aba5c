//! Writes the generated C headers into the kernel driver's folder.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../driver/kernel");
    let mut uapi = String::new();
    let mut hardware = String::new();
    extlb_spec::c_header::uapi(&mut uapi).expect("a String takes everything");
    extlb_spec::c_header::hardware(&mut hardware).expect("a String takes everything");
    std::fs::write(folder.join("extlb_uapi.h"), uapi)?;
    std::fs::write(folder.join("extlb_hw.h"), hardware)
}
