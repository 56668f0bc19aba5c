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
