// SPDX-License-Identifier: GPL-2.0
/*
 * Tells the kernel which pages the device can reach, so that it can check that
 * none of them is freed (CONFIG_PTE_NOTIFIERS_DEBUG).
 *
 * That a leaf is cleared does not mean that the device has let go of the page:
 * it has a TLB, and accesses under way. So a cleared leaf is held until the
 * device has acknowledged the invalidation that was posted for it, and only
 * then the page counts as unmapped. Whoever has waited for an acknowledgment
 * settles all that it covers, whoever cleared it: a CPU that found the leaf
 * cleared by another, and has waited for it, may free the page at once.
 *
 * The leaves themselves are what they are without all this. What is held is
 * noted beside the table that the leaf is in.
 */
#include <linux/debugfs.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/pte_notifier_debug.h>
#include <linux/slab.h>

#include "extlb.h"
#include "extlb_debug.h"

/* What the leaf at the same place of a table mapped. Under pt_lock. */
struct extlb_held {
	struct list_head list;		/* in extlb_ctx.held, by @seq */
	unsigned long pfn;
	u64 seq;			/* the wait that covers it */
};

/* Nothing is held here; the invalidation has not been posted yet. */
#define HELD_NOTHING	0
#define HELD_NOT_POSTED	U64_MAX

void extlb_debug_init(struct extlb_ctx *ctx)
{
	INIT_LIST_HEAD(&ctx->held);
}

/* Of a new table. Return: 0 or -ENOMEM. */
int extlb_debug_add_table(struct page *table)
{
	struct extlb_held *held = kvcalloc(PAGE_SIZE / sizeof(u64),
					   sizeof(*held), GFP_KERNEL_ACCOUNT);

	set_page_private(table, (unsigned long)held);
	return held ? 0 : -ENOMEM;
}

static struct extlb_held *held_of(u64 *leaf)
{
	struct extlb_held *held = (void *)page_private(virt_to_page(leaf));

	return held + offset_in_page(leaf) / sizeof(*leaf);
}

/* A leaf that was not present is set. */
void extlb_debug_set(struct extlb_ctx *ctx, u64 *leaf, unsigned long addr,
		     unsigned long pfn)
{
	pte_notifier_debug_map(ctx->mm, addr, pfn);
}

static void let_go(struct extlb_held *held)
{
	list_del(&held->list);
	held->seq = HELD_NOTHING;
	pte_notifier_debug_unmap(held->pfn);
}

/*
 * The device does not walk it any more, and has acknowledged that it has nothing
 * of what was mapped there.
 */
void extlb_debug_remove_table(struct extlb_ctx *ctx, struct page *table)
{
	struct extlb_held *held = (void *)page_private(table);
	unsigned int i;

	spin_lock(&ctx->pt_lock);
	for (i = 0; i < PAGE_SIZE / sizeof(u64); i++) {
		if (held[i].seq != HELD_NOTHING)
			let_go(&held[i]);
	}
	spin_unlock(&ctx->pt_lock);
	set_page_private(table, 0);
	kvfree(held);
}

static void settle(struct extlb_ctx *ctx)
{
	struct extlb_held *held, *next;

	list_for_each_entry_safe(held, next, &ctx->held, list) {
		if (held->seq == HELD_NOT_POSTED ||
		    !extlb_iq_acknowledged(ctx->dev, held->seq))
			break;
		let_go(held);
	}
}

/* A leaf was cleared that mapped @pfn. Under pt_lock. */
void extlb_debug_clear(struct extlb_ctx *ctx, u64 *leaf, unsigned long pfn)
{
	struct extlb_held *held = held_of(leaf);

	/*
	 * It was set again, and cleared again, before the first page's
	 * acknowledgment. There is one place for both; so wait. The device does
	 * not need the lock to acknowledge. What is only begun must not be
	 * there: install() ends that first.
	 */
	if (WARN_ON_ONCE(held->seq == HELD_NOT_POSTED))
		let_go(held);
	if (held->seq != HELD_NOTHING) {
		extlb_iq_wait(ctx->dev, held->seq, false);
		settle(ctx);
	}
	held->pfn = pfn;
	held->seq = HELD_NOT_POSTED;
	list_add_tail(&held->list, &ctx->held);
}

/*
 * An invalidation was posted that covers all leaves cleared before; @seq as from
 * extlb_iq_post(). Under pt_lock.
 */
void extlb_debug_posted(struct extlb_ctx *ctx, u64 seq)
{
	struct extlb_held *held;

	if (!seq) {
		extlb_debug_silent(ctx);
		return;
	}
	list_for_each_entry_reverse(held, &ctx->held, list) {
		if (held->seq != HELD_NOT_POSTED)
			break;
		held->seq = seq;
	}
}

/* Somebody has waited for the device. */
void extlb_debug_acked(struct extlb_ctx *ctx)
{
	spin_lock(&ctx->pt_lock);
	settle(ctx);
	spin_unlock(&ctx->pt_lock);
}

/* The device accesses nothing for the context any more. Under pt_lock. */
void extlb_debug_silent(struct extlb_ctx *ctx)
{
	struct extlb_held *held, *next;

	list_for_each_entry_safe(held, next, &ctx->held, list)
		let_go(held);
}

/* The negative control: whether not to wait for acknowledgments. */
bool extlb_debug_skip_wait(struct extlb_dev *dev)
{
	return READ_ONCE(dev->skip_wait);
}

void extlb_debug_add_files(struct extlb_dev *dev, struct dentry *dir)
{
	debugfs_create_bool("skip_wait", 0600, dir, &dev->skip_wait);
}
