//! What lives are made of: what a kernel and its programs do, at random.

use extlb_spec::page_request::Response;
use extlb_spec::work::Segment;
use proptest::prelude::*;

use crate::common::PAGE;
use crate::model::world::{CONTEXTS, Change, MAX_BATCH};

/// Where an operand, or a change, is: on a single page or in the piece that may be large.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Small(u64),
    Large(u64),
    Ring,
    Records,
    Lists,
    Batches,
}

/// What beside its opcode and its operands an operation has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    pub quiet: bool,
    /// The operands are lists, if the operation takes one there.
    pub lists: [Option<Cut>; 2],
}

/// How an operand is cut into a list.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// In thousandths of its length.
    pub at: [u64; 2],
    pub order: Order,
    /// A segment of nothing at the end.
    pub empty: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Order {
    Forward,
    Backward,
    /// The first segment is lost.
    Short,
    /// One byte too many at the end.
    Long,
}

impl Cut {
    pub fn list(self, addr: u64, len: u64) -> Vec<Segment> {
        let [a, b] = self.at.map(|at| len * at / 1000);
        let (a, b) = (a.min(b), a.max(b));
        let mut list: Vec<_> = [(0, a), (a, b), (b, len)]
            .map(|(from, to)| Segment {
                addr: addr + from,
                len: to - from,
            })
            .into();
        match self.order {
            Order::Forward => {}
            Order::Backward => list.reverse(),
            Order::Short => drop(list.remove(0)),
            Order::Long => list[2].len += 1,
        }
        if self.empty {
            list.push(Segment::default());
        }
        list
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Work {
    Nop,
    Fence,
    Bad,
    Copy,
    Fill,
    Crc,
    Compare,
    FetchAdd,
    CompareSwap,
}

#[derive(Clone, Debug)]
pub enum Action {
    Submit {
        context: u32,
        work: Work,
        src: Place,
        dst: Place,
        offset: u64,
        len: u64,
        manner: Manner,
        kick: bool,
    },
    Batch {
        context: u32,
        /// Operation, operands, offset, length.
        all: Vec<(Work, Place, Place, u64, u64)>,
        quiet: bool,
        kick: bool,
    },
    Ring(u32),
    Engine(u32),
    Queue(u32),
    /// Changes a leaf; then perhaps invalidates, waits on a level, and lets the device do so.
    Change {
        context: u32,
        place: Place,
        change: Change,
        shoot: Shoot,
    },
    Large {
        context: u32,
        map: bool,
        shoot: Shoot,
    },
    Split(u32),
    Invalidate(u32, Option<(Place, u64)>),
    All,
    Wait(u32, bool),
    Take,
    /// Answers one of the requests so far, counted from the latest: late and twice as well.
    Answer(usize, Response, bool),
    Start(u32),
    Stop(u32),
    Credits(u32, u32),
    BusMaster(bool),
    Reset(bool),
    /// Actions of the kernel in the middle of a coming access.
    Within(u64, Vec<Action>),
    /// A page is used, changed and shot down (or its context started anew), and used again.
    Again {
        context: u32,
        work: Work,
        place: Place,
        change: Change,
        manner: Manner,
        restart: bool,
        drained: bool,
    },
    /// A page is taken away, and refused to whoever asks for it then.
    Refuse {
        context: u32,
        place: Place,
        work: Work,
        manner: Manner,
        response: Response,
    },
    Settle,
}

#[derive(Clone, Copy, Debug)]
pub struct Shoot {
    pub invalidate: bool,
    pub wait: Option<u32>,
    pub steps: u32,
}

fn context() -> impl Strategy<Value = u32> {
    // Mostly one: the others are there to be left alone.
    prop_oneof![3 => Just(0), 2 => 1..CONTEXTS]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        8 => (0..3u64).prop_map(Place::Small),
        3 => (0..4u64).prop_map(Place::Large),
        1 => Just(Place::Ring),
        1 => Just(Place::Records),
        1 => Just(Place::Lists),
        1 => Just(Place::Batches),
    ]
}

fn operand() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => (0..3u64).prop_map(Place::Small),
        1 => (0..4u64).prop_map(Place::Large),
    ]
}

fn work() -> impl Strategy<Value = Work> {
    prop_oneof![
        1 => Just(Work::Nop),
        1 => Just(Work::Fence),
        1 => Just(Work::Bad),
        1 => Just(Work::Crc),
        1 => Just(Work::Compare),
        1 => Just(Work::FetchAdd),
        1 => Just(Work::CompareSwap),
        2 => Just(Work::Fill),
        3 => Just(Work::Copy),
    ]
}

fn manner() -> impl Strategy<Value = Manner> {
    let order = prop_oneof![
        4 => Just(Order::Forward),
        4 => Just(Order::Backward),
        1 => Just(Order::Short),
        1 => Just(Order::Long),
    ];
    let cut = ([0..1000u64, 0..1000u64], order, any::<bool>()).prop_map(|(at, order, empty)| Cut {
        at,
        order,
        empty,
    });
    let list = || prop::option::weighted(0.3, cut.clone());
    (prop::bool::weighted(0.3), [list(), list()]).prop_map(|(quiet, lists)| Manner { quiet, lists })
}

fn how() -> impl Strategy<Value = Shoot> {
    (
        prop::bool::weighted(0.8),
        prop::option::weighted(0.8, 0..3u32),
        0..4u32,
    )
        .prop_map(|(invalidate, wait, steps)| Shoot {
            invalidate,
            wait,
            steps,
        })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => any::<bool>().prop_map(|write| Change::Map { write }),
        2 => Just(Change::Unmap),
        1 => any::<bool>().prop_map(|write| Change::Protect { write }),
    ]
}

fn response() -> impl Strategy<Value = Response> {
    prop_oneof![
        6 => Just(Response::Success),
        2 => Just(Response::Invalid),
        1 => Just(Response::Failure),
    ]
}

fn kernel_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (1..4u32).prop_map(Action::Queue),
        6 => (context(), place(), change(), how()).prop_map(|(context, place, change, shoot)| {
            Action::Change { context, place, change, shoot }
        }),
        1 => (context(), any::<bool>(), how())
            .prop_map(|(context, map, shoot)| Action::Large { context, map, shoot }),
        1 => context().prop_map(Action::Split),
        2 => (context(), prop::option::of((place(), 0..6u64)))
            .prop_map(|(context, range)| Action::Invalidate(context, range)),
        1 => Just(Action::All),
        2 => (0..3u32, any::<bool>()).prop_map(|(level, interrupt)| Action::Wait(level, interrupt)),
        4 => (prop_oneof![4 => 0..3usize, 1 => 0..40usize], response(), prop::bool::weighted(0.8))
            .prop_map(|(back, response, map)| Action::Answer(back, response, map)),
    ]
}

pub fn action() -> impl Strategy<Value = Action> {
    let submit = (
        context(),
        work(),
        operand(),
        operand(),
        0..PAGE,
        1..3 * PAGE,
        manner(),
        prop::bool::weighted(0.8),
    )
        .prop_map(
            |(context, work, src, dst, offset, len, manner, kick)| Action::Submit {
                context,
                work,
                src,
                dst,
                offset,
                len,
                manner,
                kick,
            },
        );
    let one = (work(), operand(), operand(), 0..PAGE, 1..2 * PAGE);
    let batch = (
        context(),
        prop::collection::vec(one, 0..=MAX_BATCH),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.8),
    )
        .prop_map(|(context, all, quiet, kick)| Action::Batch {
            context,
            all,
            quiet,
            kick,
        });
    prop_oneof![
        8 => submit,
        2 => batch,
        1 => context().prop_map(Action::Ring),
        10 => (1..6u32).prop_map(Action::Engine),
        12 => kernel_action(),
        4 => Just(Action::Take),
        2 => context().prop_map(Action::Start),
        1 => context().prop_map(Action::Stop),
        1 => (context(), 1..4u32).prop_map(|(context, credits)| Action::Credits(context, credits)),
        2 => any::<bool>().prop_map(Action::BusMaster),
        1 => prop::bool::weighted(0.5).prop_map(Action::Reset),
        6 => (0..6u64, prop::collection::vec(kernel_action(), 1..5))
            .prop_map(|(after, actions)| Action::Within(after, actions)),
        4 => (
            context(),
            work(),
            operand(),
            change(),
            manner(),
            prop::bool::weighted(0.3),
            any::<bool>(),
        )
            .prop_map(|(context, work, place, change, manner, restart, drained)| Action::Again {
                context,
                work,
                place,
                change,
                manner,
                restart,
                drained,
            }),
        2 => (context(), place(), work(), manner(), response()).prop_map(
            |(context, place, work, manner, response)| Action::Refuse {
                context,
                place,
                work,
                manner,
                response,
            }
        ),
        1 => Just(Action::Settle),
    ]
}
