//! A set-associative array that is read without a lock.
//!
//! A set is a row of atomic words: for each way a tag, data and the number of the fill, and in
//! front a sequence number that is odd while the set changes (a seqlock). A reader takes the words
//! between two looks at the sequence number; if they differ it takes nothing. Whoever writes
//! holds the lock of the TLB, proved by `&mut Writer`.

use crate::config::{Geometry, Policy};
use crate::state::{MAX_COUNT, StateError, check};
use crate::sync::{AtomicU64, Ordering, Pillar, fence, stands};

/// The right to change the array; lives in the TLB's lock.
#[derive(Debug)]
pub(super) struct Writer {
    random: u64,
}

impl Writer {
    pub(super) fn new(seed: u64) -> Self {
        // Xorshift must not start from zero.
        Self {
            random: seed | 1 << 63,
        }
    }

    /// As it was saved.
    pub(super) fn restore(random: u64) -> Result<Self, StateError> {
        check("the random state of the TLB", random != 0, random)?;
        Ok(Self { random })
    }

    pub(super) fn save(&self) -> u64 {
        let Self { random } = self;
        *random
    }

    fn random(&mut self) -> u64 {
        let mut x = self.random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random = x;
        x
    }
}

/// What is stored under a tag. A tag is never 0: that is a free way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) tag: u64,
    pub(super) data: u64,
    pub(super) fill: u64,
}

/// The set changed under the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changing;

/// Where a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    set: usize,
    way: usize,
}

pub(super) struct Sets {
    sets: usize,
    ways: usize,
    policy: Policy,
    words: Box<[AtomicU64]>,
}

/// The words of one set.
struct Set<'a> {
    sequence: &'a AtomicU64,
    /// LRU, FIFO: the rank given last. Tree-PLRU: the tree, bit n is node n, the root is 1; set:
    /// the older half is the right one.
    order: &'a AtomicU64,
    tags: &'a [AtomicU64],
    data: &'a [AtomicU64],
    fills: &'a [AtomicU64],
    /// LRU, FIFO: order of last use, or of fill.
    ranks: &'a [AtomicU64],
}

impl Set<'_> {
    /// The first way that holds a tag. Looks at several before it decides: which way it is cannot be
    /// foreseen, and a wrong guess of the processor costs more than the lookup.
    #[inline]
    fn way(&self, tag: u64) -> Option<usize> {
        for (first, tags) in (0..).step_by(TOGETHER).zip(self.tags.chunks(TOGETHER)) {
            let mut found = usize::MAX;
            for (way, other) in tags.iter().enumerate().rev() {
                let hit = other.load(Ordering::Relaxed) == tag;
                found = if hit { way } else { found };
            }
            if found < tags.len() {
                return Some(first + found);
            }
        }
        None
    }
}

/// Ways that are compared before a decision.
const TOGETHER: usize = 4;
const HEAD: usize = 2;
const COLUMNS: usize = 4;

impl Sets {
    pub(super) fn new(geometry: Geometry, policy: Policy) -> Self {
        let Geometry { sets, ways } = geometry;
        let words = sets * (HEAD + COLUMNS * ways);
        Self {
            sets,
            ways,
            policy,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// All words. The caller holds the lock.
    pub(super) fn save(&self, _writer: &Writer) -> Vec<u64> {
        let Self {
            sets: _,
            ways: _,
            policy: _,
            words,
        } = self;
        words.iter().map(|w| w.load(Ordering::Relaxed)).collect()
    }

    /// An array as it was saved; `good` says whether a line can be in the set with this index.
    pub(super) fn restore(
        geometry: Geometry,
        policy: Policy,
        words: Vec<u64>,
        good: impl Fn(&Self, usize, Line) -> bool,
    ) -> Result<Self, StateError> {
        let mut array = Self::new(geometry, policy);
        let size = words.len();
        check("the size of the TLB", size == array.words.len(), size)?;
        array.words = words.into_iter().map(AtomicU64::new).collect();
        let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
        for index in 0..array.sets {
            let Set {
                sequence,
                order,
                tags,
                data,
                fills,
                ranks,
            } = array.set(index);
            let sequence = get(sequence);
            let still = sequence % 2 == 0 && sequence < MAX_COUNT;
            check("the sequence number of a set", still, sequence)?;
            // Of the other policies the first is a tree, or nothing, and the second not used.
            if matches!(policy, Policy::Lru | Policy::Fifo) {
                let newest = get(order);
                check("the newest rank of a set", newest < MAX_COUNT, newest)?;
                let rank = ranks.iter().map(get).max().unwrap_or(0);
                check("a rank of the TLB", rank <= newest, rank)?;
            }
            for (way, tag) in tags
                .iter()
                .map(get)
                .enumerate()
                .filter(|(_, tag)| *tag != 0)
            {
                let line = Line {
                    tag,
                    data: get(&data[way]),
                    fill: get(&fills[way]),
                };
                let once = tags[..way].iter().all(|other| get(other) != tag);
                check(
                    "an entry of the TLB",
                    once && good(&array, index, line),
                    line,
                )?;
            }
        }
        Ok(array)
    }

    pub(super) fn len(&self) -> usize {
        self.sets
    }

    /// The set of the piece with this number. Neighbours go to neighbouring sets; contexts start
    /// at different ones.
    pub(super) fn index(&self, context: u32, number: u64) -> usize {
        (number as usize).wrapping_add(context as usize * 0x9e37_79b1) & (self.sets - 1)
    }

    #[inline]
    fn set(&self, index: usize) -> Set<'_> {
        let stride = HEAD + COLUMNS * self.ways;
        let words = &self.words[index * stride..][..stride];
        let (head, words) = words.split_at(HEAD);
        let (tags, words) = words.split_at(self.ways);
        let (data, words) = words.split_at(self.ways);
        let (fills, ranks) = words.split_at(self.ways);
        Set {
            sequence: &head[0],
            order: &head[1],
            tags,
            data,
            fills,
            ranks,
        }
    }

    /// Looks a tag up, without a lock.
    #[inline(always)]
    pub(super) fn find(&self, index: usize, tag: u64) -> Result<Option<(Place, Line)>, Changing> {
        let set = self.set(index);
        // Acquire pairs with the release at the end of `change`: what is read below is at least
        // as new as this number.
        let before = set.sequence.load(Ordering::Acquire);
        let found = set.way(tag).map(|way| {
            let line = Line {
                tag,
                data: set.data[way].load(Ordering::Relaxed),
                fill: set.fills[way].load(Ordering::Relaxed),
            };
            (Place { set: index, way }, line)
        });
        // Pairs with the release fence in `change`: if a word above was written by a change, the
        // number below is that change's or a later one.
        fence(Ordering::Acquire);
        let after = set.sequence.load(Ordering::Relaxed);
        if stands(Pillar::Sequence) && (before % 2 == 1 || before != after) {
            return Err(Changing);
        }
        Ok(found)
    }

    /// A line was used. Relaxed, and without the lock: threads that meet here may spoil the order
    /// of use, and nothing else.
    #[inline]
    pub(super) fn touch(&self, place: Place) {
        let set = self.set(place.set);
        match self.policy {
            Policy::Lru => {
                let newest = set.order.load(Ordering::Relaxed);
                let rank = &set.ranks[place.way];
                if rank.load(Ordering::Relaxed) != newest {
                    set.order.store(newest + 1, Ordering::Relaxed);
                    rank.store(newest + 1, Ordering::Relaxed);
                }
            }
            Policy::Plru => {
                let old = set.order.load(Ordering::Relaxed);
                let new = point_away(old, place.way, self.ways);
                if old != new {
                    set.order.store(new, Ordering::Relaxed);
                }
            }
            Policy::Fifo | Policy::Random => {}
        }
    }

    /// Changes a set: readers that overlap take nothing.
    fn change<R>(&self, set: &Set<'_>, change: impl FnOnce() -> R) -> R {
        // Only writers store it, and they hold the lock.
        let before = set.sequence.load(Ordering::Relaxed);
        set.sequence.store(before + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let result = change();
        set.sequence.store(before + 2, Ordering::Release);
        result
    }

    /// Stores a line: in place of the one with its tag, in a free way, or in place of the one
    /// that the policy names. Whether another one went.
    pub(super) fn put(&self, writer: &mut Writer, index: usize, line: Line) -> bool {
        let set = self.set(index);
        let (way, evicted) = match set.way(line.tag).or_else(|| set.way(0)) {
            Some(way) => (way, false),
            None => (self.victim(writer, &set), true),
        };
        self.change(&set, || {
            set.tags[way].store(line.tag, Ordering::Relaxed);
            set.data[way].store(line.data, Ordering::Relaxed);
            set.fills[way].store(line.fill, Ordering::Relaxed);
        });
        match self.policy {
            Policy::Lru | Policy::Fifo => {
                let rank = set.order.load(Ordering::Relaxed) + 1;
                set.order.store(rank, Ordering::Relaxed);
                set.ranks[way].store(rank, Ordering::Relaxed);
            }
            Policy::Plru => self.touch(Place { set: index, way }),
            Policy::Random => {}
        }
        evicted
    }

    fn victim(&self, writer: &mut Writer, set: &Set<'_>) -> usize {
        match self.policy {
            Policy::Random => (writer.random() % self.ways as u64) as usize,
            Policy::Plru => oldest(set.order.load(Ordering::Relaxed), self.ways),
            Policy::Lru | Policy::Fifo => (0..self.ways)
                .min_by_key(|way| set.ranks[*way].load(Ordering::Relaxed))
                .unwrap_or(0),
        }
    }

    /// Removes the lines of a set whose tag `covered` names.
    pub(super) fn clear(
        &self,
        _writer: &mut Writer,
        index: usize,
        covered: &mut dyn FnMut(u64) -> bool,
    ) {
        let set = self.set(index);
        // A full set is at most 64 ways.
        let mut gone = 0u64;
        for (way, tag) in set.tags.iter().enumerate() {
            let tag = tag.load(Ordering::Relaxed);
            if tag != 0 && covered(tag) {
                gone |= 1 << way;
            }
        }
        if gone == 0 {
            return;
        }
        self.change(&set, || {
            for (way, tag) in set.tags.iter().enumerate() {
                if gone >> way & 1 == 1 {
                    tag.store(0, Ordering::Relaxed);
                }
            }
        });
    }

    /// Every line. The caller holds the lock.
    pub(super) fn lines(&self, _writer: &Writer, f: &mut dyn FnMut(Line)) {
        for index in 0..self.sets {
            let set = self.set(index);
            for (way, tag) in set.tags.iter().enumerate() {
                let tag = tag.load(Ordering::Relaxed);
                if tag != 0 {
                    f(Line {
                        tag,
                        data: set.data[way].load(Ordering::Relaxed),
                        fill: set.fills[way].load(Ordering::Relaxed),
                    });
                }
            }
        }
    }
}

/// The tree after a use of `way`: every node on the way to it points to its other half.
fn point_away(mut tree: u64, way: usize, ways: usize) -> u64 {
    let mut node = 1;
    let mut half = ways / 2;
    while half > 0 {
        let right = way & half != 0;
        let bit = 1 << node;
        tree = if right { tree & !bit } else { tree | bit };
        node = 2 * node + usize::from(right);
        half /= 2;
    }
    tree
}

/// The way to which the nodes point.
fn oldest(tree: u64, ways: usize) -> usize {
    let mut node = 1;
    while node < ways {
        node = 2 * node + (tree >> node & 1) as usize;
    }
    node - ways
}

#[cfg(test)]
mod tests {
    /// Filled where the tree points, and touched there: each way once in a round, and the way
    /// touched last is not the next.
    #[test]
    fn a_tree_takes_every_way_in_turn() {
        for log2 in 0..=6 {
            let ways = 1 << log2;
            let mut tree = 0;
            for _ in 0..3 {
                let mut taken = vec![false; ways];
                for _ in 0..ways {
                    let way = super::oldest(tree, ways);
                    assert!(
                        !std::mem::replace(&mut taken[way], true),
                        "{ways} ways: {way}"
                    );
                    tree = super::point_away(tree, way, ways);
                    assert!(
                        ways == 1 || super::oldest(tree, ways) != way,
                        "{ways} ways: {way}"
                    );
                }
            }
            // A use in between saves a way, and its neighbour in the tree goes before it.
            for way in 0..ways {
                let tree =
                    super::point_away(super::point_away(0, way, ways), way ^ (ways / 2), ways);
                let half = super::oldest(tree, ways) & (ways / 2);
                assert!(ways == 1 || half == way & (ways / 2), "{ways} ways: {way}");
            }
        }
    }
}
