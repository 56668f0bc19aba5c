//! Tables of the specification in Markdown.

use std::fmt::Write;

use extlb_spec::pci_config;
use extlb_spec::regs::{Access, Register};
use extlb_spec::table::{Enumeration, Field, Layout};

use crate::draw;

/// Everything is written to strings, which take it all.
pub(crate) const STRING: &str = "a String takes everything";

/// The lines of a documentation as one.
pub(crate) fn text(doc: &[&str]) -> String {
    let lines: Vec<&str> = doc.iter().map(|line| line.trim()).collect();
    lines.join(" ").replace('|', "\\|")
}

pub(crate) fn registers(registers: &[&Register]) -> String {
    let mut out = String::from(
        "| Offset | Register | Bytes | Access | After reset | Writable bits | |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for r in registers {
        let access = match r.access {
            Access::ReadOnly => "RO",
            Access::ReadWrite => "RW",
            Access::Config => "RW while disabled",
            Access::WriteOnly => "WO",
        };
        let writable = match r.writable {
            0 => "-".into(),
            mask => format!("`{mask:#x}`"),
        };
        writeln!(
            out,
            "| `{:#05x}` | `{}` | {} | {access} | `{:#x}` | {writable} | {} |",
            r.offset,
            r.name,
            r.width,
            r.reset,
            text(r.doc)
        )
        .expect(STRING);
    }
    out
}

/// The PCI configuration space.
pub(crate) fn config_space() -> String {
    let mut out = String::from(
        "| Offset | Field | Bytes | After reset | Writable bits | |\n|---|---|---|---|---|---|\n",
    );
    for field in pci_config::ALL {
        let writable = match field.writable {
            0 => "-".into(),
            mask => format!("`{mask:#x}`"),
        };
        let (offset, name, width, reset) = (field.offset, field.name, field.width, field.reset);
        let doc = text(field.doc);
        writeln!(
            out,
            "| `{offset:#04x}` | `{name}` | {width} | `{reset:#x}` | {writable} | {doc} |"
        )
        .expect(STRING);
    }
    out
}

/// Whether a field is there to fill a gap.
fn is_padding(field: &Field) -> bool {
    field.name.starts_with("pad") || field.name.starts_with("reserved")
}

/// A structure: what it is, a picture if it is small, and its fields.
pub(crate) fn structure(layout: &Layout) -> String {
    let mut out = String::new();
    let (name, c_name, size) = (layout.name, layout.c_name, layout.size);
    writeln!(out, "`{name}`, in C `struct {c_name}`, {size} bytes.").expect(STRING);
    writeln!(out, "{}\n", text(layout.doc)).expect(STRING);
    if size <= 128 {
        out.push_str(&draw::structure(layout));
        out.push('\n');
    }
    out.push_str("| Offset | Field | Type | |\n|---|---|---|---|\n");
    for field in layout.fields {
        let bits = field.size * 8;
        let kind = match field.count {
            1 => format!("u{bits}"),
            n => format!("u{bits}[{n}]"),
        };
        let name = match is_padding(field) {
            true => "-".into(),
            false => format!("`{}`", field.name),
        };
        let (offset, doc) = (field.offset, text(field.doc));
        writeln!(out, "| `{offset:#05x}` | {name} | {kind} | {doc} |").expect(STRING);
    }
    out
}

/// An enumeration of numbers.
pub(crate) fn enumeration(table: &Enumeration) -> String {
    let mut out = format!("{}\n\n| Value | Name | |\n|---|---|---|\n", text(table.doc));
    for value in table.values {
        let (number, name, doc) = (value.value, value.name, text(value.doc));
        writeln!(out, "| {number} | `{name}` | {doc} |").expect(STRING);
    }
    out
}

/// Bits and fields of a word.
pub(crate) fn bits(table: &Enumeration) -> String {
    let mut out = format!("{}\n\n{}\n", text(table.doc), draw::bits(table));
    out.push_str("| Bits | Name | |\n|---|---|---|\n");
    for field in draw::fields(table) {
        let draw::BitField { high, low, .. } = field;
        let bits = match high == low {
            true => low.to_string(),
            false => format!("{high}:{low}"),
        };
        writeln!(out, "| {bits} | `{}` | {} |", field.name, field.doc).expect(STRING);
    }
    out
}
