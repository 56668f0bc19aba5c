//! Prints the datasheet of the device: the prose of `datasheet/*.md` with the tables of this crate
//! in the places that it names.
//!
//! `cargo run -q -p extlb-spec --bin extlb-datasheet > device-model/DATASHEET.md` renews the one in
//! the tree; a test fails when it differs. In the prose, between double braces:
//!
//! - `registers FROM TO`: the registers with offsets in `[FROM, TO)`;
//! - `struct PATH`, `enum PATH`, `bits PATH`: a table, by its path in this crate;
//! - `pci`: the configuration space; `limits`, `example`: see the modules of these names;
//! - anything else: a constant, see [`constants`].
//!
//! What is in a table and not in the prose is an error: nothing can be left out by oversight.

mod constants;
mod draw;
mod example;
mod limits;
mod tables;

use std::collections::BTreeSet;
use std::fmt::Write;

use extlb_spec::c_header::{
    HARDWARE_ENUMERATIONS, HARDWARE_STRUCTURES, UAPI_ENUMERATIONS, UAPI_STRUCTURES,
};
use extlb_spec::regs;
use extlb_spec::table::{Enumeration, Layout};

/// Chapters, in order: name of the file, and its text.
const CHAPTERS: &[(&str, &str)] = &[
    (
        "overview.md",
        include_str!("../../../datasheet/overview.md"),
    ),
    ("pci.md", include_str!("../../../datasheet/pci.md")),
    (
        "registers.md",
        include_str!("../../../datasheet/registers.md"),
    ),
    ("formats.md", include_str!("../../../datasheet/formats.md")),
    (
        "operations.md",
        include_str!("../../../datasheet/operations.md"),
    ),
    (
        "sequences.md",
        include_str!("../../../datasheet/sequences.md"),
    ),
    ("errors.md", include_str!("../../../datasheet/errors.md")),
    ("limits.md", include_str!("../../../datasheet/limits.md")),
    ("example.md", include_str!("../../../datasheet/example.md")),
];

/// Paths of the kernel driver's own tables, which are none of the device's, begin so.
const NOT_THE_DEVICES: &str = "uapi::";

fn enumerations() -> impl Iterator<Item = &'static Enumeration> {
    let all = UAPI_ENUMERATIONS.iter().chain(HARDWARE_ENUMERATIONS);
    all.copied()
        .filter(|table| !short(table.path).starts_with(NOT_THE_DEVICES))
}

fn structures() -> impl Iterator<Item = &'static Layout> {
    let all = UAPI_STRUCTURES.iter().chain(HARDWARE_STRUCTURES);
    all.copied()
        .filter(|layout| !short(layout.path).starts_with(NOT_THE_DEVICES))
}

/// A path without the name of the crate.
fn short(path: &str) -> &str {
    path.split_once("::").map_or(path, |(_, rest)| rest)
}

/// What was printed so far.
struct Printer {
    out: String,
    used: BTreeSet<String>,
}

impl Printer {
    /// Prints a chapter.
    fn chapter(&mut self, mut text: &str) -> Result<(), String> {
        while let Some((before, rest)) = text.split_once("{{") {
            let (directive, after) = rest.split_once("}}").ok_or("{{ without }}")?;
            self.out.push_str(before);
            self.directive(directive.trim())
                .map_err(|why| format!("{{{{{directive}}}}}: {why}"))?;
            text = after;
        }
        self.out.push_str(text);
        Ok(())
    }

    fn directive(&mut self, directive: &str) -> Result<(), String> {
        let words: Vec<&str> = directive.split_whitespace().collect();
        let text = match words[..] {
            ["registers", from, to] => {
                let (from, to) = (number(from)?, number(to)?);
                let chosen: Vec<_> = regs::ALL
                    .iter()
                    .filter(|r| (from..to).contains(&r.offset))
                    .collect();
                for register in &chosen {
                    self.once(register.name)?;
                }
                tables::registers(&chosen)
            }
            ["struct", path] => {
                let layout = structures().find(|layout| short(layout.path) == path);
                self.once(path)?;
                tables::structure(layout.ok_or("no such structure")?)
            }
            [kind @ ("enum" | "bits"), path] => {
                let table = enumerations().find(|table| short(table.path) == path);
                let table = table.ok_or("no such table")?;
                self.once(path)?;
                match kind {
                    "enum" => tables::enumeration(table),
                    _ => tables::bits(table),
                }
            }
            ["pci"] => tables::config_space(),
            ["limits"] => limits::print(),
            ["example"] => example::print(),
            [name] => constants::value(name).ok_or("no such constant")?,
            _ => return Err("not understood".into()),
        };
        self.out.push_str(&text);
        Ok(())
    }

    fn once(&mut self, what: &str) -> Result<(), String> {
        match self.used.insert(what.into()) {
            true => Ok(()),
            false => Err(format!("{what} is printed twice")),
        }
    }

    /// What no chapter has named.
    fn left_out(&self) -> Vec<&'static str> {
        let tables = enumerations().map(|table| short(table.path));
        let layouts = structures().map(|layout| short(layout.path));
        let registers = regs::ALL.iter().map(|register| register.name);
        let all = tables.chain(layouts).chain(registers);
        all.filter(|name| !self.used.contains(*name)).collect()
    }
}

fn number(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").ok_or("give offsets as 0x…")?;
    u64::from_str_radix(digits, 16).map_err(|error| error.to_string())
}

fn datasheet() -> Result<String, String> {
    let mut printer = Printer {
        out: String::new(),
        used: BTreeSet::new(),
    };
    for (name, text) in CHAPTERS {
        printer
            .chapter(text)
            .map_err(|why| format!("datasheet/{name}: {why}"))?;
        let ended = printer.out.trim_end().len();
        printer.out.truncate(ended);
        printer.out.push_str("\n\n");
    }
    let left_out = printer.left_out();
    if !left_out.is_empty() {
        let mut why = "add these to a chapter in datasheet/:".to_owned();
        for name in left_out {
            write!(why, " {name}").map_err(|error| error.to_string())?;
        }
        return Err(why);
    }
    let mut out = printer.out.trim_end().to_owned() + "\n";
    while out.contains("\n\n\n") {
        out = out.replace("\n\n\n", "\n\n");
    }
    Ok(out)
}

fn main() -> Result<(), String> {
    print!("{}", datasheet()?);
    Ok(())
}
