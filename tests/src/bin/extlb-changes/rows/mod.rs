//! The rows. Each file has those of one kind.

pub mod aging;
mod copies;
pub mod files;
pub mod held;
mod huge;
mod migrate;
mod moves;
pub mod process;
mod protect;
pub mod reclaim;
mod refused;
mod unmap;
mod watch;

use anyhow::Result;

use crate::trial::{Seen, Trial, Way};

/// A place, or several with one way to them, where ptes change.
pub struct Row {
    /// What the table calls it.
    pub name: &'static str,
    /// How it is found if the driver does not hear of it.
    pub seen: Seen,
    /// Tries it.
    pub run: fn(&mut Trial) -> Result<()>,
}

impl Row {
    /// Interval notifiers do not tell of pages that only look older, and nothing has to be taken.
    pub fn seen_by(&self, way: Way) -> Seen {
        match self.seen {
            Seen::ByCount(reason) if way == Way::Interval && reason == ONLY_OLDER => {
                Seen::Never(reason)
            }
            seen => seen,
        }
    }
}

/// A row that an audit finds broken.
const fn row(name: &'static str, run: fn(&mut Trial) -> Result<()>) -> Row {
    Row {
        name,
        seen: Seen::ByAudit,
        run,
    }
}

/// A row of which only the count of pages tells.
const fn counted(
    name: &'static str,
    run: fn(&mut Trial) -> Result<()>,
    reason: &'static str,
) -> Row {
    Row {
        name,
        seen: Seen::ByCount(reason),
        run,
    }
}

/// A row that takes nothing away.
const fn harmless(
    name: &'static str,
    run: fn(&mut Trial) -> Result<()>,
    reason: &'static str,
) -> Row {
    Row {
        name,
        seen: Seen::Never(reason),
        run,
    }
}

/// A row that judges by itself, the same way whether or not the driver hears of changes.
const fn apart(name: &'static str, run: fn(&mut Trial) -> Result<()>, reason: &'static str) -> Row {
    Row {
        name,
        seen: Seen::ByRow(reason),
        run,
    }
}

const RELEASED: &str = "the context is stopped by release(), whatever becomes of clear()";
const NEVER_GIVEN: &str = "the device never gets such memory";
const ONLY_CLEAN: &str = "the page stays, only its dirty bit is cleared";
const YOUNG: &str = "the kernel's opinion of a page counts, with and without the device's";
const ONLY_OLDER: &str = "the page stays, only its accessed bit is cleared";

/// All rows, in the order of the table.
pub const ROWS: &[Row] = &[
    row("munmap", unmap::munmap),
    row("munmap-hole", unmap::hole),
    row("mmap-fixed", unmap::map_fixed),
    row("brk", unmap::brk),
    row("shmdt", unmap::shmdt),
    row("dontneed", unmap::dont_need),
    row("dontneed-huge", huge::dont_need),
    counted("free", unmap::free, ONLY_CLEAN),
    counted("free-huge", huge::free, ONLY_CLEAN),
    row("truncate", unmap::truncate),
    row("truncate-copies", unmap::truncate_copies),
    row("punch-hole", unmap::punch_hole),
    row("remove", unmap::remove),
    row("truncate-disk", files::truncate),
    row("direct-write", files::direct_write),
    row("mremap-ptes", moves::ptes),
    row("mremap-table", moves::table),
    row("mremap-table-of-tables", moves::table_of_tables),
    row("mremap-huge", moves::huge_page),
    row("mremap-dontunmap", moves::dont_unmap),
    row("mremap-shrink", moves::shrink),
    row("uffd-move", watch::move_pages),
    row("uffd-move-huge", watch::move_huge),
    row("mprotect-read", protect::read_only),
    row("mprotect-none", protect::none),
    row("mprotect-huge", huge::protect),
    row("mprotect-huge-part", huge::protect_part),
    row("uffd-wp", watch::write_protect),
    row("pagemap-scan", watch::pagemap_scan),
    row("soft-dirty", watch::soft_dirty),
    row("numa-hinting", watch::numa_hinting),
    row("writeback", files::written_back),
    row("fork", protect::fork),
    row("fork-huge", huge::fork),
    row("cow-fork", copies::after_fork),
    row("cow-zero", copies::zero_page),
    row("cow-file", copies::private_file),
    row("cow-forced", copies::forced),
    row("cow-huge", huge::copy),
    row("cow-huge-zero", huge::zero),
    row("uprobe", files::uprobe),
    row("ksm", copies::ksm),
    row("ksm-unmerge", copies::ksm_unmerge),
    row("pageout", reclaim::pageout),
    row("pageout-huge", reclaim::pageout_huge),
    row("pageout-shared", reclaim::pageout_shared),
    row("pageout-disk", files::pageout),
    row("pageout-by-other", reclaim::by_other_process),
    row("reclaim-batched", reclaim::by_cgroup),
    counted("cold", aging::cold, ONLY_OLDER),
    counted("cold-huge", aging::cold_huge, ONLY_OLDER),
    harmless("clear-refs", aging::clear_references, ONLY_OLDER),
    harmless("page-idle", aging::idle, ONLY_OLDER),
    harmless("lru-gen", aging::generations, ONLY_OLDER),
    harmless("damon", aging::damon, ONLY_OLDER),
    apart("page-idle-used", aging::used, YOUNG),
    apart("reclaim-used", aging::used_is_kept, YOUNG),
    apart("lru-gen-used", aging::used_is_kept_by_generations, YOUNG),
    row("migrate", migrate::node),
    row("migrate-huge", migrate::node_huge),
    row("compaction", migrate::compaction),
    row("soft-offline", migrate::soft_offline),
    row("hwpoison", migrate::hwpoison),
    row("hwpoison-huge", migrate::hwpoison_huge),
    row("collapse", huge::collapse),
    row("khugepaged", huge::khugepaged),
    row("collapse-shared", huge::collapse_shared),
    counted(
        "collapse-mapped",
        huge::collapse_mapped,
        "the same pages stay at the same addresses",
    ),
    row("collapse-disk", files::collapse),
    row("unmap-huge-part", huge::unmap_part),
    counted(
        "split",
        huge::split,
        "the same pages come back at the same addresses",
    ),
    apart(
        "reap",
        process::reap,
        "the pages of another process are counted, with and without",
    ),
    apart("exit", process::exit, RELEASED),
    apart("exec", process::exec, RELEASED),
    apart("kill", process::kill, RELEASED),
    apart("hugetlb", refused::hugetlb, NEVER_GIVEN),
    apart("secret-memory", refused::secret, NEVER_GIVEN),
    apart("no-pages", refused::no_pages, NEVER_GIVEN),
];
