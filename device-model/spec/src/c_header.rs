//! Prints the C headers of the kernel driver from the tables of this crate.
//!
//! `cargo run -p extlb-spec --bin extlb-headers` writes them to `driver/kernel/`; a test fails
//! when the ones in the tree differ.

use core::fmt::{Result, Write};

use crate::table::{Enumeration, Layout};
use crate::{context, invalidation, page_request, pte, regs, uapi, work};

const BANNER: &str = " * Printed from the extlb-spec crate; do not edit. To print it again:
 *   cargo run -p extlb-spec --bin extlb-headers
 */
";

/// Enumerations of the header that programs and the driver share.
pub const UAPI_ENUMERATIONS: &[&Enumeration] = &[
    &uapi::create::TABLE,
    &work::Opcode::TABLE,
    &work::flags::TABLE,
    &work::fault::TABLE,
    &work::Status::TABLE,
    &context::ContextError::TABLE,
];

/// Structures of the header that programs and the driver share.
pub const UAPI_STRUCTURES: &[&Layout] = &[
    &work::Descriptor::LAYOUT,
    &work::Segment::LAYOUT,
    &work::Completion::LAYOUT,
    &context::ContextShadow::LAYOUT,
    &uapi::Info::LAYOUT,
    &uapi::Create::LAYOUT,
    &uapi::Register::LAYOUT,
    &uapi::Unregister::LAYOUT,
    &uapi::Stats::LAYOUT,
    &uapi::Audit::LAYOUT,
];

/// Enumerations of the header that only the driver sees.
pub const HARDWARE_ENUMERATIONS: &[&Enumeration] = &[
    &crate::Vector::TABLE,
    &regs::ctrl::TABLE,
    &regs::status::TABLE,
    &regs::cap::TABLE,
    &regs::FatalError::TABLE,
    &regs::StaleKind::TABLE,
    &context::flags::TABLE,
    &pte::bit::TABLE,
    &page_request::RequestKind::TABLE,
    &page_request::flags::TABLE,
    &page_request::Response::TABLE,
    &invalidation::CommandKind::TABLE,
    &invalidation::InvalidationScope::TABLE,
    &invalidation::wait::TABLE,
    &invalidation::audit::TABLE,
];

/// Structures of the header that only the driver sees.
pub const HARDWARE_STRUCTURES: &[&Layout] = &[
    &context::ContextEntry::LAYOUT,
    &page_request::PageRequest::LAYOUT,
    &invalidation::Command::LAYOUT,
    &invalidation::AuditResult::LAYOUT,
    &invalidation::KernelShadow::LAYOUT,
];

/// Prints the header that programs and the driver share: ioctls, work queues, shadow page.
pub fn uapi(out: &mut dyn Write) -> Result {
    out.write_str(
        "/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */\n/*\n * Interface of the extlb driver.\n *\n",
    )?;
    out.write_str(BANNER)?;
    out.write_str(
        "#ifndef _UAPI_LINUX_EXTLB_H\n#define _UAPI_LINUX_EXTLB_H\n\n#include <linux/ioctl.h>\n#include <linux/types.h>\n",
    )?;
    define(out, "EXTLB_UAPI_VERSION", u64::from(uapi::UAPI_VERSION))?;
    define(out, "EXTLB_MMAP_DOORBELL", uapi::MMAP_DOORBELL)?;
    define(out, "EXTLB_MMAP_SHADOW", uapi::MMAP_SHADOW)?;
    define(
        out,
        "EXTLB_HISTOGRAM_BUCKETS",
        crate::histogram::BUCKETS as u64,
    )?;
    define(out, "EXTLB_WORK_MAX_LEN", work::MAX_LEN)?;
    define(out, "EXTLB_WORK_MAX_BATCH", work::MAX_BATCH)?;
    define(
        out,
        "EXTLB_WORK_MAX_SEGMENTS",
        u64::from(work::MAX_SEGMENTS),
    )?;
    define(
        out,
        "EXTLB_WORK_RING_LOG2_MIN",
        u64::from(context::MIN_WORK_RING_LOG2),
    )?;
    define(
        out,
        "EXTLB_WORK_RING_LOG2_MAX",
        u64::from(context::MAX_WORK_RING_LOG2),
    )?;
    for table in UAPI_ENUMERATIONS {
        enumeration(out, table)?;
    }
    for layout in UAPI_STRUCTURES {
        structure(out, layout)?;
    }
    for ioctl in uapi::IOCTLS {
        out.write_char('\n')?;
        comment(out, "", ioctl.doc)?;
        writeln!(
            out,
            "#define EXTLB_IOC_{} _IOWR({:#x}, {}, struct {})",
            ioctl.name,
            uapi::IOC_TYPE,
            ioctl.number,
            ioctl.arg
        )?;
    }
    out.write_str("\n#endif /* _UAPI_LINUX_EXTLB_H */\n")
}

/// Prints the header that only the driver sees: registers, contexts, privileged rings, ptes.
pub fn hardware(out: &mut dyn Write) -> Result {
    out.write_str(
        "/* SPDX-License-Identifier: GPL-2.0 */\n/*\n * Registers and memory formats of the extlb device.\n *\n",
    )?;
    out.write_str(BANNER)?;
    out.write_str(
        "#ifndef _EXTLB_HW_H\n#define _EXTLB_HW_H\n\n#include <linux/build_bug.h>\n#include <linux/types.h>\n",
    )?;
    define(out, "EXTLB_PCI_VENDOR_ID", u64::from(crate::PCI_VENDOR_ID))?;
    define(out, "EXTLB_PCI_DEVICE_ID", u64::from(crate::PCI_DEVICE_ID))?;
    define(out, "EXTLB_BAR_REGS", u64::from(crate::BAR_REGS))?;
    define(out, "EXTLB_BAR_DOORBELLS", u64::from(crate::BAR_DOORBELLS))?;
    define(out, "EXTLB_DOORBELL_STRIDE", crate::DOORBELL_STRIDE)?;
    define(out, "EXTLB_MAX_CONTEXTS", u64::from(crate::MAX_CONTEXTS))?;
    define(out, "EXTLB_IOVA_BITS", u64::from(crate::addr::IOVA_BITS))?;
    define(out, "EXTLB_ID_VALUE", u64::from(regs::ID_VALUE))?;
    define(out, "EXTLB_VERSION_VALUE", u64::from(regs::VERSION_VALUE))?;
    define(out, "EXTLB_RING_LOG2_MIN", u64::from(regs::MIN_RING_LOG2))?;
    define(out, "EXTLB_RING_LOG2_MAX", u64::from(regs::MAX_RING_LOG2))?;
    define(out, "EXTLB_ORACLE_RECORDS", u64::from(regs::ORACLE_RECORDS))?;
    define(
        out,
        "EXTLB_REQUEST_PAGES_MAX",
        u64::from(page_request::MAX_REQUEST_PAGES),
    )?;
    define(out, "EXTLB_VECTORS", u64::from(crate::VECTORS))?;
    define(out, "EXTLB_PTE_LEVELS", u64::from(pte::LEVELS))?;
    define(out, "EXTLB_PTE_ADDR_MASK", pte::ADDR_MASK)?;
    for register in regs::ALL {
        out.write_char('\n')?;
        comment(out, "", register.doc)?;
        writeln!(
            out,
            "#define EXTLB_REG_{} {:#x}",
            register.name, register.offset
        )?;
    }
    for table in HARDWARE_ENUMERATIONS {
        enumeration(out, table)?;
    }
    for layout in HARDWARE_STRUCTURES {
        structure(out, layout)?;
        writeln!(
            out,
            "\nstatic_assert(sizeof(struct {}) == {});",
            layout.c_name, layout.size
        )?;
    }
    out.write_str("\n#endif /* _EXTLB_HW_H */\n")
}

fn define(out: &mut dyn Write, name: &str, value: u64) -> Result {
    writeln!(out, "\n#define {name} {}", Literal(value))
}

/// A C literal: decimal when short, with a suffix when it needs 64 bits.
struct Literal(u64);

impl core::fmt::Display for Literal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> Result {
        match self.0 {
            v @ 0..=9999 => write!(f, "{v}"),
            v if v <= u64::from(u32::MAX) => write!(f, "{v:#x}"),
            v => write!(f, "{v:#x}ULL"),
        }
    }
}

fn comment(out: &mut dyn Write, indent: &str, doc: &[&str]) -> Result {
    match doc {
        [] => Ok(()),
        [one] => writeln!(out, "{indent}/*{one} */"),
        lines => {
            writeln!(out, "{indent}/*")?;
            for line in lines.iter() {
                writeln!(out, "{indent} *{line}")?;
            }
            writeln!(out, "{indent} */")
        }
    }
}

fn enumeration(out: &mut dyn Write, table: &Enumeration) -> Result {
    out.write_char('\n')?;
    comment(out, "", table.doc)?;
    for value in table.values {
        comment(out, "", value.doc)?;
        write!(out, "#define EXTLB_")?;
        upper_snake(out, table.name)?;
        out.write_char('_')?;
        upper_snake(out, value.name)?;
        writeln!(out, " {}", Literal(value.value))?;
    }
    Ok(())
}

fn structure(out: &mut dyn Write, layout: &Layout) -> Result {
    out.write_char('\n')?;
    comment(out, "", layout.doc)?;
    writeln!(out, "struct {} {{", layout.c_name)?;
    for field in layout.fields {
        comment(out, "\t", field.doc)?;
        write!(out, "\t__u{} {}", field.size * 8, field.name)?;
        if field.count > 1 {
            write!(out, "[{}]", field.count)?;
        }
        out.write_str(";\n")?;
    }
    out.write_str("};\n")
}

/// `CamelCase` to `CAMEL_CASE`; names already in upper case stay.
fn upper_snake(out: &mut dyn Write, name: &str) -> Result {
    let mut previous_lower = false;
    for c in name.chars() {
        if c.is_ascii_uppercase() && previous_lower {
            out.write_char('_')?;
        }
        previous_lower = c.is_ascii_lowercase() || c.is_ascii_digit();
        out.write_char(c.to_ascii_uppercase())?;
    }
    Ok(())
}
