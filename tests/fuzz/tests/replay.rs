//! Every target holds on its corpus, and on mutations of it that are the same in each run.
//!
//! `EXTLB_FUZZ_RUNS=…` makes so many of each, `EXTLB_FUZZ_FROM=…` begins at another one. A failed
//! run says its number; `EXTLB_FUZZ_FROM=n EXTLB_FUZZ_RUNS=1` is that one alone. With
//! `EXTLB_FUZZ_CORPUS=…`, a folder that has one for each target, its inputs are used as well.

use std::panic::catch_unwind;
use std::path::Path;

use extlb_fuzz::mutate::{Random, mutate};
use extlb_fuzz::{TARGETS, Target};

const RUNS: u64 = 5000;
/// Longer inputs find nothing that shorter ones do not.
const LONGEST: usize = 1024;

fn number(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name);
    text.map_or(otherwise, |text| text.parse().expect("a number"))
}

/// The inputs of a folder, in the order of their names.
fn inputs(folder: &Path) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(folder).expect("a corpus");
    let mut files: Vec<_> = files.map(|file| file.expect("an entry").path()).collect();
    files.sort();
    let files = files
        .iter()
        .map(|path| std::fs::read(path).expect("a file"));
    files.collect()
}

/// The inputs in the tree, and the seeds.
fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut all = inputs(&folder.join(target.name));
    all.extend((target.seeds)());
    if let Some(folder) = std::env::var_os("EXTLB_FUZZ_CORPUS") {
        all.extend(inputs(&Path::new(&folder).join(target.name)));
    }
    all
}

fn replay(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.expect("a target");
    let corpus = corpus(target);
    println!("{name}: {} inputs", corpus.len());
    for (n, input) in corpus.iter().enumerate() {
        let ran = catch_unwind(|| (target.run)(input));
        assert!(ran.is_ok(), "{name}: input {n} of the corpus: {input:02x?}");
    }
    let from = number("EXTLB_FUZZ_FROM", 0);
    for n in from..from + number("EXTLB_FUZZ_RUNS", RUNS) {
        let mut random = Random(n);
        let mut input = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        mutate(&mut random, &mut input, other, LONGEST);
        let ran = catch_unwind(|| (target.run)(&input));
        assert!(ran.is_ok(), "{name}: run {n}: {input:02x?}");
    }
}

#[test]
fn descriptors() {
    replay("descriptors");
}

#[test]
fn page_tables() {
    replay("page_tables");
}

#[test]
fn commands() {
    replay("commands");
}

#[test]
fn messages() {
    replay("messages");
}
