//! What must be so after every action, and when nothing is left to do.

use std::mem::offset_of;

use extlb_spec::context::ContextShadow;
use extlb_spec::page_request::Response;
use extlb_spec::regs;

use super::super::Counts;
use super::{CONTEXTS, World};

impl World {
    /// After every action.
    pub fn check(&self) -> Result<(), String> {
        let broken = std::mem::take(&mut self.model().broken);
        if !broken.is_empty() {
            return Err(broken.join("\n"));
        }
        let fatal = self.guest.fatal();
        if fatal != 0 {
            return Err(format!("fatal error {fatal}"));
        }
        for (process, context) in self.processes.iter().zip(&self.model().contexts) {
            let head = process.word(offset_of!(ContextShadow, head));
            if context.runs && !context.failed && head != context.retired {
                let why = format!("head is {head}, and {} ended", context.retired);
                return Err(format!("context {}: {why}", process.context));
            }
        }
        let (now, base) = (self.model().counts, *self.base.lock().unwrap());
        let found = Counts {
            completed: self.guest.get(regs::OPS_COMPLETED) + base.completed,
            faulted: self.guest.get(regs::OPS_FAULTED) + base.faulted,
            page_requests: self.guest.get(regs::PAGE_REQUESTS) + base.page_requests,
            strays: self.guest.get(regs::STRAY_RESPONSES) + base.strays,
            invalidations: self.guest.get(regs::INVALIDATIONS) + base.invalidations,
            drains: self.guest.get(regs::DRAINS) + base.drains,
        };
        if found != now {
            return Err(format!("the counters say {found:?}, and it is {now:?}"));
        }
        Ok(())
    }

    /// Everybody does his duty until nothing is left to do: then nothing may be.
    pub fn settle(&self) -> Result<(), String> {
        // Only if it is off: a device that is told again looks at everything again.
        if !self.model().powered {
            self.set_bus_master(true);
        }
        for ring in [false, true] {
            for _ in 0..200 {
                self.guest.run();
                self.model().rest();
                self.check()?;
                let mut any = false;
                while self.take().is_some() {
                    any = true;
                }
                let open = self.model().open_groups();
                for (c, group, page, write) in open {
                    any = true;
                    self.map_for(c, page, write);
                    self.respond(c, group, Response::Success);
                }
                if !any {
                    break;
                }
            }
            let mut left = Vec::new();
            for (c, context) in (0..).zip(&self.model().contexts) {
                if !context.is_settled() && (ring || !context.unrung) {
                    left.push(format!(
                        "context {c}: {} operations are left",
                        context.operations.len()
                    ));
                }
            }
            if !left.is_empty() {
                return Err(left.join("\n"));
            }
            for c in (0..CONTEXTS).filter(|_| !ring) {
                if self.model().contexts[c as usize].unrung {
                    self.ring(c);
                }
            }
        }
        if !self.model().queue.is_empty() {
            return Err("commands are left".into());
        }
        Ok(())
    }
}
