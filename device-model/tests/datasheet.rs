//! What the datasheet shows as having happened does happen.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use extlb_device::pci::ConfigSpace;
use extlb_device::ports::{Dma, Interrupts, Ports};
use extlb_device::{Config, Device, GuestRam, Step};
use extlb_spec::example::{self, Step as Example};
use extlb_spec::regs::{self, Register};
use extlb_spec::{BAR_DOORBELLS, BAR_REGS, DOORBELL_STRIDE, Gpa, Vector};

/// The vectors that were raised.
#[derive(Default)]
struct Raised(Mutex<Vec<Vector>>);

impl Interrupts for Raised {
    fn raise(&self, vector: Vector) {
        self.0.lock().unwrap().push(vector);
    }
}

struct Machine {
    ram: GuestRam,
    raised: Arc<Raised>,
    space: ConfigSpace,
    device: Device,
}

impl Machine {
    fn new() -> Self {
        let ram = GuestRam::anonymous(&[(Gpa(0), example::RAM as usize)]).unwrap();
        let raised = Arc::new(Raised::default());
        let ports = Ports::stepped(Arc::new(ram.clone()), raised.clone());
        // It sleeps as soon as it is at rest.
        let config = Config {
            poll_us: 0,
            ..Default::default()
        };
        Self {
            ram,
            raised,
            space: ConfigSpace::new(),
            device: Device::new(config, ports).unwrap(),
        }
    }

    fn read(&self, register: &Register) -> u64 {
        let mut bytes = [0; 8];
        let data = &mut bytes[..register.width.into()];
        self.device.mmio_read(BAR_REGS, register.offset, data);
        u64::from_le_bytes(bytes)
    }

    fn write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.device.mmio_write(bar, offset, data);
        for _ in 0..1000 {
            let steps = (self.device.engine_step(), self.device.invalidation_step());
            if steps == (Step::Idle, Step::Idle) {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn play(&mut self, step: Example) {
        match step {
            Example::Title(_) | Example::Say(_) => {}
            Example::Config(_, offset, value) => {
                let effect = self.space.write(offset.into(), &value.to_le_bytes());
                assert!(!effect.reset);
                if let Some(on) = effect.bus_master {
                    self.device.set_bus_master(on);
                }
            }
            Example::Write(register, value) => {
                let bytes = &value.to_le_bytes()[..register.width.into()];
                self.write(BAR_REGS, register.offset, bytes);
            }
            Example::Read(register, value) => {
                assert_eq!(self.read(&register), value, "{}", register.name);
            }
            Example::Doorbell(context) => {
                let offset = u64::from(context) * DOORBELL_STRIDE;
                self.write(BAR_DOORBELLS, offset, &1u32.to_le_bytes());
            }
            Example::Put(_, at, item) => self.ram.write(at, item.bytes()).unwrap(),
            Example::Find(what, at, item) => {
                let mut found = vec![0; item.bytes().len()];
                self.ram.read(at, &mut found).unwrap();
                assert_eq!(found, item.bytes(), "{what} at {at:?}");
            }
            Example::Interrupt(vector) => {
                let raised = std::mem::take(&mut *self.raised.0.lock().unwrap());
                assert_eq!(raised, [vector]);
            }
        }
    }
}

#[test]
fn the_worked_example_works() {
    let mut machine = Machine::new();
    let mut steps = 0;
    example::play(&mut |step| {
        machine.play(step);
        steps += 1;
    });
    assert!(steps > 50, "{steps} steps");
    let raised = machine.raised.0.lock().unwrap();
    assert!(raised.is_empty(), "not told of: {raised:?}");
}

#[test]
fn registers_are_after_reset_what_their_table_says() {
    let machine = Machine::new();
    for register in regs::ALL {
        assert_eq!(machine.read(register), register.reset, "{}", register.name);
    }
    // Other values, where software can write any, and back.
    let mut written = HashSet::new();
    for register in regs::ALL.iter().filter(|r| r.name != "CTRL") {
        let ones = &[0xff; 8][..register.width.into()];
        machine.write(BAR_REGS, register.offset, ones);
        let expected = register.reset & !register.writable | register.writable;
        assert_eq!(machine.read(register), expected, "{}", register.name);
        written.extend((register.writable != 0).then_some(register.name));
    }
    assert!(written.contains("SHADOW") && written.contains("ORACLE_SELECT"));
    machine.write(
        BAR_REGS,
        regs::CTRL.offset,
        &regs::ctrl::RESET.to_le_bytes(),
    );
    for register in regs::ALL {
        assert_eq!(machine.read(register), register.reset, "{}", register.name);
    }
}
