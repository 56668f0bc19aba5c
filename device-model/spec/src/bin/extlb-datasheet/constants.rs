//! Constants that the prose names.

use extlb_spec::{
    BAR_DOORBELLS, BAR_DOORBELLS_SIZE, BAR_MSIX, BAR_MSIX_SIZE, BAR_REGS, BAR_REGS_SIZE,
    DOORBELL_STRIDE, MAX_CONTEXTS, MSIX_PBA_OFFSET, PAGE_SIZE, PCI_CLASS, PCI_DEVICE_ID,
    PCI_REVISION, PCI_VENDOR_ID, VECTORS, addr, context, page_request, pte, regs, work,
};

/// A constant as people read it; `None` if there is none of the name.
pub(crate) fn value(name: &str) -> Option<String> {
    let hex = |value: u64| Some(format!("{value:#x}"));
    let plain = |value: u64| Some(value.to_string());
    match name {
        "PCI_VENDOR_ID" => hex(PCI_VENDOR_ID.into()),
        "PCI_DEVICE_ID" => hex(PCI_DEVICE_ID.into()),
        "PCI_REVISION" => plain(PCI_REVISION.into()),
        "PCI_CLASS" => hex(PCI_CLASS.into()),
        "BAR_REGS" => plain(BAR_REGS.into()),
        "BAR_REGS_SIZE" => Some(size(BAR_REGS_SIZE)),
        "BAR_DOORBELLS" => plain(BAR_DOORBELLS.into()),
        "BAR_DOORBELLS_SIZE" => Some(size(BAR_DOORBELLS_SIZE)),
        "DOORBELL_STRIDE" => plain(DOORBELL_STRIDE),
        "BAR_MSIX" => plain(BAR_MSIX.into()),
        "BAR_MSIX_SIZE" => Some(size(BAR_MSIX_SIZE)),
        "MSIX_PBA_OFFSET" => hex(MSIX_PBA_OFFSET.into()),
        "VECTORS" => plain(VECTORS.into()),
        "MAX_CONTEXTS" => plain(MAX_CONTEXTS.into()),
        "PAGE_SIZE" => plain(PAGE_SIZE),
        "IOVA_BITS" => plain(addr::IOVA_BITS.into()),
        "GPA_BITS" => plain(addr::GPA_BITS.into()),
        "PTE_LEVELS" => plain(pte::LEVELS.into()),
        "PTE_ENTRIES" => plain(pte::ENTRIES),
        "ID_VALUE" => hex(regs::ID_VALUE.into()),
        "VERSION" => {
            let version = regs::VERSION_VALUE;
            Some(format!("{}.{}", version >> 16, version & 0xffff))
        }
        "MIN_RING" => plain(1 << regs::MIN_RING_LOG2),
        "MAX_RING" => plain(1 << regs::MAX_RING_LOG2),
        "MIN_WORK_RING" => plain(1 << context::MIN_WORK_RING_LOG2),
        "MAX_WORK_RING" => plain(1 << context::MAX_WORK_RING_LOG2),
        "MAX_LEN" => Some(size(work::MAX_LEN)),
        "MAX_REQUEST_PAGES" => plain(page_request::MAX_REQUEST_PAGES.into()),
        "ORACLE_RECORDS" => plain(regs::ORACLE_RECORDS.into()),
        _ => None,
    }
}

/// A number of bytes with its unit.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}
