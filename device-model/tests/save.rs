//! A device that is saved in the middle of its work, and another that goes on with it: all ends
//! as if nothing had happened.

mod common;
mod workload;

use std::io::Cursor;
use std::sync::{Arc, OnceLock};

use common::saved::{body, device_of, file_of, file_saying, whole_device_of};
use extlb_device::state::{Saved, StateError};
use extlb_device::{Config, Device};
use proptest::prelude::*;
use serde_json::{Value, json};
use workload::{Outcome, Workload};

/// A guest whose device can be replaced.
struct Run {
    workload: Workload,
    config: Config,
    device: Arc<Device>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let config = workload::config(seed);
        let mut made = None;
        let workload = Workload::new(seed, |ports| {
            let device = Arc::new(Device::new(config.clone(), ports).expect("made"));
            made = Some(device.clone());
            device
        });
        Self {
            workload,
            config,
            device: made.unwrap(),
        }
    }

    /// The file of the device's state.
    fn save(&self) -> Vec<u8> {
        file_of(&self.device, &self.config)
    }

    fn restored(&self, file: &[u8]) -> Result<Device, StateError> {
        device_of(file, &self.workload.ports)
    }

    /// Another device takes the place of this one, by way of a file, in which something is
    /// `changed`.
    fn replace(&mut self, changed: impl Fn(&mut Value)) -> Result<(), StateError> {
        let mut body = body(&self.save());
        changed(&mut body["device"]);
        self.device = Arc::new(self.restored(&file_saying(&body))?);
        self.workload.guest.device = self.device.clone();
        Ok(())
    }
}

/// A run of so many steps, with a new device before each of these.
fn run(seed: u64, steps: u32, cuts: &[u32]) -> Outcome {
    let mut run = Run::new(seed);
    for step in 0..steps {
        if cuts.contains(&step) {
            run.replace(|_| {}).expect("restored");
        }
        run.workload.step();
    }
    run.workload.finish()
}

/// The first difference, and not all of both.
fn assert_same(uninterrupted: &Outcome, restored: &Outcome) {
    for (a, b) in uninterrupted.diary.iter().zip(&restored.diary) {
        assert_eq!(a, b);
    }
    assert_eq!(uninterrupted.diary.len(), restored.diary.len());
    assert_eq!(uninterrupted.totals, restored.totals);
    assert_eq!(uninterrupted.registers, restored.registers);
    assert_eq!(uninterrupted.ram, restored.ram, "RAM");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..Default::default() })]

    #[test]
    fn a_restored_device_finishes_as_if_nothing_had_happened(
        seed: u64,
        cuts in prop::collection::vec(0..1000u32, 1..20),
    ) {
        assert_same(&run(seed, 1000, &[]), &run(seed, 1000, &cuts));
    }
}

/// Whatever there is: also what is added to the device one day.
#[test]
fn a_restored_device_has_all_that_was_saved() {
    for seed in 0..4 {
        let mut run = Run::new(seed);
        for step in 0..400 {
            run.workload.step();
            if step % 16 == 15 {
                whole_device_of(&run.save(), &run.workload.ports);
            }
        }
    }
}

/// Sets what `path` names in a value to `to`; `*` is each element. Null is left as it is.
fn set(value: &mut Value, path: &str, to: &Value) {
    let (name, rest) = path.split_once('/').unwrap_or((path, ""));
    let places: Vec<&mut Value> = match (value, name) {
        (Value::Array(items), "*") => items.iter_mut().collect(),
        (value, _) => value.pointer_mut(&format!("/{name}")).into_iter().collect(),
    };
    for place in places {
        match rest {
            "" if !place.is_null() => *place = to.clone(),
            "" => {}
            _ => set(place, rest, to),
        }
    }
}

/// Each of these is there for a reason: a device that goes on without it ends otherwise, or is
/// refused. (The rest was tried as well; what is rare is in `save_rare.rs`.)
#[test]
fn what_is_left_out_is_missed() {
    const STEPS: u32 = 400;
    let good = run(0, STEPS, &[]);
    for (path, to) in [
        ("contexts/*/work/operation/done", json!(0)),
        ("contexts/*/work/operation/crc", json!(0)),
        ("contexts/*/work/batch", json!(null)),
        ("contexts/*/work/ahead/count", json!(0)),
        ("contexts/*/work/misses", json!([])),
        ("contexts/*/waiting", json!([])),
        ("contexts/*/next_group", json!(0)),
        ("tlb/arrays/*/*", json!(0)),
        ("tlb/walk_cache/*", json!(0)),
        ("schedule", json!({"order": [], "state": vec!["Idle"; 256]})),
        ("requests/tail", json!(0)),
    ] {
        let differs = || {
            let mut run = Run::new(0);
            for step in 0..STEPS {
                if step % 20 == 19 && run.replace(|device| set(device, path, &to)).is_err() {
                    return true;
                }
                run.workload.step();
            }
            run.workload.finish() != good
        };
        assert!(differs(), "{path} is not missed");
    }
}

/// Every place in a value, itself and below.
fn places(value: &Value, path: String, all: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                places(value, format!("{path}/{name}"), all);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                places(value, format!("{path}/{index}"), all);
            }
        }
        _ => {}
    }
    all.push(path);
}

/// A device that is busy, as a file.
fn busy() -> &'static (Vec<u8>, Vec<String>) {
    static BUSY: OnceLock<(Vec<u8>, Vec<String>)> = OnceLock::new();
    BUSY.get_or_init(|| {
        let mut run = Run::new(3);
        for _ in 0..400 {
            run.workload.step();
        }
        let file = run.save();
        let mut all = Vec::new();
        places(&body(&file)["device"], "/device".into(), &mut all);
        // The contexts that are not used are all alike.
        let idle = |path: &String| {
            let context = path.strip_prefix("/device/contexts/");
            let context = context.and_then(|rest| rest.split('/').next()?.parse::<u32>().ok());
            context.is_some_and(|context| context > 5)
        };
        all.retain(|path| !idle(path));
        (file, all)
    })
}

fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::sample::select(vec![
            0,
            1,
            2,
            3,
            255,
            256,
            4095,
            4096,
            1 << 31,
            1 << 32,
            1 << 48
        ])
        .prop_map(|n: u64| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        Just(json!(u64::MAX)),
        Just(json!(i64::MIN)),
        Just(json!(-1)),
        Just(json!(null)),
        Just(json!(true)),
        Just(json!([])),
        Just(json!({})),
        Just(json!("Copy")),
        Just(json!("f".repeat(128))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    #[test]
    fn a_value_that_was_tampered_with_is_refused_or_harmless(
        changes in prop::collection::vec((any::<prop::sample::Index>(), hostile()), 1..4),
        removed: Option<prop::sample::Index>,
    ) {
        let (good, all) = busy();
        let mut body = body(good);
        for (place, value) in changes {
            if let Some(place) = body.pointer_mut(place.get(&all[..]).as_str()) {
                *place = value;
            }
        }
        if let Some(place) = removed
            && let Some((parent, name)) = place.get(&all[..]).rsplit_once('/')
            && let Some(fields) = body.pointer_mut(parent).and_then(|p| p.as_object_mut())
        {
            fields.remove(name);
        }
        let mut run = Run::new(3);
        if let Ok(device) = run.restored(&file_saying(&body)) {
            // Memory is another guest's: nothing in it fits, and yet nothing breaks.
            run.workload.guest.device = Arc::new(device);
            for _ in 0..100 {
                run.workload.step();
            }
        }
    }

    #[test]
    fn damage_is_a_named_error(at: prop::sample::Index, bit in 0..8u32, cut: bool) {
        let (good, _) = busy();
        let mut file = good.clone();
        let at = at.index(file.len());
        match cut {
            true => file.truncate(at),
            false => file[at] ^= 1 << bit,
        }
        prop_assert!(Saved::read(Cursor::new(file)).is_err());
    }
}

#[test]
fn errors_say_what_is_wrong() {
    let (good, _) = busy();
    let run = Run::new(3);
    let said = |file: Vec<u8>| run.restored(&file).expect_err("refused").to_string();
    assert_eq!(
        said(b"something else".to_vec()),
        "this is no saved state of a device"
    );
    let newer = b"extlb-state 2 0 00000000\n".to_vec();
    assert!(said(newer).contains("format 2"));
    for (place, value, words) in [
        (
            "/device/contexts/1/work/tail",
            json!(77_777),
            "the tail of a work queue",
        ),
        ("/device/contexts", json!([]), "the number of contexts"),
        ("/device/gate", json!(64), "the gate"),
        (
            "/device/counters/drains",
            json!(u64::MAX),
            "the counter drains",
        ),
        (
            "/device/requests/waiters",
            json!([300]),
            "a context that waits",
        ),
        ("/device/schedule/order", json!([1, 1]), "a context queued"),
        ("/config/tlb/sets", json!(8), "the TLB"),
    ] {
        let mut body = body(good);
        *body.pointer_mut(place).expect(place) = value;
        let said = said(file_saying(&body));
        assert!(said.contains(words), "{place}: {said}");
    }
}
