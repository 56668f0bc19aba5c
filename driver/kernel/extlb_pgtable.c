// SPDX-License-Identifier: GPL-2.0
/*
 * The device's page table of a context, and how leaves get out of it.
 *
 * Only this file writes it; the device sets accessed and dirty bits in leaves,
 * by compare-and-swap. All under extlb_ctx.pt_lock. Tables are allocated ahead,
 * where one may sleep. They are unlinked when they are empty, and freed when
 * the device has acknowledged that it does not walk them any more.
 *
 * Entries hold physical addresses: the driver refuses to run behind a
 * translating IOMMU, see extlb_drv.c.
 */
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/memcontrol.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <linux/timekeeping.h>

#include "extlb.h"

#define ROOT_LEVEL	EXTLB_PTE_LEVELS
/* What clearing takes away at most while other CPUs wait for the lock. */
#define PRUNE_STEP	BIT(30)

static unsigned int shift_of(int level)
{
	return PAGE_SHIFT + 9 * (level - 1);
}

/* End of the part of [addr, end) that one entry of a table of @level covers. */
static unsigned long entry_end(unsigned long addr, unsigned long end, int level)
{
	return min(end, ((addr >> shift_of(level)) + 1) << shift_of(level));
}

static u64 *entry_of(u64 *table, unsigned long addr, int level)
{
	return &table[(addr >> shift_of(level)) & 511];
}

static bool is_present(const u64 *entry)
{
	return READ_ONCE(*entry) & EXTLB_PTE_PRESENT;
}

static u64 *table_of(u64 entry)
{
	return phys_to_virt(entry & EXTLB_PTE_ADDR_MASK);
}

/*
 * Tables count as such: SecPageTables in /proc/meminfo, and sec_pagetables of
 * the control group.
 */
static struct page *alloc_table(void)
{
	struct page *page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);

	if (page)
		mod_lruvec_page_state(page, NR_SECONDARY_PAGETABLE, 1);
	return page;
}

static void free_table(struct page *page)
{
	mod_lruvec_page_state(page, NR_SECONDARY_PAGETABLE, -1);
	__free_page(page);
}

int extlb_pt_init(struct extlb_ctx *ctx)
{
	struct page *page = alloc_table();

	ctx->root = page ? page_address(page) : NULL;
	return page ? 0 : -ENOMEM;
}

static void free_tables(u64 *table, int level)
{
	int i;

	for (i = 0; level > 1 && i < 512; i++) {
		if (is_present(&table[i]))
			free_tables(table_of(table[i]), level - 1);
	}
	free_table(virt_to_page(table));
}

/* Frees all. The device must be silent for the context. */
void extlb_pt_free(struct extlb_ctx *ctx)
{
	if (ctx->root)
		free_tables(ctx->root, ROOT_LEVEL);
	ctx->root = NULL;
}

/*
 * Links the tables for @addr, taking *@spare as one of them. Return: 0, -EAGAIN
 * if it takes another spare page, -ENXIO if the context is being closed.
 */
static int link_tables(struct extlb_ctx *ctx, unsigned long addr,
		       struct page **spare)
{
	u64 *table = ctx->root;
	int level;

	if (ctx->closing)
		return -ENXIO;
	for (level = ROOT_LEVEL; level > 1; level--) {
		u64 *entry = entry_of(table, addr, level);

		if (!is_present(entry)) {
			if (!*spare)
				return -EAGAIN;
			/* The zeroes of the table before the link to it. */
			dma_wmb();
			WRITE_ONCE(*entry, page_to_phys(*spare) |
				   EXTLB_PTE_PRESENT);
			*spare = NULL;
		}
		table = table_of(*entry);
	}
	return 0;
}

/**
 * extlb_pt_prepare() - make sure that there are tables for a range
 * @ctx: the context
 * @start: first address
 * @end: end of the range
 *
 * May sleep. A table can be pruned again before it is used.
 *
 * Return: 0, -ENOMEM, or -ENXIO if the context is being closed.
 */
int extlb_pt_prepare(struct extlb_ctx *ctx, unsigned long start,
		     unsigned long end)
{
	struct page *spare = NULL;
	unsigned long addr;
	int ret = 0;

	for (addr = start; addr < end && !ret; addr = entry_end(addr, end, 2)) {
		for (;;) {
			spin_lock(&ctx->pt_lock);
			ret = link_tables(ctx, addr, &spare);
			spin_unlock(&ctx->pt_lock);
			if (ret != -EAGAIN)
				break;
			spare = alloc_table();
			if (!spare)
				return -ENOMEM;
		}
		cond_resched();
	}
	if (spare)
		free_table(spare);
	return ret;
}

/* The leaf for an address; NULL if there is no table for it. Under pt_lock. */
u64 *extlb_pt_leaf(struct extlb_ctx *ctx, unsigned long addr)
{
	u64 *table = ctx->root;
	int level;

	for (level = ROOT_LEVEL; level > 1; level--) {
		u64 *entry = entry_of(table, addr, level);

		if (!is_present(entry))
			return NULL;
		table = table_of(*entry);
	}
	return entry_of(table, addr, 1);
}

/*
 * Sets a leaf that is not present, or that maps the same page with no more
 * rights. Either needs no invalidation: the device does not cache what is not
 * present, and walks again if a right is missing. Under pt_lock.
 */
void extlb_pt_set(struct extlb_ctx *ctx, u64 *leaf, unsigned long pfn,
		  bool writable)
{
	u64 value = PFN_PHYS(pfn) | EXTLB_PTE_PRESENT |
		    (writable ? EXTLB_PTE_WRITE : 0);

	if (!is_present(leaf))
		atomic64_inc(&ctx->mapped_pages);
	WRITE_ONCE(*leaf, value);
	atomic64_inc(&ctx->filled_pages);
}

/**
 * extlb_pt_install() - map a page
 * @ctx: the context
 * @addr: where
 * @pfn: the page
 * @writable: the device may write, too
 *
 * Under pt_lock.
 *
 * Return: 0, -ESTALE if the table was pruned since it was prepared, or -EEXIST
 * if the leaf maps another page: that has to be shot down before.
 */
int extlb_pt_install(struct extlb_ctx *ctx, unsigned long addr,
		     unsigned long pfn, bool writable)
{
	u64 *leaf = extlb_pt_leaf(ctx, addr);
	u64 old;

	if (!leaf)
		return -ESTALE;
	old = READ_ONCE(*leaf);
	if ((old & EXTLB_PTE_PRESENT) &&
	    (old & EXTLB_PTE_ADDR_MASK) != PFN_PHYS(pfn))
		return -EEXIST;
	if (!(old & EXTLB_PTE_PRESENT) ||
	    (writable && !(old & EXTLB_PTE_WRITE)))
		extlb_pt_set(ctx, leaf, pfn, writable);
	return 0;
}

static void clear_level(u64 *table, int level, unsigned long start,
			unsigned long end, struct extlb_cleared *cleared)
{
	unsigned long addr, next;

	for (addr = start; addr < end; addr = next) {
		u64 *entry = entry_of(table, addr, level);

		next = entry_end(addr, end, level);
		if (!is_present(entry))
			continue;
		if (level > 1) {
			clear_level(table_of(*entry), level - 1, addr, next,
				    cleared);
			continue;
		}
		/* Atomic: the device may be about to set the dirty bit. */
		xchg(entry, 0);
		if (!cleared->pages++)
			cleared->start = addr;
		cleared->end = next;
	}
}

/* Clears the leaves of a range, and tells where there were any. Under pt_lock. */
void extlb_pt_clear(struct extlb_ctx *ctx, unsigned long start,
		    unsigned long end, struct extlb_cleared *cleared)
{
	*cleared = (struct extlb_cleared){};
	clear_level(ctx->root, ROOT_LEVEL, min(start, EXTLB_IOVA_END),
		    min(end, EXTLB_IOVA_END), cleared);
	atomic64_sub(cleared->pages, &ctx->mapped_pages);
}

/* Posts an invalidation; whoever comes later waits for it, too. Under pt_lock. */
static void post_invalidation(struct extlb_ctx *ctx, unsigned long start,
			      unsigned long end)
{
	struct extlb_command command = {
		.kind = EXTLB_COMMAND_KIND_INVALIDATE,
		.flags = EXTLB_INVALIDATION_SCOPE_RANGE,
		.context = ctx->index,
		.addr = start,
		.value = end - start,
	};

	ctx->inval_seq = extlb_iq_post(ctx->dev, &command, true);
}

/**
 * extlb_pt_shoot_down() - take a range of pages from the device
 * @ctx: the context
 * @start: first address
 * @end: end of the range; ~0UL for everything
 * @may_sleep: whether the caller may
 *
 * When it returns, no leaf of the range is left that was there before, the
 * device's TLB holds nothing of it, and no access to it is under way. Of what is
 * above the addresses of processes nothing is ever taken: pages of the driver.
 *
 * Leaf, then TLB, then accesses: the leaves are cleared before the invalidation
 * is posted, so a walk that comes after it finds nothing; what was translated
 * before it is drained before the acknowledgment.
 *
 * If no leaf was present, the device is not asked. That is right because the
 * TLB holds only what was a present leaf at some time since it was last
 * invalidated there: a leaf becomes not present only here (or in a context that
 * is stopped as a whole), and that posts an invalidation before it unlocks. The
 * device may not have acknowledged that one yet, if another CPU has just been
 * here: so the acknowledgment of the context's last invalidation is waited for
 * in any case. If it has come already, that costs one load.
 */
void extlb_pt_shoot_down(struct extlb_ctx *ctx, unsigned long start,
			 unsigned long end, bool may_sleep)
{
	u64 begin = ktime_get_mono_fast_ns();
	struct extlb_cleared cleared;
	u64 seq;

	spin_lock(&ctx->pt_lock);
	extlb_pt_clear(ctx, start, min(end, TASK_SIZE_MAX), &cleared);
	if (cleared.pages)
		post_invalidation(ctx, cleared.start, cleared.end);
	seq = ctx->inval_seq;
	spin_unlock(&ctx->pt_lock);

	extlb_iq_wait(ctx->dev, seq, may_sleep);

	if (cleared.pages) {
		u64 ns = ktime_get_mono_fast_ns() - begin;

		atomic64_inc(&ctx->shootdowns);
		atomic64_inc(&ctx->dev->shootdowns);
		atomic64_add(cleared.pages, &ctx->shot_pages);
		extlb_histogram_add(&ctx->shootdown_ns, ns);
		extlb_histogram_add(&ctx->dev->shootdown_ns, ns);
	}
}

/*
 * Unlinks the empty tables below the entries of @table for a range, and moves
 * them to @unlinked. *@level_out: highest level of a table unlinked.
 */
static void prune_level(u64 *table, int level, unsigned long start,
			unsigned long end, struct list_head *unlinked,
			int *level_out)
{
	unsigned long addr, next;

	for (addr = start; addr < end; addr = next) {
		u64 *entry = entry_of(table, addr, level);
		u64 *below;

		next = entry_end(addr, end, level);
		if (!is_present(entry))
			continue;
		below = table_of(*entry);
		if (level > 2)
			prune_level(below, level - 1, addr, next, unlinked,
				    level_out);
		if (memchr_inv(below, 0, PAGE_SIZE))
			continue;
		WRITE_ONCE(*entry, 0);
		list_add(&virt_to_page(below)->lru, unlinked);
		*level_out = max(*level_out, level - 1);
	}
}

/* As much of [start, end) as is done under one lock. */
static void prune_step(struct extlb_ctx *ctx, unsigned long start,
		       unsigned long end)
{
	struct page *page, *next;
	LIST_HEAD(unlinked);
	int level = 0;
	u64 seq;

	spin_lock(&ctx->pt_lock);
	prune_level(ctx->root, ROOT_LEVEL, start, end, &unlinked, &level);
	if (level) {
		/*
		 * The device may cache the way to a table for all that the
		 * table covers, so that is what to invalidate.
		 */
		unsigned long span = 1UL << shift_of(level + 1);

		post_invalidation(ctx, round_down(start, span),
				  round_up(end, span));
	}
	seq = ctx->inval_seq;
	spin_unlock(&ctx->pt_lock);

	/* Drained: no walk goes through them, no dirty bit will be set. */
	extlb_iq_wait(ctx->dev, seq, true);
	list_for_each_entry_safe(page, next, &unlinked, lru)
		free_table(page);
}

/* Frees the tables of a range that are empty now. May sleep. */
void extlb_pt_prune(struct extlb_ctx *ctx, unsigned long start,
		    unsigned long end)
{
	unsigned long addr, next;

	end = min(end, EXTLB_IOVA_END);
	for (addr = start; addr < end; addr = next) {
		next = min(end, round_down(addr, PRUNE_STEP) + PRUNE_STEP);
		prune_step(ctx, addr, next);
		cond_resched();
	}
}
