// SPDX-License-Identifier: GPL-2.0
/*
 * The device's page table of a context. How the device is told of what was taken
 * out is in extlb_shootdown.c.
 *
 * Only this file writes it; the device sets accessed and dirty bits in leaves,
 * by compare-and-swap. All under extlb_ctx.pt_lock. Tables are allocated ahead,
 * where one may sleep. They are unlinked when they are empty, and freed when
 * the device has acknowledged that it does not walk them any more.
 *
 * Entries hold physical addresses: the driver refuses to run behind a
 * translating IOMMU, see extlb_drv.c.
 */
#include <linux/bitops.h>
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/log2.h>
#include <linux/memcontrol.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/string.h>

#include "extlb.h"
#include "extlb_debug.h"

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
	struct page *table = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);

	if (table && extlb_debug_add_table(table)) {
		__free_page(table);
		return NULL;
	}
	if (table)
		mod_lruvec_page_state(table, NR_SECONDARY_PAGETABLE, 1);
	return table;
}

static void free_table(struct extlb_ctx *ctx, struct page *table)
{
	extlb_debug_remove_table(ctx, table);
	mod_lruvec_page_state(table, NR_SECONDARY_PAGETABLE, -1);
	__free_page(table);
}

int extlb_pt_init(struct extlb_ctx *ctx)
{
	struct page *root = alloc_table();

	ctx->root = root ? page_address(root) : NULL;
	return root ? 0 : -ENOMEM;
}

static void free_tables(struct extlb_ctx *ctx, u64 *table, int level)
{
	int i;

	for (i = 0; level > 1 && i < 512; i++) {
		if (is_present(&table[i]))
			free_tables(ctx, table_of(table[i]), level - 1);
	}
	free_table(ctx, virt_to_page(table));
}

/* Frees all. The device must be silent for the context. */
void extlb_pt_free(struct extlb_ctx *ctx)
{
	if (ctx->root)
		free_tables(ctx, ctx->root, ROOT_LEVEL);
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
		free_table(ctx, spare);
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
void extlb_pt_set(struct extlb_ctx *ctx, u64 *leaf, unsigned long addr,
		  unsigned long pfn, bool writable)
{
	u64 value = PFN_PHYS(pfn) | EXTLB_PTE_PRESENT |
		    (writable ? EXTLB_PTE_WRITE : 0);

	if (!is_present(leaf)) {
		atomic64_inc(&ctx->mapped_pages);
		extlb_debug_set(ctx, leaf, addr, pfn);
	}
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
		extlb_pt_set(ctx, leaf, addr, pfn, writable);
	return 0;
}

static void clear_level(struct extlb_ctx *ctx, u64 *table, int level,
			unsigned long start, unsigned long end,
			struct extlb_cleared *cleared)
{
	unsigned long addr, next;
	u64 old;

	for (addr = start; addr < end; addr = next) {
		u64 *entry = entry_of(table, addr, level);

		next = entry_end(addr, end, level);
		if (!is_present(entry))
			continue;
		if (level > 1) {
			clear_level(ctx, table_of(*entry), level - 1, addr,
				    next, cleared);
			continue;
		}
		/* Atomic: the device may be about to set the dirty bit. */
		old = xchg(entry, 0);
		extlb_debug_clear(ctx, entry,
				  PHYS_PFN(old & EXTLB_PTE_ADDR_MASK));
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
	clear_level(ctx, ctx->root, ROOT_LEVEL, min(start, EXTLB_IOVA_END),
		    min(end, EXTLB_IOVA_END), cleared);
	atomic64_sub(cleared->pages, &ctx->mapped_pages);
}

/**
 * extlb_pt_age() - look which pages the device has used
 * @ctx: the context
 * @start: first address
 * @end: end of the range
 * @clear: clear the accessed bits
 * @aged: returns the bounds of the leaves whose bits were cleared
 *
 * Under pt_lock.
 *
 * Return: whether it has used any since the bits were cleared.
 */
bool extlb_pt_age(struct extlb_ctx *ctx, unsigned long start,
		  unsigned long end, bool clear, struct extlb_cleared *aged)
{
	unsigned long addr, next;
	bool young = false;

	*aged = (struct extlb_cleared){};
	for (addr = start; addr < end; addr = next) {
		u64 *leaf = extlb_pt_leaf(ctx, addr);

		next = entry_end(addr, end, 2);
		for (; leaf && addr < next; addr += PAGE_SIZE, leaf++) {
			if (!(READ_ONCE(*leaf) & EXTLB_PTE_ACCESSED))
				continue;
			young = true;
			if (!clear)
				return true;
			/* Atomic: the device may be about to set the other. */
			clear_bit(ilog2(EXTLB_PTE_ACCESSED),
				  (unsigned long *)leaf);
			if (!aged->pages++)
				aged->start = addr;
			aged->end = addr + PAGE_SIZE;
		}
	}
	return young;
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

		extlb_post_invalidation(ctx, round_down(start, span),
					round_up(end, span));
	}
	seq = ctx->inval_seq;
	spin_unlock(&ctx->pt_lock);

	/* Drained: no walk goes through them, no dirty bit will be set. */
	extlb_iq_wait(ctx->dev, seq, true);
	extlb_debug_acked(ctx);
	list_for_each_entry_safe(page, next, &unlinked, lru)
		free_table(ctx, page);
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
