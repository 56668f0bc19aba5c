//! The TLB: set-associative, tagged by context, entries of 4 KiB, 2 MiB and 1 GiB.
//!
//! A lookup takes no lock and looks at one set per size, whatever is cached and for however many
//! contexts. The sizes share one array or have one each, as configured. Beside them the *walk
//! cache* remembers where the tables on the way to a leaf are.
//!
//! # Large entries
//!
//! An invalidation of any part of what an entry maps removes it whole. So a large leaf that
//! software splits (writes a table with smaller leaves in its place, and invalidates what
//! changed) is gone from the TLB with the first page invalidated of it. After an insert exactly one
//! entry maps the address that was walked; elsewhere smaller entries may lie under a larger one:
//! the smaller is found first, and an invalidation removes both.
//!
//! # The walk cache
//!
//! A table is remembered only together with a leaf that was found under it, and every
//! invalidation removes the tables on the way to what it covers. Software that frees a table has
//! taken out its last leaf before and invalidated it: so no remembered table is one that was
//! freed. Levels above carry no rights, so that the leaf alone decides. A table that was replaced
//! without an invalidation may be remembered; a walk that finds nothing in it is made again from
//! the root.
//!
//! # What is inserted, and what is not
//!
//! Inserts and removals hold one lock. A miss hands out a [`Ticket`] with the context's
//! *generation* and the number of the fill; a removal raises the generation, and an insert whose
//! ticket is of an older one is refused. In this order:
//!
//! - ticket: load the generation (acquire), take a number (read-modify-write, acquire and
//!   release), walk;
//! - removal: clear the entries and tables, read the last number (read-modify-write likewise),
//!   store the new generation (release).
//!
//! Hence, for each ticket and removal of one context:
//! 1. A ticket of the new generation read what the removal stored, so its walk sees the cleared
//!    walk cache and, by what the removal's caller acquired, the cleared leaf. What it inserts is
//!    good.
//! 2. A ticket of the old generation inserts before the removal takes the lock, and is then
//!    cleared, or after, and is then refused.
//! 3. A fill with a number above the removal's note ([`Removed::fills`]) took it after the
//!    removal read it, so that its walk sees the cleared leaf, as in 1: that invalidation need
//!    not answer for it.
//! 4. A fill with that number or a lower one took it before the removal read it, and had loaded
//!    the generation before that: it is of the old generation, and by 2 in the TLB no more. The
//!    oracle may call it stale when it is used after the drain.
//!
//! Why no access still uses an entry once the drain is over is written in `guard.rs`.

pub(crate) mod saved;
pub(crate) mod scope;
mod sets;

use extlb_spec::pte::leaf_size;
use extlb_spec::{Gpa, Iova, MAX_CONTEXTS, PAGE_SIZE};

use crate::config::{Geometry, TlbConfig};
use crate::sync::{AtomicU64, Mutex, Ordering, Pillar, lock, stands};

pub(crate) use scope::Scope;
use scope::{base, numbers, shift};
use sets::{Changing, Line, Sets, Writer};

/// Levels of the page table that may hold leaves.
const LEAF_LEVELS: std::ops::RangeInclusive<u32> = 1..=3;
/// Entries of a level above: what a table of level 1, 2 or 3 maps.
const TABLE_SPANS: std::ops::RangeInclusive<u32> = 2..=4;

/// Ways of the walk cache, if it has as many tables.
const WALK_CACHE_WAYS: usize = 4;

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Start of the memory that the whole leaf maps.
    pub(crate) frame: Gpa,
    /// Level of the table that holds it: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    pub(crate) level: u32,
    pub(crate) writable: bool,
    /// The leaf's dirty bit is set: a write need not walk.
    pub(crate) dirty: bool,
}

/// A table of the device's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// 4 for the root.
    pub(crate) level: u32,
    pub(crate) at: Gpa,
}

/// Tables of level 1, 2 and 3, in this order, that a walk read.
pub(crate) type Tables = [Option<Gpa>; 3];

/// A cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) context: u32,
    /// Start of what it maps, a multiple of its size.
    pub(crate) base: Iova,
    pub(crate) leaf: Leaf,
    /// Number of the fill, in the order in which walks began.
    pub(crate) fill: u64,
}

impl Leaf {
    /// Bytes mapped.
    pub(crate) fn size(&self) -> u64 {
        leaf_size(self.level)
    }

    /// The page of 4 KiB that an address in the leaf stands for.
    pub(crate) fn page(&self, iova: Iova) -> Gpa {
        Gpa(self.frame.0 | iova.page().0 & (self.size() - 1))
    }
}

/// What a lookup says.
#[derive(Debug)]
pub(crate) enum Lookup {
    Hit(Entry),
    Miss(Ticket),
}

/// The right to insert what a walk finds, unless something is removed meanwhile.
#[derive(Debug)]
pub(crate) struct Ticket {
    context: u32,
    page: Iova,
    generation: u64,
    /// Number of the fill.
    pub(crate) fill: u64,
}

/// What became of an insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It is in.
    Kept,
    /// It is in, and another valid entry is out.
    Evicted,
    /// Translations of the context were removed since the walk began: use it once, forget it.
    Overtaken,
}

/// What a removal did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    /// Entries removed.
    pub(crate) entries: u64,
    /// Fills with this number or a lower one began before the removal.
    pub(crate) fills: u64,
}

pub(crate) struct Tlb {
    /// One for all sizes, or one each for 4 KiB, 2 MiB and 1 GiB.
    arrays: Vec<Sets>,
    walk_cache: Option<Sets>,
    /// Per context: how often translations were removed. Stored under the lock.
    generation: Vec<AtomicU64>,
    fills: AtomicU64,
    writer: Mutex<Writer>,
}

/// Tag of what begins at `base` and is as large as an entry of `level` maps (1 to 4). Never 0.
const fn tag(context: u32, base: Iova, level: u32) -> u64 {
    base.0 | (context as u64) << 3 | level as u64
}

/// The context, base and level of a tag.
const fn untag(tag: u64) -> (u32, Iova, u32) {
    let context = (tag & (PAGE_SIZE - 1)) >> 3;
    (context as u32, Iova(tag).page(), (tag & 7) as u32)
}

const _: () = assert!(
    MAX_CONTEXTS as u64 * 8 <= PAGE_SIZE,
    "fits below the address"
);

/// Bits of a line's data, below the address.
const WRITABLE: u32 = 0;
const DIRTY: u32 = 1;
/// Both are set.
const MAY_WRITE: u64 = 1 << WRITABLE | 1 << DIRTY;

impl Entry {
    fn line(&self) -> Line {
        let Leaf {
            frame,
            level,
            writable,
            dirty,
        } = self.leaf;
        Line {
            tag: tag(self.context, self.base, level),
            data: frame.0 | u64::from(writable) << WRITABLE | u64::from(dirty) << DIRTY,
            fill: self.fill,
        }
    }

    #[inline]
    fn from_line(line: Line) -> Self {
        let (context, base, level) = untag(line.tag);
        Self {
            context,
            base,
            leaf: Leaf {
                frame: Gpa(line.data).page(),
                level,
                writable: line.data >> WRITABLE & 1 == 1,
                dirty: line.data >> DIRTY & 1 == 1,
            },
            fill: line.fill,
        }
    }
}

/// Of the arrays for leaves, and of the walk cache.
fn geometries(config: &TlbConfig) -> (Vec<Geometry>, Option<Geometry>) {
    let first = Geometry {
        sets: config.sets,
        ways: config.ways,
    };
    let split = config.split.iter().flat_map(|s| [s.size_2m, s.size_1g]);
    let ways = config.walk_cache.min(WALK_CACHE_WAYS);
    let walk_cache = (ways > 0).then(|| Geometry {
        sets: config.walk_cache / ways,
        ways,
    });
    (std::iter::once(first).chain(split).collect(), walk_cache)
}

impl Tlb {
    pub(crate) fn new(config: &TlbConfig) -> Self {
        Self::with_contexts(config, MAX_CONTEXTS as usize)
    }

    /// Fewer contexts, for the model checker.
    pub(crate) fn with_contexts(config: &TlbConfig, contexts: usize) -> Self {
        let (arrays, walk_cache) = geometries(config);
        let sets = |geometry| Sets::new(geometry, config.policy);
        Self {
            arrays: arrays.into_iter().map(sets).collect(),
            walk_cache: walk_cache.map(sets),
            generation: (0..contexts).map(|_| AtomicU64::new(0)).collect(),
            fills: AtomicU64::new(0),
            writer: Mutex::new(Writer::new(config.seed)),
        }
    }

    /// The array that holds leaves of a level.
    #[inline]
    fn array(&self, level: u32) -> &Sets {
        // There are one or three.
        &self.arrays[(level as usize - 1).min(self.arrays.len() - 1)]
    }

    /// Looks a page up; a write needs an entry that is writable and dirty.
    ///
    /// Inline as a whole, so that no entry has to be put together in memory: that took as long as
    /// the rest.
    #[inline(always)]
    pub(crate) fn lookup(&self, context: u32, page: Iova, write: bool) -> Lookup {
        match self.find(context, page, write) {
            Ok(Some(entry)) => Lookup::Hit(entry),
            Ok(None) => Lookup::Miss(self.ticket(context, page)),
            Err(Changing) => self.lookup_again(context, page, write),
        }
    }

    /// A set was being changed: nothing changes under the lock.
    #[cold]
    fn lookup_again(&self, context: u32, page: Iova, write: bool) -> Lookup {
        let writer = lock(&self.writer);
        let found = self.find(context, page, write).unwrap_or(None);
        drop(writer);
        match found {
            Some(entry) => Lookup::Hit(entry),
            None => Lookup::Miss(self.ticket(context, page)),
        }
    }

    #[inline(always)]
    fn find(&self, context: u32, page: Iova, write: bool) -> Result<Option<Entry>, Changing> {
        for level in LEAF_LEVELS {
            let array = self.array(level);
            let index = array.index(context, page.0 >> shift(level));
            let tag = tag(context, base(page, level), level);
            let Some((place, line)) = array.find(index, tag)? else {
                continue;
            };
            if write && line.data & MAY_WRITE != MAY_WRITE {
                continue;
            }
            array.touch(place);
            return Ok(Some(Entry::from_line(line)));
        }
        Ok(None)
    }

    /// A walk begins. The order of the two is that of the module's documentation.
    fn ticket(&self, context: u32, page: Iova) -> Ticket {
        let generation = self.generation[context as usize].load(Ordering::Acquire);
        let fill = self.fills.fetch_add(1, Ordering::AcqRel) + 1;
        Ticket {
            context,
            page,
            generation,
            fill,
        }
    }

    /// The lowest table on the way to the ticket's page that is remembered.
    pub(crate) fn table(&self, ticket: &Ticket) -> Option<Table> {
        let cache = self.walk_cache.as_ref()?;
        for span in TABLE_SPANS {
            let index = cache.index(ticket.context, ticket.page.0 >> shift(span));
            let tag = tag(ticket.context, base(ticket.page, span), span);
            // A set that is being changed is as good as empty: the walk begins higher up.
            if let Ok(Some((place, line))) = cache.find(index, tag) {
                cache.touch(place);
                return Some(Table {
                    level: span - 1,
                    at: Gpa(line.data),
                });
            }
        }
        None
    }

    /// Inserts what a walk found: the leaf, and the tables that it read on the way.
    pub(crate) fn insert(&self, ticket: &Ticket, leaf: Leaf, tables: &Tables) -> Inserted {
        let Ticket { context, page, .. } = *ticket;
        let mut writer = lock(&self.writer);
        // Under the lock, as are the removals that raise it.
        let generation = self.generation[context as usize].load(Ordering::Relaxed);
        if stands(Pillar::Generation) && generation != ticket.generation {
            return Inserted::Overtaken;
        }
        for level in LEAF_LEVELS.filter(|level| *level != leaf.level) {
            let array = self.array(level);
            let index = array.index(context, page.0 >> shift(level));
            let tag = tag(context, base(page, level), level);
            array.clear(&mut writer, index, &mut |t| t == tag);
        }
        let entry = Entry {
            context,
            base: base(page, leaf.level),
            leaf,
            fill: ticket.fill,
        };
        let array = self.array(leaf.level);
        let index = array.index(context, page.0 >> shift(leaf.level));
        let evicted = array.put(&mut writer, index, entry.line());
        if let Some(cache) = &self.walk_cache {
            for (span, table) in TABLE_SPANS.zip(tables) {
                let Some(table) = table else { continue };
                let index = cache.index(context, page.0 >> shift(span));
                let line = Line {
                    tag: tag(context, base(page, span), span),
                    data: table.0,
                    fill: ticket.fill,
                };
                cache.put(&mut writer, index, line);
            }
        }
        match evicted {
            true => Inserted::Evicted,
            false => Inserted::Kept,
        }
    }

    /// Removes what the scope covers, and keeps walks that began earlier from inserting. `each`
    /// is called with the context of every entry removed.
    pub(crate) fn remove(&self, scope: &Scope, mut each: impl FnMut(u32)) -> Removed {
        let mut writer = lock(&self.writer);
        let mut entries = 0;
        let mut covered = |tag: u64| {
            let (context, base, level) = untag(tag);
            scope.touches(context, base, leaf_size(level))
        };
        let mut removed = |tag: u64| {
            let covered = covered(tag);
            if covered {
                entries += 1;
                each(untag(tag).0);
            }
            covered
        };
        match &self.arrays[..] {
            [all] => clear(&mut writer, all, scope, LEAF_LEVELS, &mut removed),
            arrays => {
                for (array, level) in arrays.iter().zip(LEAF_LEVELS) {
                    clear(&mut writer, array, scope, level..=level, &mut removed);
                }
            }
        }
        if let Some(cache) = &self.walk_cache {
            clear(&mut writer, cache, scope, TABLE_SPANS, &mut covered);
        }
        // In this order: see the module's documentation.
        let fills = self.fills.fetch_add(0, Ordering::AcqRel);
        let raise = |generation: &AtomicU64| {
            generation.fetch_add(1, Ordering::Release);
        };
        match scope {
            Scope::Range(context, _) | Scope::Context(context) => {
                raise(&self.generation[*context as usize]);
            }
            Scope::All => self.generation.iter().for_each(raise),
        }
        Removed { entries, fills }
    }

    /// Every entry of a context, for the audit.
    pub(crate) fn entries(&self, context: u32) -> Vec<Entry> {
        let writer = lock(&self.writer);
        let mut entries = Vec::new();
        for array in &self.arrays {
            array.lines(&writer, &mut |line| {
                let entry = Entry::from_line(line);
                if entry.context == context {
                    entries.push(entry);
                }
            });
        }
        entries
    }
}

/// Clears an array whose lines are as large as entries of these levels.
fn clear(
    writer: &mut Writer,
    array: &Sets,
    scope: &Scope,
    levels: std::ops::RangeInclusive<u32>,
    covered: &mut dyn FnMut(u64) -> bool,
) {
    if let Scope::Range(context, range) = scope {
        let count = |level| {
            let numbers = numbers(range, level);
            numbers.end - numbers.start
        };
        // Few pieces: look at their sets only. The sum is below 2^37.
        if levels.clone().map(count).sum::<u64>() <= array.len() as u64 {
            for level in levels {
                for number in numbers(range, level) {
                    array.clear(writer, array.index(*context, number), covered);
                }
            }
            return;
        }
    }
    for index in 0..array.len() {
        array.clear(writer, index, covered);
    }
}
