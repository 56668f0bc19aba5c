//! Pictures of structures and of words, in text.

use std::fmt::Write;

use extlb_spec::pte;
use extlb_spec::table::{Enumeration, Layout};

use crate::short;
use crate::tables::{STRING, text};

/// Columns of a byte, with one border.
const BYTE: usize = 8;
/// Bytes of a row.
const ROW: usize = 8;

/// A structure, eight bytes a row, the highest first.
pub(crate) fn structure(layout: &Layout) -> String {
    let mut out = String::from("```\n      ");
    for byte in (0..ROW).rev() {
        write!(out, "{byte:^BYTE$}").expect(STRING);
    }
    // Whoever looks at the end of a line sees nothing there.
    out.truncate(out.trim_end().len());
    let line = format!(
        "\n      {}+\n",
        format!("+{}", "-".repeat(BYTE - 1)).repeat(ROW)
    );
    out.push_str(&line);
    for row in (0..layout.size).step_by(ROW) {
        write!(out, " {row:#04x} ").expect(STRING);
        let mut at = row + ROW;
        while at > row {
            // The field that holds the byte below.
            let field = layout.fields.iter().rev().find(|f| f.offset < at);
            let (name, start) = field.map_or(("", row), |f| (f.name, f.offset.max(row)));
            let width = (at - start) * BYTE - 1;
            let name: String = name.chars().take(width).collect();
            write!(out, "|{name:^width$}").expect(STRING);
            at = start;
        }
        write!(out, "|{line}").expect(STRING);
    }
    out.push_str("```\n");
    out
}

/// A run of bits of a word.
pub(crate) struct BitField {
    pub(crate) name: String,
    pub(crate) high: u32,
    pub(crate) low: u32,
    pub(crate) doc: String,
}

fn field(name: &str, mask: u64, doc: &str) -> BitField {
    let (high, low) = (63 - mask.leading_zeros(), mask.trailing_zeros());
    assert_eq!(mask.count_ones(), high - low + 1, "{name} has a hole");
    BitField {
        name: name.into(),
        high,
        low,
        doc: doc.into(),
    }
}

/// The fields of a word, the lowest first.
pub(crate) fn fields(table: &Enumeration) -> Vec<BitField> {
    let named = table.values.iter();
    let mut all: Vec<_> = named
        .map(|v| field(v.name, v.value, &text(v.doc)))
        .collect();
    if short(table.path) == "pte::bit" {
        let address =
            "Of the page, or of the next table. A leaf's address is a multiple of its size.";
        all.push(field("address", pte::ADDR_MASK, address));
        all.push(field("software", pte::SOFTWARE_MASK, "Free for software."));
    }
    all.sort_by_key(|field| field.low);
    all
}

/// A word as a line of boxes, the highest bits first; what has no name is reserved.
pub(crate) fn bits(table: &Enumeration) -> String {
    let mut boxes = Vec::new();
    let mut next = 0;
    let range = |high: u32, low: u32| match high == low {
        true => low.to_string(),
        false => format!("{high}:{low}"),
    };
    for field in fields(table) {
        if field.low > next {
            boxes.push((range(field.low - 1, next), "0".to_owned()));
        }
        boxes.push((range(field.high, field.low), field.name));
        next = field.high + 1;
    }
    let width = table.width;
    if next < width {
        boxes.push((range(width - 1, next), "0".into()));
    }
    boxes.reverse();
    let line = |f: &dyn Fn(&str, &str, usize) -> String| {
        let cells = boxes.iter().map(|(bits, name)| {
            let width = bits.len().max(name.len()) + 2;
            f(bits, name, width)
        });
        cells.collect::<String>()
    };
    let numbers = line(&|bits, _, width| format!(" {bits:^width$}"));
    let border = line(&|_, _, width| format!("+{}", "-".repeat(width))) + "+";
    let names = line(&|_, name, width| format!("|{name:^width$}")) + "|";
    format!(
        "```\n{}\n{border}\n{names}\n{border}\n```\n",
        numbers.trim_end()
    )
}
