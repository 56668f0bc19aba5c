//! What the kernel tells about itself and about this process.

use std::fs;

use anyhow::{Context as _, Result};

/// A field of `/proc/self/status`, in KiB; 0 if it is absent.
pub fn status_kib(field: &str) -> Result<u64> {
    status_kib_of("self", field)
}

/// A field of `/proc/<pid>/status`, in KiB; 0 if it is absent.
pub fn status_kib_of(pid: &str, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).context(path)?;
    Ok(line_value(&text, field, ':').unwrap_or(0))
}

/// A counter of `/proc/vmstat`; 0 if it is absent.
pub fn vmstat(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("/proc/vmstat")?;
    Ok(line_value(&text, field, ' ').unwrap_or(0))
}

/// A field of `/proc/meminfo`, in KiB; 0 if it is absent.
pub fn meminfo_kib(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    Ok(line_value(&text, field, ':').unwrap_or(0))
}

fn line_value(text: &str, field: &str, separator: char) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(field)?.strip_prefix(separator)?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// Drops clean pages from the page cache.
pub fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("/proc/sys/vm/drop_caches")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "VmPinX:\t 1 kB\nVmPin:\t       8 kB\nVmLck:\tx\n";
        assert_eq!(line_value(text, "VmPin", ':'), Some(8));
        assert_eq!(line_value(text, "VmLck", ':'), None);
        assert_eq!(line_value(text, "Vm", ':'), None);
        assert_eq!(
            line_value("pswpin 12\npswpout 13\n", "pswpout", ' '),
            Some(13)
        );
    }
}
