//! The device on the guest's PCI bus: where it is, and which driver has it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use extlb_driver::spec::{PCI_DEVICE_ID, PCI_VENDOR_ID};

use super::system::wait_for;

const DEVICES: &str = "/sys/bus/pci/devices";

/// The device's address, as in sysfs (`0000:01:00.0`): the first if there are several.
pub fn find() -> Option<String> {
    let is = |path: &Path, name: &str, id: u16| {
        let text = fs::read_to_string(path.join(name)).unwrap_or_default();
        text.trim_end() == format!("{id:#06x}")
    };
    let devices = fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let found = devices
        .map(|entry| entry.path())
        .filter(|path| is(path, "vendor", PCI_VENDOR_ID) && is(path, "device", PCI_DEVICE_ID));
    let first = found.min()?;
    Some(first.file_name()?.to_str()?.to_owned())
}

/// Hands the device to a driver that does not know it by its ids.
pub fn bind(driver: &str) -> Result<()> {
    let bdf = find().context("the device is not on the PCI bus")?;
    let device = Path::new(DEVICES).join(&bdf);
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).with_context(|| format!("cannot write to {}", path.display()))
    };
    write(device.join("driver_override"), driver)?;
    if device.join("driver").exists() {
        write(device.join("driver/unbind"), &bdf)?;
    }
    // Probing happens within this write, and its failure is not told here.
    write("/sys/bus/pci/drivers_probe".into(), &bdf)?;
    let bound = fs::read_link(device.join("driver"));
    let bound = bound.as_ref().ok().and_then(|link| link.file_name());
    if bound.is_none_or(|name| name != driver) {
        bail!(
            "{driver} did not take the device at {bdf}; is there an IOMMU (--iommu intel)? See the \
             kernel's log"
        );
    }
    if driver == "vfio-pci" {
        let group = fs::read_link(device.join("iommu_group"))
            .with_context(|| format!("{bdf} is in no IOMMU group"))?;
        let group = group
            .file_name()
            .context("an IOMMU group without a number")?;
        wait_for(&Path::new("/dev/vfio").join(group))?;
    }
    Ok(())
}
