//! The worked example as text.

use std::fmt::Write;

use extlb_spec::example::{self, Item, Step};
use extlb_spec::table::Layout;
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, Vector};

use crate::tables::STRING;

/// All steps: prose, with what is written and read in blocks between it.
pub(crate) fn print() -> String {
    let mut out = String::new();
    let mut inside = false;
    let mut number = 0;
    example::play(&mut |step| {
        let prose = matches!(step, Step::Title(_) | Step::Say(_));
        if inside == prose {
            out.push_str("```\n");
            inside = !prose;
        }
        let line = match step {
            Step::Title(title) => {
                number += 1;
                format!("\n### {number}. {title}\n")
            }
            Step::Say(text) => format!("\n{text}\n"),
            Step::Config(name, offset, value) => {
                format!("config write  {offset:#05x} {name:<17} {value:#06x}")
            }
            Step::Write(register, value) => {
                let (name, offset) = (register.name, register.offset);
                format!("write BAR {BAR_REGS} + {offset:#05x} {name:<17} {value:#x}")
            }
            Step::Read(register, value) => {
                let (name, offset) = (register.name, register.offset);
                format!("read  BAR {BAR_REGS} + {offset:#05x} {name:<17} = {value:#x}")
            }
            Step::Doorbell(context) => {
                let offset = u64::from(context) * DOORBELL_STRIDE;
                format!("write BAR {BAR_DOORBELLS} + {offset:#06x} doorbell {context}       0x1")
            }
            Step::Put(what, at, item) => memory("store", what, at, &item, " "),
            Step::Find(what, at, item) => memory("load ", what, at, &item, " = "),
            Step::Interrupt(vector) => {
                let name = Vector::TABLE.values.iter();
                let name = name.clone().find(|v| v.value == vector as u64);
                format!(
                    "interrupt     vector {} ({})",
                    vector as u32,
                    name.map_or("?", |v| v.name)
                )
            }
        };
        out.push_str(&line);
        out.push('\n');
    });
    if inside {
        out.push_str("```\n");
    }
    out
}

fn memory(verb: &str, what: &str, at: Gpa, item: &Item, sign: &str) -> String {
    // No mark-up in a block.
    let what = what.replace('`', "");
    let bytes = item.bytes();
    let start = format!("{verb} {:#09x}  {what}", at.0);
    let column = format!("{start:<48}");
    match (item.layout, bytes.len()) {
        (Some(layout), _) => start + &fields(layout, bytes, sign),
        (None, len @ (4 | 8)) => {
            let value = word(bytes);
            format!("{column}{sign}{value:#x}, {len} bytes")
        }
        _ => format!("{column}{sign}\"{}\"", String::from_utf8_lossy(bytes)),
    }
}

fn word(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The fields that are not zero, a line each.
fn fields(layout: &Layout, bytes: &[u8], sign: &str) -> String {
    let mut out = format!(": {}, {} bytes", layout.name, layout.size);
    for field in layout.fields {
        let value = word(&bytes[field.offset..field.offset + field.size]);
        if value != 0 {
            let (offset, name) = (field.offset, field.name);
            write!(
                out,
                "\n          + {offset:#04x} {name:<15}{sign}{value:#x}"
            )
            .expect(STRING);
        }
    }
    out + "\n          all else 0"
}
