//! The state of a device, in a file and back.

use std::io::Cursor;

use extlb_device::ports::Ports;
use extlb_device::state::{Saved, StateError};
use extlb_device::{Config, Device};
use extlb_spec::regs;
use serde_json::Value;

/// The file of a device's state.
pub fn file_of(device: &Device, config: &Config) -> Vec<u8> {
    let saved = Saved {
        interface: regs::VERSION_VALUE,
        config: config.clone(),
        device: device.save().expect("saved"),
        slot: None,
    };
    let mut file = Vec::new();
    saved.write(&mut file).expect("written");
    file
}

/// What a file says.
pub fn body(file: &[u8]) -> Value {
    let start = file.iter().position(|byte| *byte == b'\n').expect("a line") + 1;
    serde_json::from_slice(&file[start..]).expect("JSON")
}

/// A file with a good first line, whatever is in it.
pub fn file_saying(body: &Value) -> Vec<u8> {
    let body = serde_json::to_vec(body).expect("written");
    let crc = crc32c::crc32c(&body);
    let mut file = format!("extlb-state 1 {} {crc:08x}\n", body.len()).into_bytes();
    file.extend(body);
    file
}

/// A device out of a file.
pub fn device_of(file: &[u8], ports: &Ports) -> Result<Device, StateError> {
    let saved = Saved::read(Cursor::new(file))?;
    Device::restore(saved.config, ports.clone(), &saved.device)
}

/// The same, which must have all that is in the file: what it saves at once, by the same clock, is
/// that file again. Whatever a restored device forgets shows, unless it had nothing of it.
pub fn whole_device_of(file: &[u8], ports: &Ports) -> Device {
    let saved = Saved::read(Cursor::new(file)).expect("read");
    let device = Device::restore(saved.config.clone(), ports.clone(), &saved.device);
    let device = device.expect("restored");
    let again = file_of(&device, &saved.config);
    if again != file {
        let mut differ = Vec::new();
        differences(&body(file), &body(&again), "", &mut differ);
        panic!("forgotten or made up:\n{}", differ.join("\n"));
    }
    device
}

/// Where two values differ, and how.
fn differences(a: &Value, b: &Value, at: &str, to: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) if x.keys().eq(y.keys()) => {
            for ((name, a), b) in x.iter().zip(y.values()) {
                differences(a, b, &format!("{at}/{name}"), to);
            }
        }
        (Value::Array(x), Value::Array(y)) if x.len() == y.len() => {
            for (index, (a, b)) in x.iter().zip(y).enumerate() {
                differences(a, b, &format!("{at}/{index}"), to);
            }
        }
        _ if a == b => {}
        _ => to.push(format!("{at}: {a} became {b}")),
    }
}
