//! A model of the TLB: it keeps its sets as lists, looks at every entry each time, and picks
//! victims by the definition of the policy.

use std::collections::HashMap;

use extlb_spec::Gpa;
use extlb_spec::pte::leaf_size;

use crate::config::{Geometry, Policy, TlbConfig};
use crate::tlb::{Leaf, Scope, Table, Tables};

/// What is cached: of a leaf, or of a table (whose level is one less than what it spans).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line<T> {
    pub(super) context: u32,
    pub(super) base: u64,
    /// log2 of the bytes it stands for.
    pub(super) bits: u32,
    pub(super) value: T,
    pub(super) fill: u64,
}

impl<T> Line<T> {
    fn is(&self, context: u32, at: u64, bits: u32) -> bool {
        self.context == context && self.bits == bits && self.base == at >> bits << bits
    }
}

pub(super) fn bits(level: u32) -> u32 {
    leaf_size(level).ilog2()
}

#[derive(Clone, Debug)]
struct Set<T> {
    ways: Vec<Option<Line<T>>>,
    used: Vec<u64>,
    filled: Vec<u64>,
    /// For each half-open group of ways: whether its right half was used last.
    right_last: HashMap<(usize, usize), bool>,
}

struct Array<T> {
    policy: Policy,
    sets: Vec<Set<T>>,
    time: u64,
}

impl<T: Copy> Array<T> {
    fn new(geometry: Geometry, policy: Policy) -> Self {
        let set = Set {
            ways: vec![None; geometry.ways],
            used: vec![0; geometry.ways],
            filled: vec![0; geometry.ways],
            right_last: HashMap::new(),
        };
        Self {
            policy,
            sets: vec![set; geometry.sets],
            time: 0,
        }
    }

    fn set(&mut self, context: u32, at: u64, bits: u32) -> &mut Set<T> {
        let number = u128::from(at >> bits) + u128::from(context) * 0x9e37_79b1;
        let sets = self.sets.len() as u128;
        &mut self.sets[(number % sets) as usize]
    }

    fn find(&mut self, context: u32, at: u64, bits: u32) -> Option<Line<T>> {
        let set = self.set(context, at, bits);
        set.ways
            .iter()
            .flatten()
            .find(|l| l.is(context, at, bits))
            .copied()
    }

    /// Takes note of a use.
    fn note(&mut self, context: u32, at: u64, bits: u32, fill: bool) {
        self.time += 1;
        let time = self.time;
        let set = self.set(context, at, bits);
        let is = |l: &Option<Line<T>>| l.as_ref().is_some_and(|l| l.is(context, at, bits));
        let way = set.ways.iter().position(is).expect("present");
        set.used[way] = time;
        if fill {
            set.filled[way] = time;
        }
        let (mut low, mut high) = (0, set.ways.len());
        while high - low > 1 {
            let middle = (low + high) / 2;
            set.right_last.insert((low, high), way >= middle);
            (low, high) = if way >= middle {
                (middle, high)
            } else {
                (low, middle)
            };
        }
    }

    /// Whether another line went.
    fn put(&mut self, line: Line<T>, random: &mut u64) -> bool {
        let (context, at, bits) = (line.context, line.base, line.bits);
        let policy = self.policy;
        let set = self.set(context, at, bits);
        let same = |l: &Option<Line<T>>| l.as_ref().is_some_and(|l| l.is(context, at, bits));
        let free = set.ways.iter().position(Option::is_none);
        let place = set.ways.iter().position(same).or(free);
        let oldest = |stamps: &[u64]| (0..stamps.len()).min_by_key(|i| stamps[*i]).expect("ways");
        let way = place.unwrap_or_else(|| match policy {
            Policy::Lru => oldest(&set.used),
            Policy::Fifo => oldest(&set.filled),
            Policy::Plru => {
                let (mut low, mut high) = (0, set.ways.len());
                while high - low > 1 {
                    let middle = (low + high) / 2;
                    let right_last = set.right_last.get(&(low, high)).copied();
                    (low, high) = match right_last {
                        Some(false) => (middle, high),
                        _ => (low, middle),
                    };
                }
                low
            }
            Policy::Random => {
                for (left, by) in [(true, 13), (false, 7), (true, 17)] {
                    *random ^= if left { *random << by } else { *random >> by };
                }
                (*random % set.ways.len() as u64) as usize
            }
        });
        set.ways[way] = Some(line);
        self.note(context, at, bits, true);
        place.is_none()
    }

    fn retain(&mut self, keep: impl Fn(&Line<T>) -> bool) -> u64 {
        let mut gone = 0;
        for line in self.sets.iter_mut().flat_map(|s| &mut s.ways) {
            if line.as_ref().is_some_and(|l| !keep(l)) {
                *line = None;
                gone += 1;
            }
        }
        gone
    }

    fn lines(&self) -> impl Iterator<Item = &Line<T>> {
        self.sets.iter().flat_map(|s| s.ways.iter().flatten())
    }
}

/// The model of the TLB.
pub(super) struct Model {
    arrays: Vec<Array<Leaf>>,
    tables: Option<Array<Gpa>>,
    random: u64,
}

impl Model {
    pub(super) fn new(config: &TlbConfig) -> Self {
        let TlbConfig {
            sets, ways, policy, ..
        } = *config;
        let mut arrays = vec![Array::new(Geometry { sets, ways }, policy)];
        if let Some(split) = config.split {
            arrays.push(Array::new(split.size_2m, policy));
            arrays.push(Array::new(split.size_1g, policy));
        }
        let cache = config.walk_cache;
        let geometry = Geometry {
            sets: cache.div_ceil(4),
            ways: cache.min(4),
        };
        Self {
            arrays,
            tables: (cache > 0).then(|| Array::new(geometry, policy)),
            random: config.seed | 1 << 63,
        }
    }

    fn array(&mut self, level: u32) -> &mut Array<Leaf> {
        let last = self.arrays.len() - 1;
        &mut self.arrays[last.min(level as usize - 1)]
    }

    pub(super) fn lookup(&mut self, context: u32, at: u64, write: bool) -> Option<Line<Leaf>> {
        for level in 1..=3 {
            let array = self.array(level);
            if let Some(line) = array.find(context, at, bits(level))
                && (!write || line.value.writable && line.value.dirty)
            {
                array.note(context, at, bits(level), false);
                return Some(line);
            }
        }
        None
    }

    pub(super) fn table(&mut self, context: u32, at: u64) -> Option<(Table, Line<Gpa>)> {
        let tables = self.tables.as_mut()?;
        for level in 1..=3 {
            let span = bits(level + 1);
            if let Some(line) = tables.find(context, at, span) {
                tables.note(context, at, span, false);
                let at = line.value;
                return Some((Table { level, at }, line));
            }
        }
        None
    }

    pub(super) fn insert(
        &mut self,
        context: u32,
        at: u64,
        fill: u64,
        leaf: Leaf,
        found: &Tables,
    ) -> bool {
        for array in &mut self.arrays {
            array.retain(|l| {
                l.context != context || l.base != at >> l.bits << l.bits || {
                    l.bits == bits(leaf.level)
                }
            });
        }
        let mut random = self.random;
        let bits_of = bits(leaf.level);
        let line = Line {
            context,
            base: at >> bits_of << bits_of,
            bits: bits_of,
            value: leaf,
            fill,
        };
        let evicted = self.array(leaf.level).put(line, &mut random);
        if let Some(tables) = &mut self.tables {
            for (level, table) in (1..=3).zip(found) {
                let Some(value) = *table else { continue };
                let bits = bits(level + 1);
                let line = Line {
                    context,
                    base: at >> bits << bits,
                    bits,
                    value,
                    fill,
                };
                tables.put(line, &mut random);
            }
        }
        self.random = random;
        evicted
    }

    pub(super) fn remove(&mut self, scope: &Scope) -> u64 {
        if let Some(tables) = &mut self.tables {
            tables.retain(|l| !hit(scope, l.context, l.base, l.bits));
        }
        let arrays = self.arrays.iter_mut();
        arrays
            .map(|a| a.retain(|l| !hit(scope, l.context, l.base, l.bits)))
            .sum()
    }

    /// The leaves that it holds.
    pub(super) fn lines(&self) -> impl Iterator<Item = &Line<Leaf>> {
        self.arrays.iter().flat_map(Array::lines)
    }
}

/// Whether a scope and `2^bits` bytes at `base` have a page in common.
pub(super) fn hit(scope: &Scope, context: u32, base: u64, bits: u32) -> bool {
    match scope {
        Scope::Range(c, r) => *c == context && r.start.max(base) < r.end.min(base + (1 << bits)),
        Scope::Context(c) => *c == context,
        Scope::All => true,
    }
}
