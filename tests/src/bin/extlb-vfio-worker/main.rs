//! A guest program that drives the device from user space, through VFIO, while something happens
//! to it: memory is taken back under it, the device is pulled out, the machine restarts.
#![allow(missing_docs)]

mod take_back_unsafe;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Parser, Subcommand};
use extlb_driver::hardware::VfioGroup;
use extlb_driver::userspace::{Config, Userspace};
use extlb_driver::{Context, Device, Error, Options};

/// The driver under test.
type Driver = Userspace<VfioGroup>;

#[derive(Parser)]
#[command(about)]
struct Cli {
    /// Address of the device.
    #[arg(long)]
    device: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Copies, checks what came out, and takes the memory back; for ever, or until it fails.
    Work {
        /// Ends after as many rounds.
        #[arg(long)]
        rounds: Option<u64>,
        /// It has to fail: the device stops answering. That is to be said, and nothing to hang.
        #[arg(long)]
        doomed: bool,
    },
    /// Takes memory back while a slow device works on it, and counts what came late.
    TakeBack {
        /// How often.
        #[arg(long, default_value_t = 16)]
        rounds: u64,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let hardware = VfioGroup::open(&cli.device)?;
    let driver = Userspace::new(hardware, Config::default())?;
    let device = Device::open(driver)?;
    match cli.command {
        Command::Work { rounds, doomed } => {
            let context = device.context(Options::default())?;
            match (work(&context, rounds), doomed) {
                (Ok(()), false) => println!("worked"),
                (Ok(()), true) => bail!("it went on working"),
                (Err(error), false) => return Err(error.into()),
                (Err(error), true) => after_the_end(&device, &context, &error)?,
            }
        }
        Command::TakeBack { rounds } => {
            let seen = take_back_unsafe::run(&device, rounds)?;
            println!("{seen}");
        }
    }
    Ok(())
}

const LEN: usize = 96 << 10;

fn work(context: &Context<Driver>, rounds: Option<u64>) -> Result<(), Error> {
    let queue = context.queue();
    for round in 0.. {
        if rounds.is_some_and(|rounds| round >= rounds) {
            break;
        }
        let (mut src, dst) = (context.allocate(LEN)?, context.allocate(LEN)?);
        for (word, at) in src.chunks_exact_mut(8).zip(round..) {
            word.copy_from_slice(&u64::to_le_bytes(at));
        }
        let ((), (src, dst)) = queue.copy(src, dst)?.finish()?;
        assert!(src[..] == dst[..], "round {round}: a copy that is none");
        if round % 20 == 10 {
            // Whoever waits for this knows that the device is at work.
            println!("working");
        }
    }
    Ok(())
}

/// What is asked for after the device has gone fails, soon. Only a restart may help: if it is back.
fn after_the_end(device: &Device<Driver>, context: &Context<Driver>, first: &Error) -> Result<()> {
    println!("failed as it should: {first}");
    let begun = Instant::now();
    for result in [
        context.queue().nop().and_then(|nop| nop.finish()).map(drop),
        context.allocate(LEN).map(drop),
        device.context(Options::default()).map(drop),
    ] {
        let Err(error) = result else {
            bail!("something works without the device");
        };
        println!("then: {error}");
    }
    match device.backing().restart() {
        Err(error) => println!("it does not restart: {error}"),
        Ok(()) => {
            work(&device.context(Options::default())?, Some(5))?;
            println!("it works again after a restart");
        }
    }
    let took = begun.elapsed();
    ensure!(took < Duration::from_secs(60), "that took {took:?}");
    Ok(())
}
