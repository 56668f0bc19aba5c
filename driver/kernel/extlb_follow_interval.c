// SPDX-License-Identifier: GPL-2.0
/*
 * Following a process with mmu interval notifiers, one for each registration:
 * any kernel has them.
 *
 * invalidate() is called before ptes are changed, and says so until they are:
 * from then on fills that began earlier are stale (mmu_interval_read_retry()),
 * and new ones wait (mmu_interval_read_begin()).
 *
 * Why the device never has a page that was taken back. invalidate() takes
 * pt_lock, sets the sequence number, clears the leaves, has the device's TLB
 * invalidated and its accesses drained, and returns; then the ptes are changed,
 * then the pages are freed. A leaf that is installed before it took pt_lock is
 * cleared by it. A fill that takes pt_lock to install after that either began
 * before, and is stale; or began since, and then it waited until all was changed
 * and looks up what is there now. See extlb_fill.c.
 *
 * So the device loses pages while the process still has them: an operation that
 * is under way then faults, waits for the end of the change, and goes on. What is
 * announced need not take place: all of a range is announced at once, though
 * perhaps a few pages of it change, or none.
 *
 * Registrations and memory that is unmapped: as in extlb_follow_mmu.c.
 */
#include <linux/mm.h>
#include <linux/mmu_notifier.h>

#include "extlb.h"

#if IS_ENABLED(CONFIG_MMU_NOTIFIER)

/* It does not sleep if it may not, so it never has to refuse. */
static bool extlb_interval_invalidate(struct mmu_interval_notifier *mni,
				      const struct mmu_notifier_range *event,
				      unsigned long seq)
{
	struct extlb_range *range = container_of(mni, struct extlb_range, mni);
	struct extlb_ctx *ctx = range->ctx;

	atomic64_inc(&ctx->callbacks);
	spin_lock(&ctx->pt_lock);
	mmu_interval_set_seq(mni, seq);
	spin_unlock(&ctx->pt_lock);

	/* The process's page table goes next. */
	if (event->event == MMU_NOTIFY_RELEASE)
		extlb_ctx_stop(ctx);
	else if (likely(!extlb_ignores_all(ctx)))
		extlb_shoot_down(ctx, max(event->start, range->start),
				 min(event->end, range->end),
				 mmu_notifier_range_blockable(event));
	return true;
}

static const struct mmu_interval_notifier_ops extlb_interval_ops = {
	.invalidate = extlb_interval_invalidate,
};

/* Under mmap_lock for writing. */
static int extlb_interval_register(struct extlb_range *range)
{
	int ret = extlb_fill_check_range(range);

	if (ret)
		return ret;
	return mmu_interval_notifier_insert_locked(&range->mni, range->ctx->mm,
						   range->start,
						   range->end - range->start,
						   &extlb_interval_ops);
}

/* Waits for fills, and for changes that have been announced. */
static void extlb_interval_unregister(struct extlb_range *range)
{
	extlb_fill_stop(range);
	mmu_interval_notifier_remove(&range->mni);
}

static void begin(struct extlb_fill *fill)
{
	fill->seq = mmu_interval_read_begin(&fill->range->mni);
}

/* Under pt_lock. */
static bool is_stale(struct extlb_fill *fill)
{
	return mmu_interval_read_retry(&fill->range->mni, fill->seq);
}

static const struct extlb_fill_ops extlb_interval_fill_ops = {
	.begin = begin,
	.is_stale = is_stale,
};

static int extlb_interval_fill(struct extlb_range *range, unsigned long start,
			       unsigned long end, bool write)
{
	return extlb_fill_run(range, start, end, write,
			      &extlb_interval_fill_ops);
}

const struct extlb_follow_ops extlb_follow_interval = {
	.name = "interval",
	.flag = EXTLB_CREATE_FOLLOW_INTERVAL,
	.register_range = extlb_interval_register,
	.unregister_range = extlb_interval_unregister,
	.fill = extlb_interval_fill,
};

#endif /* CONFIG_MMU_NOTIFIER */
