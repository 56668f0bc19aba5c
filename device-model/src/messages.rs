//! Interrupt messages are writes to memory, and so need bus mastering (PCI Express Base
//! Specification, "Bus Master Enable"). Those that come up without it are held until it is on.

use std::sync::{Arc, Mutex};

use extlb_spec::{VECTORS, Vector};
use serde::{Deserialize, Serialize};

use crate::ports::Interrupts;
use crate::state::{StateError, check};
use crate::sync::lock;

/// The port of interrupts, behind the bus-master bit.
pub(crate) struct Messages {
    port: Arc<dyn Interrupts>,
    state: Mutex<State>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    allowed: bool,
    held: [Option<Vector>; VECTORS as usize],
}

impl Messages {
    pub(crate) fn new(port: Arc<dyn Interrupts>) -> Self {
        let state = Mutex::default();
        Self { port, state }
    }

    pub(crate) fn save(&self) -> State {
        lock(&self.state).clone()
    }

    /// As it was saved. Raises nothing: what was sent before was sent.
    pub(crate) fn restore(
        port: Arc<dyn Interrupts>,
        state: State,
        bus_master: bool,
    ) -> Result<Self, StateError> {
        let State { allowed, held } = &state;
        check("interrupts allowed", *allowed == bus_master, allowed)?;
        for (number, vector) in held.iter().enumerate() {
            let good = vector.is_none_or(|vector| vector as usize == number && !allowed);
            check("an interrupt held", good, vector)?;
        }
        let state = Mutex::new(state);
        Ok(Self { port, state })
    }

    /// When bus mastering was taken away and this returns, none is sent any more.
    pub(crate) fn allow(&self, on: bool) {
        let mut state = lock(&self.state);
        state.allowed = on;
        if on {
            let held = std::mem::take(&mut state.held);
            for vector in held.into_iter().flatten() {
                self.port.raise(vector);
            }
        }
    }

    /// Forgets what is held: the device was reset.
    pub(crate) fn reset(&self) {
        lock(&self.state).held = Default::default();
    }

    pub(crate) fn raise(&self, vector: Vector) {
        // Sent under the lock, so that `allow` waits for a message that is on its way.
        let mut state = lock(&self.state);
        match state.allowed {
            true => self.port.raise(vector),
            false => state.held[vector as usize] = Some(vector),
        }
    }
}
