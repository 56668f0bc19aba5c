//! The TLB as it is saved.

use extlb_spec::addr::GPA_BITS;
use extlb_spec::pte::leaf_size;
use extlb_spec::{Gpa, MAX_CONTEXTS, PAGE_SIZE};
use serde::{Deserialize, Serialize};

use super::scope::shift;
use super::sets::{Line, Sets, Writer};
use super::{LEAF_LEVELS, MAY_WRITE, TABLE_SPANS, Tlb, geometries, tag, untag};
use crate::config::TlbConfig;
use crate::state::{MAX_COUNT, StateError, check};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// What is saved: the words of the arrays, as `sets.rs` has them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    arrays: Vec<Vec<u64>>,
    walk_cache: Option<Vec<u64>>,
    generation: Vec<u64>,
    fills: u64,
    random: u64,
}

impl Tlb {
    /// Between two accesses, so that no set is being changed.
    pub(crate) fn save(&self) -> State {
        let Self {
            arrays,
            walk_cache,
            generation,
            fills,
            writer,
        } = self;
        let writer = &*lock(writer);
        State {
            arrays: arrays.iter().map(|array| array.save(writer)).collect(),
            walk_cache: walk_cache.as_ref().map(|cache| cache.save(writer)),
            generation: generation
                .iter()
                .map(|g| g.load(Ordering::Relaxed))
                .collect(),
            fills: fills.load(Ordering::Relaxed),
            random: writer.save(),
        }
    }

    pub(crate) fn restore(config: &TlbConfig, state: State) -> Result<Self, StateError> {
        let State {
            arrays,
            walk_cache,
            generation,
            fills,
            random,
        } = state;
        check("the fills of the TLB", fills < MAX_COUNT, fills)?;
        let contexts = generation.len();
        check(
            "the contexts of the TLB",
            contexts == MAX_CONTEXTS as usize,
            contexts,
        )?;
        let last = generation.iter().copied().max().unwrap_or(0);
        check("a generation of the TLB", last < MAX_COUNT, last)?;
        let (geometries, walk_geometry) = geometries(config);
        let count = arrays.len();
        check(
            "the number of the TLB's arrays",
            count == geometries.len(),
            count,
        )?;
        let numbered = geometries.into_iter().zip(arrays).enumerate();
        let arrays = numbered.map(|(number, (geometry, words))| {
            let levels = match count {
                1 => LEAF_LEVELS,
                _ => {
                    let level = number as u32 + 1;
                    level..=level
                }
            };
            Sets::restore(geometry, config.policy, words, |array, index, line| {
                let frame = line.data & !MAY_WRITE;
                place(array, index, line).is_some_and(|level| {
                    levels.contains(&level)
                        && line.fill <= fills
                        && Gpa(frame).is_aligned(leaf_size(level))
                        && frame < 1 << GPA_BITS
                })
            })
        });
        let walk_cache = match (walk_geometry, walk_cache) {
            (Some(geometry), Some(words)) => {
                let good = |cache: &Sets, index, line: Line| {
                    let span = place(cache, index, line);
                    span.is_some_and(|span| TABLE_SPANS.contains(&span))
                        && line.fill <= fills
                        && crate::state::is_page(Gpa(line.data))
                };
                Some(Sets::restore(geometry, config.policy, words, good)?)
            }
            (None, None) => None,
            (_, saved) => {
                check("whether there is a walk cache", false, saved.is_some())?;
                None
            }
        };
        Ok(Self {
            arrays: arrays.collect::<Result<_, _>>()?,
            walk_cache,
            generation: generation.into_iter().map(AtomicU64::new).collect(),
            fills: AtomicU64::new(fills),
            writer: Mutex::new(Writer::restore(random)?),
        })
    }
}

/// The level of a line whose tag makes sense and belongs to the set with this index.
fn place(array: &Sets, index: usize, line: Line) -> Option<u32> {
    let (context, base, level) = untag(line.tag);
    let known = context < MAX_CONTEXTS && (1..=*TABLE_SPANS.end()).contains(&level);
    let size = known.then(|| leaf_size(level).max(PAGE_SIZE))?;
    let good = base.is_aligned(size)
        && base.range_is_valid(size)
        && tag(context, base, level) == line.tag
        && array.index(context, base.0 >> shift(level)) == index;
    good.then_some(level)
}
