//! Ordinary work on a device that may be broken: says how it ended, and never waits for ever.

use std::time::Duration;

use anyhow::Result;
use extlb_driver::{Device, Kernel, Options, SliceMut};

const BYTES: usize = 64 << 10;

/// What became of the work.
#[derive(Debug, Default)]
struct Seen {
    completed: u32,
    pending: u32,
    differs: u32,
}

/// Fills memory, looks at it and takes it back, `rounds` times or until there is an error. An
/// operation that takes longer than `patience` is given up, with its context.
pub fn run(rounds: u32, patience: Duration) -> Result<()> {
    let mut seen = Seen::default();
    let error = work(rounds, patience, &mut seen).err();
    let Seen {
        completed,
        pending,
        differs,
    } = seen;
    println!("completed {completed} pending {pending} differs {differs}");
    if let Some(error) = error {
        println!("error: {error}");
    }
    Ok(())
}

fn work(rounds: u32, patience: Duration, seen: &mut Seen) -> extlb_driver::Result<()> {
    let device = Device::open(Kernel::new())?;
    let mut context = device.context(Options::default())?;
    for round in 0..rounds {
        let byte = round as u8 | 1;
        let memory: SliceMut<Kernel> = context.allocate(BYTES)?;
        let pattern = u64::from_ne_bytes([byte; 8]);
        let pending = context.queue().fill(memory, pattern)?;
        if !pending.wait_for(patience)? {
            seen.pending += 1;
            drop((pending, context));
            context = device.context(Options::default())?;
            continue;
        }
        let ((), memory) = pending.finish()?;
        seen.completed += 1;
        seen.differs += u32::from(memory.iter().any(|found| *found != byte));
        // A shootdown: the pages are taken from the device before they are anybody else's.
        drop(memory.unregister()?);
    }
    Ok(())
}
