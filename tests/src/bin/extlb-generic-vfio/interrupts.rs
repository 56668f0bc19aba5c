//! MSI-X in odd orders.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vfio_ioctls::VfioDevice;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config;
use crate::region_unsafe::Region;

/// An interrupt takes less than a millisecond; this is for emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

const MSIX: u32 = VFIO_PCI_MSIX_IRQ_INDEX;

/// A write that makes the device raise an interrupt.
#[derive(Clone, Copy, Debug)]
pub struct Poke {
    bar: u32,
    offset: u64,
    value: u64,
    vector: usize,
}

impl Poke {
    /// Reads `BAR:OFFSET=VALUE:VECTOR`, decimal numbers.
    pub fn parse(text: &str) -> Result<Self> {
        let numbers: Vec<u64> = text
            .split([':', '='])
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [bar, offset, value, vector] = numbers[..] else {
            bail!("{text:?} is not BAR:OFFSET=VALUE:VECTOR");
        };
        Ok(Self {
            bar: u32::try_from(bar)?,
            offset,
            value,
            vector: usize::try_from(vector)?,
        })
    }
}

struct Vectors(Vec<EventFd>);

impl Vectors {
    fn new(count: u32) -> Result<Self> {
        let events = (0..count).map(|_| EventFd::new(EFD_NONBLOCK));
        Ok(Self(events.collect::<Result<_, _>>()?))
    }

    fn first(&self, count: usize) -> Vec<&EventFd> {
        self.0.iter().take(count).collect()
    }

    /// How often each was raised since the last call.
    fn take(&self) -> Vec<u64> {
        self.0
            .iter()
            .map(|event| event.read().unwrap_or(0))
            .collect()
    }
}

/// Sets vectors up, changes them, triggers them, in orders that no driver would choose.
pub fn exercise(device: &VfioDevice, poke: Option<Poke>) -> Result<()> {
    for index in [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX] {
        let count = device.get_irq_info(index).map_or(0, |irq| irq.count);
        ensure!(count == 0, "{count} interrupts of kind {index}");
    }
    let count = device.get_irq_info(MSIX).context("no MSI-X")?.count;
    println!("MSI-X: {count} vectors");
    ensure!(count >= 2, "this program needs two");
    let vectors = Vectors::new(count)?;
    let all = count as usize;
    let loopback = |order: &[u32]| -> Result<()> {
        let mut expected = vec![0; all];
        for &vector in order {
            device.trigger_irq(MSIX, vector)?;
            expected[vector as usize] += 1;
        }
        let got = vectors.take();
        ensure!(got == expected, "{order:?} triggered, {got:?} raised");
        Ok(())
    };
    let backwards: Vec<u32> = (0..count).rev().collect();

    ensure!(device.trigger_irq(MSIX, 0).is_err(), "triggered unprepared");
    // One vector, then all over it, then fewer, without taking any back in between.
    device.enable_irq(MSIX, vectors.first(1))?;
    loopback(&[0, 0, 0])?;
    device.enable_irq(MSIX, vectors.first(all))?;
    loopback(&backwards)?;
    device.reset();
    loopback(&backwards)?;
    device.enable_irq(MSIX, vectors.first(2))?;
    loopback(&[1, 0, 1])?;
    if let Some(poke) = poke {
        // Raised by the device itself, after a reset and again after another.
        for _ in 0..2 {
            config::switch_on(device)?;
            raise(device, &vectors, poke)?;
            device.reset();
        }
    }
    device.disable_irq(MSIX)?;
    ensure!(device.trigger_irq(MSIX, 0).is_err(), "triggered afterwards");
    device.enable_irq(MSIX, vectors.first(all))?;
    loopback(&[1, 0])?;
    if let Some(poke) = poke {
        // Nobody listens, then somebody does.
        device.disable_irq(MSIX)?;
        config::switch_on(device)?;
        write(device, poke)?;
        device.reset();
        device.enable_irq(MSIX, vectors.first(all))?;
        ensure!(vectors.take().iter().all(|count| *count == 0), "a ghost");
        config::switch_on(device)?;
        raise(device, &vectors, poke)?;
        println!("the device raised vector {}", poke.vector);
    }
    // Left enabled: closing the device takes it back.
    Ok(())
}

/// Makes the device raise an interrupt, and nothing else.
fn raise(device: &VfioDevice, vectors: &Vectors, poke: Poke) -> Result<()> {
    write(device, poke)?;
    let end = Instant::now() + PATIENCE;
    let raised = loop {
        let raised = vectors.take();
        if raised.iter().any(|count| *count > 0) {
            break raised;
        }
        ensure!(
            Instant::now() < end,
            "vector {} was not raised",
            poke.vector
        );
        std::thread::sleep(Duration::from_millis(1));
    };
    for (vector, count) in raised.into_iter().enumerate() {
        let expected = u64::from(vector == poke.vector);
        ensure!(
            count == expected,
            "vector {vector} was raised {count} times"
        );
    }
    Ok(())
}

fn write(device: &VfioDevice, poke: Poke) -> Result<()> {
    Region::new(device, poke.bar)?.write(poke.offset, 4, poke.value)
}
