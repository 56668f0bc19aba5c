//! Fuzz targets: what is done with an input, and what must hold whatever it is.
//!
//! Each target is a function of bytes that panics when something is wrong. `cargo test` replays the
//! corpus and some thousands of mutations of it; `README.md` says how to run one for long.

pub mod commands;
pub mod descriptors;
mod input;
mod machine;
mod memory;
pub mod messages;
pub mod mutate;
pub mod page_tables;
pub mod seeds;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Runs an input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target {
        name: "descriptors",
        run: descriptors::run,
        seeds: seeds::descriptors,
    },
    Target {
        name: "page_tables",
        run: page_tables::run,
        seeds: seeds::page_tables,
    },
    Target {
        name: "commands",
        run: commands::run,
        seeds: seeds::commands,
    },
    Target {
        name: "messages",
        run: messages::run,
        seeds: seeds::messages,
    },
];
