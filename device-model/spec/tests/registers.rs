//! Properties of the register table that no single line of it can show.

use extlb_spec::regs::{ALL, Access};

#[test]
fn registers_are_ordered_aligned_and_do_not_overlap() {
    for pair in ALL.windows(2) {
        assert!(
            pair[0].end() <= pair[1].offset,
            "{} and {}",
            pair[0].name,
            pair[1].name
        );
    }
    for r in ALL {
        assert!(r.width == 4 || r.width == 8, "{}", r.name);
        assert_eq!(r.offset % u64::from(r.width), 0, "{}", r.name);
        assert!(r.end() <= extlb_spec::BAR_REGS_SIZE, "{}", r.name);
    }
}

#[test]
fn only_writable_registers_have_writable_bits() {
    for r in ALL {
        let can_write = matches!(r.access, Access::ReadWrite | Access::Config);
        assert_eq!(r.writable != 0, can_write, "{}", r.name);
        if r.width == 4 {
            assert_eq!(r.writable >> 32, 0, "{}", r.name);
            assert_eq!(r.reset >> 32, 0, "{}", r.name);
        }
    }
}

#[test]
fn fields_of_the_configuration_space_do_not_overlap_and_capabilities_lead_on() {
    use extlb_spec::pci_config::{ALL, CAPABILITIES, SIZE};
    for pair in ALL.windows(2) {
        let end = pair[0].offset + pair[0].width;
        assert!(end <= pair[1].offset, "{}", pair[1].name);
    }
    for field in ALL {
        assert!(field.offset + field.width <= SIZE, "{}", field.name);
        let bits = 8 * field.width as u32;
        let beyond = u64::MAX.checked_shl(bits).unwrap_or(0);
        assert_eq!((field.reset | field.writable) & beyond, 0, "{}", field.name);
    }
    // Each header names the next, in its second byte; its first tells which it is.
    let mut next = CAPABILITIES.reset;
    let mut found = Vec::new();
    while next != 0 {
        let header = ALL.iter().find(|field| field.offset as u64 == next);
        let header = header.expect("a header where one is named").reset;
        found.push(header & 0xff);
        next = header >> 8;
    }
    assert_eq!(found, [0x01, 0x10, 0x11], "PM, PCI Express, MSI-X");
}
