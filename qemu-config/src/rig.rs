//! Everything that is needed to boot guests, found or made once; and booting them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use extlb_guest_protocol::{MODULES_FILE, Setup};

use crate::cargo::{self, GuestPrograms};
use crate::child;
use crate::initramfs::Archive;
use crate::kernel::stock::{Module, Stock};
use crate::kernel::{self, Flavour};
use crate::outcome::{End, Outcome};
use crate::paths::Cache;
use crate::qemu::Qemu;
use crate::qemu::accel::{self, Accelerator, Wish};
use crate::qemu::command::{Disk, Iommu, Machine};
use crate::toolbox::{self, Toolbox};
use crate::vm::{DeviceServer, Sinks, Start, Stop, Vm};

/// Choices that hold for all commands.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Use this QEMU (10.1.1 or newer, with vfio-user-pci)
    #[arg(long, global = true, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Boot this kernel: a bzImage with extlb.ko beside it, or a built kernel tree; or `stock`:
    /// Debian's own, unpatched, for drivers in user space and for ways to follow a process that need
    /// no patch (--bind extlb)
    #[arg(long, global = true, value_name = "PATH|stock", value_parser = GivenKernel::parse)]
    pub kernel: Option<GivenKernel>,
    /// Which kernel to build and boot
    #[arg(long, global = true, value_enum, default_value_t)]
    pub flavour: Flavour,
    /// What runs the guest
    #[arg(long, global = true, value_enum, default_value_t)]
    pub accel: Wish,
    /// The guest's IOMMU [default: intel with the stock kernel and vfio-pci, else none]
    #[arg(long, global = true, value_enum)]
    pub iommu: Option<Iommu>,
    /// Which driver gets the device [default: vfio-pci with the stock kernel, else extlb]
    #[arg(long, global = true, value_enum)]
    pub bind: Option<Bind>,
    /// How the device follows a process, with its own driver: by pte notifiers (the patched kernel
    /// only), by an mmu notifier, by mmu interval notifiers, or by pinning memory [default: pte,
    /// with the stock kernel mmu]
    #[arg(long, global = true, value_enum)]
    pub follow: Option<Follow>,
    /// Leave QEMU's monitor (QMP) at this socket. The device is `extlb` in the port `port1` (QEMU
    /// up to 11.1 aborts when a vfio-user device with MSI-X is unplugged)
    #[arg(long, global = true, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// One more argument for QEMU; may be repeated
    #[arg(long, global = true, value_name = "ARG", allow_hyphen_values = true)]
    pub qemu_arg: Vec<String>,
    /// How often the guest may restart: its command is then run again, with EXTLB_BOOT=1, 2, …
    #[arg(long, global = true, value_name = "TIMES", default_value_t = 0)]
    pub reboots: u32,
    /// Machine shape: a name in qemu-config/profiles, or a file
    #[arg(long, global = true, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// Boot without the device and its driver (to tell the guest's problems from the device's)
    #[arg(long, global = true)]
    pub no_device: bool,
    /// Show the guest's console
    #[arg(long, short, global = true)]
    pub verbose: bool,
}

/// A kernel that is not the one the rig builds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GivenKernel {
    /// Debian's own.
    Stock,
    /// The user's.
    At(PathBuf),
}

impl GivenKernel {
    fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "stock" => Self::Stock,
            path => Self::At(path.into()),
        })
    }
}

/// Which driver of the guest gets the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bind {
    /// The one that hands it to programs.
    VfioPci,
    /// Its own.
    Extlb,
    /// None: with the patched kernel its own takes it.
    None,
}

/// How the device's own driver follows a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Follow {
    /// Pte notifiers.
    Pte,
    /// An mmu notifier.
    Mmu,
    /// Mmu interval notifiers.
    Interval,
    /// Pinned memory: it does not follow.
    Pinned,
}

impl Follow {
    /// As the driver's parameter has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pte => "pte",
            Self::Mmu => "mmu",
            Self::Interval => "interval",
            Self::Pinned => "pinned",
        }
    }
}

impl Options {
    fn is_stock(&self) -> bool {
        self.kernel == Some(GivenKernel::Stock)
    }

    /// The guest's IOMMU. The device's own driver works without one.
    pub fn iommu(&self) -> Iommu {
        let usual = if self.is_stock() && self.bind() == Bind::VfioPci {
            Iommu::Intel
        } else {
            Iommu::None
        };
        self.iommu.unwrap_or(usual)
    }

    /// Whether the driver is there that `--follow` is for, and can.
    fn check_follow(&self) -> Result<()> {
        match self.follow {
            None => Ok(()),
            Some(_) if self.no_device || self.bind() == Bind::VfioPci => {
                bail!("--follow is for the device's own driver, see --bind extlb")
            }
            Some(Follow::Pte) if self.is_stock() => {
                bail!("--follow pte needs the patched kernel; mmu, interval and pinned do not")
            }
            Some(_) => Ok(()),
        }
    }

    /// The driver that gets the device.
    pub fn bind(&self) -> Bind {
        let usual = if self.is_stock() && !self.no_device {
            Bind::VfioPci
        } else {
            Bind::None
        };
        self.bind.unwrap_or(usual)
    }
}

/// All that is needed to boot.
pub struct Rig {
    /// Where things are kept.
    pub cache: Cache,
    /// The rig's own binary.
    pub binary: PathBuf,
    /// QEMU.
    pub qemu: Qemu,
    /// Tools for the guest and for its disks.
    pub tools: Toolbox,
    /// The kernel's image.
    kernel: PathBuf,
    /// The driver, unless there is no device, or the kernel is Debian's own.
    driver: Option<PathBuf>,
    /// Debian's own kernel, if that is the one.
    stock: Option<Stock>,
    programs: GuestPrograms,
    applets: Vec<String>,
    options: Options,
}

/// A guest to boot.
pub struct Guest {
    /// Memory in MiB.
    pub memory: u64,
    /// Number of virtual processors.
    pub smp: u32,
    /// Words for the kernel's command line.
    pub append: String,
    /// The device's configuration.
    pub device: extlb_device::Config,
    /// Disks.
    pub disks: Vec<Disk>,
    /// What the agent sets up.
    pub setup: Setup,
    /// The root file system, as [`Rig::archive`] made it or with more in it.
    pub archive: Archive,
}

/// Where a guest's start has led.
pub enum Booted {
    /// It is up.
    Up(Box<Vm>, Accelerator),
    /// It died of itself; this is the outcome.
    Dead(Outcome),
}

/// A guest of this flavour has to come up within this time.
fn limit_with(accelerator: Accelerator, flavour: Flavour) -> Duration {
    let usual = Duration::from_secs(match accelerator {
        Accelerator::Kvm => 30,
        Accelerator::Tcg => 180,
    });
    usual * flavour.slowness()
}

impl Rig {
    /// Finds, fetches or builds everything.
    ///
    /// # Errors
    /// When something is missing and cannot be made; the text says what to do.
    pub fn prepare(options: &Options) -> Result<Self> {
        options.check_follow()?;
        let cache = Cache::open()?;
        let binary = cargo::rig_binary(&cache)?;
        let mut toolboxes = vec![&toolbox::TOOLS];
        if options.qemu.is_none() && Qemu::of_machine().is_err() {
            toolboxes.push(&toolbox::QEMU);
        }
        if options.is_stock() {
            toolboxes.push(&toolbox::STOCK);
        }
        // Compilers wait for processors, downloads for the network: both at once.
        let (programs, fetched) = std::thread::scope(|scope| {
            let fetching = scope.spawn(|| toolbox::fetch_missing(&cache, &toolboxes));
            let programs = cargo::guest_programs(&cache);
            (programs, fetching.join())
        });
        let programs = programs?;
        fetched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let qemu = Qemu::get(&cache, options.qemu.as_deref())?;
        let tools = Toolbox::get(&cache, &toolbox::TOOLS)?;
        let mut stock = None;
        let (kernel, driver) = match &options.kernel {
            Some(GivenKernel::Stock) => {
                let stock = stock.insert(kernel::stock::get(&cache)?);
                let driver = match options.bind() {
                    Bind::Extlb if !options.no_device => {
                        Some(kernel::driver_for_stock(&cache, &binary, stock)?)
                    }
                    _ => None,
                };
                (stock.image.clone(), driver)
            }
            Some(GivenKernel::At(path)) => {
                kernel::given(&cache, &binary, path, !options.no_device)?
            }
            None => kernel::get(&cache, &binary, options.flavour, !options.no_device)?,
        };
        let busybox = busybox(&tools);
        let applets = child::output(Command::new(busybox).arg("--list-full"))
            .context("cannot run the guest's busybox")?
            .lines()
            .filter(|applet| !applet.ends_with("/busybox"))
            .map(str::to_owned)
            .collect();
        let options = options.clone();
        Ok(Self {
            cache,
            binary,
            qemu,
            tools,
            kernel,
            driver,
            stock,
            programs,
            applets,
            options,
        })
    }

    /// The guest's root file system as every guest has it.
    pub fn archive(&self) -> Result<Archive> {
        let mut archive = Archive::new();
        archive.file(Path::new("/init"), &self.programs.agent)?;
        archive.file(Path::new("/bin/busybox"), &busybox(&self.tools))?;
        for applet in &self.applets {
            archive.link(&Path::new("/").join(applet), Path::new("/bin/busybox"))?;
        }
        archive.file(Path::new("/bin/extlb-tour"), &self.programs.tour)?;
        if let Some(driver) = &self.driver {
            archive.file(Path::new("/extlb.ko"), driver)?;
        }
        if let Some(stock) = &self.stock {
            self.add_modules(stock, &mut archive)?;
        }
        Ok(archive)
    }

    /// Boots a guest. With the accelerator left to the rig, a guest that does not come up with KVM
    /// is tried again without, and that is remembered. `make_sinks` is asked once for each try.
    ///
    /// # Errors
    /// When QEMU or the device cannot be started, or die before the guest is up.
    pub fn boot(
        &self,
        mut guest: Guest,
        deadline: Option<Instant>,
        make_sinks: &dyn Fn() -> Sinks,
    ) -> Result<Booted> {
        let accelerator = self.accelerator()?;
        let limit = Instant::now() + limit_with(accelerator, self.options.flavour);
        let error = match self.try_boot(&mut guest, accelerator, limit, deadline, make_sinks()) {
            Ok(booted) => return Ok(booted),
            Err(error) => error,
        };
        if accelerator == Accelerator::Tcg || self.options.accel != Wish::Auto {
            return Err(error);
        }
        let limit = Instant::now() + limit_with(Accelerator::Tcg, self.options.flavour);
        let booted = self.try_boot(&mut guest, Accelerator::Tcg, limit, deadline, make_sinks())?;
        // The same guest comes up without KVM: KVM was at fault, not something that both need.
        let why = format!("KVM runs a small guest and not a kernel ({error:#})");
        eprintln!("extlb: {why}; emulating from now on");
        accel::remember(&self.cache, &self.qemu, Some(&why))?;
        Ok(booted)
    }

    fn accelerator(&self) -> Result<Accelerator> {
        let wish = self.options.accel;
        if wish == Wish::Tcg {
            return Ok(Accelerator::Tcg);
        }
        match accel::kvm_works(&self.cache, &self.qemu)? {
            Ok(()) => Ok(Accelerator::Kvm),
            Err(_) if wish == Wish::Auto => Ok(Accelerator::Tcg),
            Err(why) => bail!("KVM does not work here: {why}; try --accel tcg"),
        }
    }

    fn try_boot(
        &self,
        guest: &mut Guest,
        accelerator: Accelerator,
        limit: Instant,
        deadline: Option<Instant>,
        sinks: Sinks,
    ) -> Result<Booted> {
        let machine = Machine {
            accelerator,
            memory: guest.memory,
            smp: guest.smp,
            kernel: self.kernel.clone(),
            initramfs: PathBuf::new(),
            command_line: self.command_line(accelerator, &guest.append),
            disks: guest.disks.clone(),
            iommu: self.options.iommu(),
            may_restart: self.options.reboots > 0,
            monitor: self
                .options
                .qmp
                .as_deref()
                .map(std::path::absolute)
                .transpose()?,
            device: None,
            more: self.options.qemu_arg.clone(),
        };
        let device = (!self.options.no_device).then(|| DeviceServer {
            rig: self.binary.clone(),
            config: guest.device.clone(),
            hot_plug: self.options.qmp.is_some(),
        });
        let mut setup = guest.setup.clone();
        setup.bind = match self.options.bind() {
            Bind::VfioPci => Some("vfio-pci".to_owned()),
            Bind::Extlb | Bind::None => None,
        };
        setup.expect_device = device.is_some() && self.driver.is_some() && setup.bind.is_none();
        let mut vm = Vm::start(Start {
            cache: &self.cache,
            qemu: &self.qemu,
            machine,
            device,
            initramfs: &mut |path| guest.archive.write(path).map(drop),
            sinks,
            reboots: self.options.reboots,
            show_console: self.options.verbose,
            slowness: self.options.flavour.slowness(),
        })?;
        let first = deadline.map_or(limit, |deadline| deadline.min(limit));
        let stop = match vm.wait_until_up(setup, first) {
            Ok(Ok(())) => return Ok(Booted::Up(Box::new(vm), accelerator)),
            Ok(Err(error)) => {
                let end = End::Died(format!("the guest could not be set up: {error:#}"));
                return Ok(Booted::Dead(vm.finish(end)));
            }
            Err(stop) => stop,
        };
        let hello = !vm.kernel.is_empty();
        let why = match stop {
            Stop::Died(why) => why,
            Stop::OutputClosed => "nobody reads the output".to_owned(),
            Stop::TimedOut if first < limit => {
                return Ok(Booted::Dead(vm.finish(End::TimedOut)));
            }
            Stop::TimedOut => "the guest did not come up in time".to_owned(),
        };
        let outcome = vm.finish(End::Died(why.clone()));
        if hello || !outcome.kernel_reports.is_empty() {
            return Ok(Booted::Dead(outcome));
        }
        bail!("{why}\n{}", outcome.last_words.join("\n"));
    }

    /// Puts the stock kernel's modules into the guest, and the list of those to load.
    fn add_modules(&self, stock: &Stock, archive: &mut Archive) -> Result<()> {
        let folder = Path::new("/lib/modules").join(&stock.release);
        let path = |module: &Module| folder.join(format!("{}.ko", module.name));
        for module in &stock.modules {
            archive.file(&path(module), &module.path)?;
        }
        archive.text(&folder.join("modules.dep"), &stock.modules_dep(), 0o644)?;
        let mut names = vec!["virtio_blk"];
        if self.options.iommu() == Iommu::Virtio {
            names.push("virtio_iommu");
        }
        if self.options.bind() == Bind::VfioPci {
            names.extend(["vfio_iommu_type1", "iommufd", "vfio_pci"]);
        }
        let modules = stock.modules_for(&names).into_iter();
        let list: String = modules
            .map(|module| format!("{}\n", path(module).display()))
            .collect();
        archive.text(Path::new(MODULES_FILE), &list, 0o644)
    }

    fn command_line(&self, accelerator: Accelerator, append: &str) -> String {
        // Warnings and worse; everything if somebody looks on.
        let level = if self.options.verbose { 7 } else { 5 };
        let mut words = vec![
            "console=ttyS0".to_owned(),
            format!("loglevel={level}"),
            "panic=-1".to_owned(),
            "random.trust_cpu=on".to_owned(),
        ];
        if accelerator == Accelerator::Tcg {
            // Emulated processors wait for real ones: what looks stuck may just not be running.
            words.push("rcupdate.rcu_cpu_stall_timeout=120".to_owned());
            words.push("sysctl.kernel.watchdog_thresh=60".to_owned());
            // Nor is a timer broken whose first ticks are late; with an IOMMU the kernel would give up.
            words.push("no_timer_check".to_owned());
        }
        match self.options.iommu() {
            Iommu::None => {}
            Iommu::Intel => words.push("intel_iommu=on".to_owned()),
            // It does not remap interrupts, and a guest's device is no danger to anybody else.
            Iommu::Virtio => words.push("vfio_iommu_type1.allow_unsafe_interrupts=1".to_owned()),
        }
        if let Some(follow) = self.options.follow {
            words.push(format!("extlb.follow={}", follow.name()));
        }
        words.push(append.to_owned());
        words.join(" ")
    }
}

fn busybox(tools: &Toolbox) -> PathBuf {
    tools.root.join("usr/bin/busybox")
}
