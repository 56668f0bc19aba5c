//! Random histories of the TLB and of the page table under it, beside the model of it.
//!
//! A log of all fills and removals checks the rule itself, whatever model and TLB agree on.

use std::collections::HashMap;

use extlb_spec::{Gpa, Iova, PAGE_SHIFT};
use proptest::prelude::*;

use super::model::{Model, bits, hit};
use crate::config::{Geometry, Policy, Split, TlbConfig};
use crate::tlb::{Inserted, Leaf, Lookup, Scope, Tables, Ticket, Tlb};

const CONTEXTS: u32 = 3;

/// A page table: for each place the leaf, larger ones first.
#[derive(Clone, Default)]
struct PageTable(HashMap<(u32, u64, u32), u64>);

impl PageTable {
    /// The leaf at an address; places nobody set are mapped one to one by 4 KiB.
    fn walk(&self, context: u32, at: u64, dirty: bool) -> Leaf {
        let found = (1..=3).rev().find_map(|level| {
            let base = at >> bits(level) << bits(level);
            let frame = self.0.get(&(context, base, level))?;
            Some((level, *frame))
        });
        let (level, frame) = found.unwrap_or((1, at >> PAGE_SHIFT));
        let frame = Gpa(frame << bits(level) & ((1 << 52) - 1));
        Leaf {
            frame,
            level,
            writable: true,
            dirty,
        }
    }
}

#[derive(Clone, Debug)]
enum Action {
    /// Software changes a leaf and says nothing yet.
    SetLeaf(u32, u64, u32, u64),
    ClearLeaf(u32, u64, u32),
    Access(u32, u64, bool),
    /// A walk begins, and ends some actions later, in the order of the last field.
    Begin(u32, u64, bool),
    End(prop::sample::Index),
    Remove(Scope),
}

/// Addresses that meet in sets, in large leaves, and at the end of the space.
fn address() -> impl Strategy<Value = u64> {
    let corner = prop_oneof![Just(0u64), Just(3 << 30), Just((1 << 48) - (1 << 30))];
    (corner, 0..3u64, 0..6u64).prop_map(|(corner, mid, page)| corner + (mid << 21) + (page << 12))
}

fn context() -> impl Strategy<Value = u32> {
    0..CONTEXTS
}

fn scope() -> impl Strategy<Value = Scope> {
    let len = prop_oneof![0..8u64, 510..520u64, Just(1 << 18), Just(1 << 36)];
    prop_oneof![
        8 => (context(), address(), len).prop_map(|(c, start, len)| {
            Scope::Range(c, start..start + (len << PAGE_SHIFT))
        }),
        1 => context().prop_map(Scope::Context),
        1 => Just(Scope::All),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let level = 1..=3u32;
    prop_oneof![
        4 => (context(), address(), level.clone(), 0..1000u64)
            .prop_map(|(c, at, l, frame)| Action::SetLeaf(c, at, l, frame)),
        2 => (context(), address(), level).prop_map(|(c, at, l)| Action::ClearLeaf(c, at, l)),
        16 => (context(), address(), any::<bool>()).prop_map(|(c, at, w)| Action::Access(c, at, w)),
        3 => (context(), address(), any::<bool>()).prop_map(|(c, at, w)| Action::Begin(c, at, w)),
        3 => any::<prop::sample::Index>().prop_map(Action::End),
        4 => scope().prop_map(Action::Remove),
    ]
}

fn configs() -> impl Strategy<Value = TlbConfig> {
    let policy = prop_oneof![
        Just(Policy::Lru),
        Just(Policy::Plru),
        Just(Policy::Fifo),
        Just(Policy::Random)
    ];
    let geometry = || {
        (0..3u32, 0..4u32).prop_map(|(s, w)| Geometry {
            sets: 1 << s,
            ways: 1 << w,
        })
    };
    let split = prop::option::of((geometry(), geometry()));
    let cache = prop_oneof![Just(0), Just(1), Just(2), Just(8), Just(32)];
    (
        geometry(),
        policy,
        split,
        cache,
        any::<u64>(),
        any::<bool>(),
    )
        .prop_map(|(first, policy, split, walk_cache, seed, odd)| TlbConfig {
            sets: first.sets,
            // Trees are of powers of two only.
            ways: first.ways + usize::from(odd && policy != Policy::Plru),
            policy,
            seed,
            walk_cache,
            split: split.map(|(size_2m, size_1g)| Split { size_2m, size_1g }),
        })
}

/// A walk that has ended or will.
struct Walk {
    ticket: Ticket,
    context: u32,
    at: u64,
    leaf: Leaf,
    tables: Tables,
    /// Removals of the context before it began.
    removals: usize,
}

struct Run {
    tlb: Tlb,
    model: Model,
    pages: PageTable,
    open: Vec<Walk>,
    /// For each fill: what its walk found, and when in `removals` it began.
    fills: HashMap<u64, (Leaf, Tables, usize)>,
    removals: Vec<(Scope, u64)>,
    evicted: u64,
    removed: u64,
    inserted: u64,
}

type Checked = Result<(), TestCaseError>;

impl Run {
    /// THE RULE: nothing that covers what fill number `fill` brought was removed since its walk began.
    fn check_not_removed(&self, fill: u64, context: u32, base: u64, bits: u32) -> Checked {
        let since = self.fills[&fill].2;
        for (i, (scope, note)) in self.removals.iter().enumerate() {
            if hit(scope, context, base, bits) {
                prop_assert!(i < since, "used after {scope:?}");
                prop_assert!(fill > *note, "an innocent fill would be accused");
            }
        }
        Ok(())
    }

    fn begin(&mut self, context: u32, at: u64, write: bool) -> Result<Option<Walk>, TestCaseError> {
        let expected = self.model.lookup(context, at, write);
        match self.tlb.lookup(context, Iova(at), write) {
            Lookup::Hit(entry) => {
                let expected = expected.expect("a hit that the model does not have");
                prop_assert_eq!((entry.leaf, entry.fill), (expected.value, expected.fill));
                prop_assert_eq!(entry.base.0, expected.base);
                prop_assert!(!write || entry.leaf.dirty);
                prop_assert_eq!(entry.leaf, self.fills[&entry.fill].0);
                self.check_not_removed(entry.fill, context, entry.base.0, bits(entry.leaf.level))?;
                Ok(None)
            }
            Lookup::Miss(ticket) => {
                prop_assert_eq!(expected, None, "a miss that the model does not have");
                let known = self.model.table(context, at);
                prop_assert_eq!(self.tlb.table(&ticket), known.map(|k| k.0));
                if let Some((table, line)) = known {
                    let found = self.fills[&line.fill].1[table.level as usize - 1];
                    prop_assert_eq!(found, Some(table.at));
                    self.check_not_removed(line.fill, context, line.base, line.bits)?;
                }
                let leaf = self.pages.walk(context, at, write);
                let from = known.map_or(4, |(table, _)| table.level);
                let mut tables = Tables::default();
                for level in leaf.level..from.max(leaf.level) {
                    tables[level as usize - 1] =
                        Some(Gpa(ticket.fill << 16 | u64::from(level) << 12));
                }
                let removals = self.removals.len();
                self.fills.insert(ticket.fill, (leaf, tables, removals));
                Ok(Some(Walk {
                    ticket,
                    context,
                    at,
                    leaf,
                    tables,
                    removals,
                }))
            }
        }
    }

    fn end(&mut self, walk: Walk) -> Checked {
        let Walk {
            ticket,
            context,
            at,
            leaf,
            tables,
            removals,
        } = walk;
        let overtaken = self.removals[removals..]
            .iter()
            .any(|(scope, _)| match scope {
                Scope::Range(c, _) | Scope::Context(c) => *c == context,
                Scope::All => true,
            });
        let before = self.cached();
        let inserted = self.tlb.insert(&ticket, leaf, &tables);
        if overtaken {
            prop_assert_eq!(inserted, Inserted::Overtaken);
            return Ok(());
        }
        let evicted = self.model.insert(context, at, ticket.fill, leaf, &tables);
        prop_assert_eq!(inserted == Inserted::Evicted, evicted);
        self.evicted += u64::from(evicted);
        // What it took the place of counts against it.
        self.inserted += self.cached() + u64::from(evicted);
        self.inserted -= before;
        Ok(())
    }

    fn cached(&self) -> u64 {
        (0..CONTEXTS)
            .map(|c| self.tlb.entries(c).len() as u64)
            .sum()
    }

    fn step(&mut self, action: Action) -> Checked {
        match action {
            Action::SetLeaf(c, at, level, frame) => {
                self.pages
                    .0
                    .insert((c, at >> bits(level) << bits(level), level), frame);
            }
            Action::ClearLeaf(c, at, level) => {
                self.pages
                    .0
                    .remove(&(c, at >> bits(level) << bits(level), level));
            }
            Action::Access(c, at, write) => {
                if let Some(walk) = self.begin(c, at, write)? {
                    self.end(walk)?;
                }
            }
            Action::Begin(c, at, write) => {
                let walk = self.begin(c, at, write)?;
                self.open.extend(walk);
            }
            Action::End(index) if !self.open.is_empty() => {
                let walk = self.open.swap_remove(index.index(self.open.len()));
                self.end(walk)?;
            }
            Action::End(_) => {}
            Action::Remove(scope) => {
                let mut each = vec![0; CONTEXTS as usize];
                let lines = |c| self.tlb.entries(c).len() as u64;
                let before: Vec<u64> = (0..CONTEXTS).map(lines).collect();
                let removed = self.tlb.remove(&scope, |c| each[c as usize] += 1);
                let gone: Vec<u64> = (0..CONTEXTS)
                    .map(|c| before[c as usize] - lines(c))
                    .collect();
                prop_assert_eq!(&each, &gone, "told for each context");
                prop_assert_eq!(removed.entries, self.model.remove(&scope));
                prop_assert_eq!(removed.entries, each.iter().sum::<u64>());
                self.removed += removed.entries;
                self.removals.push((scope, removed.fills));
            }
        }
        self.check_contents()
    }

    fn check_contents(&self) -> Checked {
        let mut seen = HashMap::new();
        for c in 0..CONTEXTS {
            for e in self.tlb.entries(c) {
                let key = (e.context, e.base.0, bits(e.leaf.level));
                prop_assert!(seen.insert(key, (e.leaf, e.fill)).is_none(), "twice: {e:?}");
            }
        }
        let model: HashMap<_, _> = self
            .model
            .lines()
            .map(|l| ((l.context, l.base, l.bits), (l.value, l.fill)))
            .collect();
        prop_assert_eq!(&seen, &model);
        prop_assert_eq!(
            seen.len() as u64,
            self.inserted - self.evicted - self.removed
        );
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..Default::default() })]

    #[test]
    fn behaves_like_the_model_and_keeps_the_rule(
        config in configs(),
        actions in prop::collection::vec(action(), 0..150),
    ) {
        let mut run = Run {
            tlb: Tlb::with_contexts(&config, CONTEXTS as usize),
            model: Model::new(&config),
            pages: PageTable::default(),
            open: Vec::new(),
            fills: HashMap::new(),
            removals: Vec::new(),
            evicted: 0,
            removed: 0,
            inserted: 0,
        };
        for action in actions {
            run.step(action)?;
        }
    }
}
