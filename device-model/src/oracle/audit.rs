//! The audit: every translation of a context against the process's page table, at once.

use std::sync::atomic::Ordering;

use extlb_spec::invalidation::AuditResult;
use extlb_spec::pte::{Pte, leaf_size};
use extlb_spec::regs::{FatalError, StaleKind};
use extlb_spec::{Gpa, Iova, PAGE_SIZE};

use super::{StaleAccess, cpu_walk};
use crate::Device;
use crate::tlb::Entry;
use crate::walk::leaves;

/// Tables that an audit looks at: 128 GiB of pages. More than that is no page table of a guest
/// that runs here, but one that points at itself.
const MAX_TABLES: u64 = 1 << 16;
/// Translations that an audit compares at most, for the same reason: the queue waits meanwhile.
const MAX_CHECKS: u64 = 1 << 22;

impl Device {
    /// Compares, and writes the result at `addr`; `last`: differences are stale accesses.
    pub(crate) fn audit(
        &self,
        context: u32,
        last: bool,
        addr: Gpa,
    ) -> Result<(), (FatalError, u64)> {
        let mut result = AuditResult {
            done: 1,
            ..Default::default()
        };
        let space = self.contexts[context as usize].space();
        if let Some((space, root)) = space.and_then(|s| Some((s, s.cpu_page_table?))) {
            let memory = &*self.ports.memory;
            let mut compare = |iova: Iova, frame: Gpa, write: bool, fill: u64| {
                if result.checked >= MAX_CHECKS {
                    return false;
                }
                result.checked += 1;
                let cpu = cpu_walk::walk(memory, root, iova);
                if cpu_walk::agrees(cpu, frame, write) {
                    return true;
                }
                let cpu_gpa = cpu_walk::visible(cpu, write);
                if result.mismatches == 0 {
                    result.iova = iova.0;
                    result.device_gpa = frame.0;
                    result.cpu_gpa = cpu_gpa.map_or(u64::MAX, |gpa| gpa.0);
                }
                result.mismatches += 1;
                if last {
                    self.stale(StaleAccess {
                        kind: StaleKind::Audit,
                        context,
                        iova,
                        device_gpa: frame,
                        cpu_gpa,
                        write,
                        fill,
                        invalidation: self.counters.invalidations.get(),
                    });
                }
                true
            };
            // Piece by piece: the process may map by smaller pages what a leaf maps at once.
            let mut compare_all = |iova: Iova, frame: Gpa, size: u64, write: bool, fill: u64| {
                if !cpu_walk::may_be_the_processs(iova) {
                    return true;
                }
                let mut pieces = (0..size).step_by(PAGE_SIZE as usize);
                pieces.all(|at| compare(Iova(iova.0 + at), Gpa(frame.0 + at), write, fill))
            };
            for Entry {
                base, leaf, fill, ..
            } in self.tlb.entries(context)
            {
                compare_all(base, leaf.frame, leaf.size(), leaf.writable, fill);
            }
            let mut leaf = |iova: Iova, entry: Pte, level: u32| {
                let size = leaf_size(level);
                compare_all(iova, entry.addr(), size, entry.is_writable(), 0)
            };
            leaves(memory, space.page_table, MAX_TABLES, &mut leaf);
        }
        let bytes = result.to_bytes();
        let done = std::mem::offset_of!(AuditResult, done);
        let memory = &*self.ports.memory;
        memory
            .write(addr, &bytes[..done])
            .and_then(|()| {
                memory.store_u64(Gpa(addr.0 + done as u64), result.done, Ordering::Release)
            })
            .map_err(|e| (FatalError::WaitWrite, e.addr.0))
    }
}
