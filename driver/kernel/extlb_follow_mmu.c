// SPDX-License-Identifier: GPL-2.0
/*
 * Following a process with an mmu notifier: any kernel has them.
 *
 * arch_invalidate_secondary_tlbs() is called where the kernel flushes its TLBs:
 * after a pte was changed, and before the page is freed. It is told less exactly
 * what changed than a pte notifier is (an unpatched kernel says "all" for each
 * page that it reclaims, and for more than 33 at a time), and for the whole
 * process, so that most calls concern nobody here.
 *
 * Why the device never has a page that was taken back. A fill looks a page up,
 * and installs it later, see extlb_fill.c. Say that the cpu pte is changed
 * afterwards. Then the call comes after the fill had begun, so either
 *
 *  - it takes pt_lock before the fill does to install: it makes the fill stale,
 *    and nothing is installed; or
 *  - it takes pt_lock after the fill did: it finds the leaf, clears it, has the
 *    device's TLB invalidated and its accesses drained, and only then returns,
 *    and the page may be freed.
 *
 * If the pte is changed before the page is looked up, that finds the new one.
 * The call for the old one may be still to come; it makes the fill stale, or
 * takes the new leaf away, for nothing, and the device asks again.
 *
 * Nobody says that a part of a registration is unmapped. It stays what it is, a
 * range of addresses: the device reaches whatever the process maps there next,
 * with the process's rights, until the program ends the registration. It never
 * reaches what the process has not. Memory that is not ordinary is refused when
 * the device asks for it.
 */
#include <linux/mm.h>
#include <linux/mmu_notifier.h>

#include "extlb.h"

#if IS_ENABLED(CONFIG_MMU_NOTIFIER)

static void make_stale(struct extlb_ctx *ctx, unsigned long start,
		       unsigned long end)
{
	struct extlb_fill *fill;

	spin_lock(&ctx->pt_lock);
	list_for_each_entry(fill, &ctx->fills, node) {
		if (start < fill->end && fill->start < end)
			fill->stale = true;
	}
	spin_unlock(&ctx->pt_lock);
}

/*
 * Atomic: page table and rmap locks may be held, reclaim may be under way. Ranges
 * need not begin or end with a page; that of everything ends at -1UL.
 */
static void extlb_mmu_invalidate(struct mmu_notifier *mn, struct mm_struct *mm,
				 unsigned long start, unsigned long end)
{
	struct extlb_ctx *ctx = container_of(mn, struct extlb_ctx, mn);

	start = min(start & PAGE_MASK, EXTLB_IOVA_END);
	end = PAGE_ALIGN(min(end, EXTLB_IOVA_END));
	atomic64_inc(&ctx->callbacks);
	make_stale(ctx, start, end);
	if (likely(!extlb_ignores_all(ctx)))
		extlb_shoot_down(ctx, start, end, false);
}

/* The process's page table goes next; nobody calls for that. */
static void extlb_mmu_release(struct mmu_notifier *mn, struct mm_struct *mm)
{
	extlb_ctx_stop(container_of(mn, struct extlb_ctx, mn));
}

static const struct mmu_notifier_ops extlb_mmu_ops = {
	.arch_invalidate_secondary_tlbs = extlb_mmu_invalidate,
	.release = extlb_mmu_release,
};

static int extlb_mmu_attach(struct extlb_ctx *ctx)
{
	ctx->mn.ops = &extlb_mmu_ops;
	return mmu_notifier_register(&ctx->mn, ctx->mm);
}

/* Waits for callbacks. */
static void extlb_mmu_detach(struct extlb_ctx *ctx)
{
	mmu_notifier_unregister(&ctx->mn, ctx->mm);
}

static bool is_stale(struct extlb_fill *fill)
{
	return fill->stale;
}

static const struct extlb_fill_ops extlb_mmu_fill_ops = {
	.is_stale = is_stale,
};

static int extlb_mmu_fill(struct extlb_range *range, unsigned long start,
			  unsigned long end, bool write)
{
	return extlb_fill_run(range, start, end, write,
			      &extlb_mmu_fill_ops);
}

const struct extlb_follow_ops extlb_follow_mmu = {
	.name = "mmu",
	.flag = EXTLB_CREATE_FOLLOW_MMU,
	.attach = extlb_mmu_attach,
	.detach = extlb_mmu_detach,
	.register_range = extlb_fill_check_range,
	.unregister_range = extlb_fill_stop,
	.fill = extlb_mmu_fill,
};

#endif /* CONFIG_MMU_NOTIFIER */
