// SPDX-License-Identifier: GPL-2.0
/*
 * Following a process with pte notifiers: no page is pinned.
 *
 * Why the device never has a page that was taken back. Four steps, each with
 * the lock that orders it:
 *
 *  1. A leaf is installed under the page table lock of the cpu pte, which at
 *     that moment maps the page (pte_notifier_fill() calls install() so), and
 *     under pt_lock.
 *  2. To take the page back, the memory manager changes the cpu pte under the
 *     same page table lock. Fills that get the lock later do not see the page.
 *     Fills that had it earlier have finished installing.
 *  3. After that, and before it frees the page, it calls clear(). That takes
 *     pt_lock, and so sees every leaf of 2's earlier fills; it clears them in
 *     RAM, has the device's TLB invalidated and its accesses drained, and waits
 *     for the acknowledgment. See extlb_pt_shoot_down().
 *  4. It returns, and the page may be freed. No leaf maps it, no TLB entry, no
 *     access under way; by 2 no leaf will.
 *
 * Between 2 and 3 another thread may map another page at the address, and a
 * fill may want to install that while the leaf of the old one is still there.
 * install() then does what the coming clear() would. The clear() takes away the
 * new leaf, too, for nothing: the device asks again.
 *
 * The order of a registration's end is the reverse of its life: install()
 * refuses (range->closing), leaves cleared and drained, unregistered. A clear()
 * that is missing after that has nothing to miss.
 */
#include <linux/mm.h>

#include "extlb.h"

#if IS_ENABLED(CONFIG_PTE_NOTIFIERS)

static struct extlb_range *to_range(struct pte_notifier *pn)
{
	return container_of(pn, struct extlb_range, pn);
}

/* The negative control: see extlb_debugfs.c. */
static bool ignored(struct extlb_range *range)
{
	return unlikely(READ_ONCE(range->ctx->dev->ignore_notifier));
}

/* Atomic: page table and rmap locks may be held, reclaim may be under way. */
static void extlb_clear(struct pte_notifier *pn, unsigned long start,
			unsigned long end)
{
	struct extlb_range *range = to_range(pn);

	atomic64_inc(&range->ctx->callbacks);
	if (!ignored(range))
		extlb_pt_shoot_down(range->ctx, start, end, false);
}

/*
 * The leaves of the part went with the last clear(); to look again costs little
 * and is not wrong. mmap_lock is held.
 */
static void extlb_close(struct pte_notifier *pn, unsigned long start,
			unsigned long end)
{
	struct extlb_range *range = to_range(pn);

	extlb_range_forget(range, start, end);
	if (ignored(range))
		return;
	extlb_pt_shoot_down(range->ctx, start, end, true);
	/* If the part is large enough that a table may be empty now. */
	if (end - start >= PMD_SIZE)
		extlb_pt_prune(range->ctx, start, end);
}

/* The process's page table goes next; nobody calls clear() for that. */
static void extlb_release(struct pte_notifier *pn)
{
	extlb_ctx_stop(to_range(pn)->ctx);
}

static const struct pte_notifier_ops extlb_notifier_ops = {
	.clear = extlb_clear,
	.close = extlb_close,
	.release = extlb_release,
};

/* mmap_lock is held. */
static int extlb_pte_register(struct extlb_range *range)
{
	range->pn.ops = &extlb_notifier_ops;
	return pte_notifier_register_range(&range->pn, range->ctx->mm,
					   range->start, range->end);
}

/* The leaves are gone, and install() refuses. Waits for callbacks and fills. */
static void extlb_pte_unregister(struct extlb_range *range)
{
	pte_notifier_unregister(&range->pn);
}

/*
 * Under the page table lock. Return: 0, -ENXIO if it is over, -ESTALE if the
 * table was pruned since it was prepared, or -EIO if the rule is broken.
 */
static int extlb_install(struct pte_notifier *pn, unsigned long addr,
			 unsigned long pfn, bool writable, void *priv)
{
	struct extlb_range *range = to_range(pn);
	struct extlb_ctx *ctx = range->ctx;
	bool again = false;
	int ret;

	for (;;) {
		spin_lock(&ctx->pt_lock);
		if (ctx->closing || range->closing)
			ret = -ENXIO;
		else
			ret = extlb_pt_install(ctx, addr, pfn, writable);
		spin_unlock(&ctx->pt_lock);
		if (ret != -EEXIST)
			return ret;
		/*
		 * clear() has not come yet for the page that was here. The page
		 * table lock keeps out who might install another.
		 */
		if (WARN_ON_ONCE(again))
			return -EIO;
		extlb_pt_shoot_down(ctx, addr, addr + PAGE_SIZE, false);
		again = true;
	}
}

static int extlb_pte_fill(struct extlb_range *range, unsigned long start,
			  unsigned long end, bool write)
{
	long ret = extlb_pt_prepare(range->ctx, start, end);

	if (!ret)
		ret = pte_notifier_fill(&range->pn, start, end, write,
					extlb_install, NULL);
	return ret < 0 ? ret : 0;
}

const struct extlb_follow_ops extlb_follow_pte = {
	.name = "pte",
	.flag = EXTLB_CREATE_FOLLOW_PTE,
	.register_range = extlb_pte_register,
	.unregister_range = extlb_pte_unregister,
	.fill = extlb_pte_fill,
};

#endif /* CONFIG_PTE_NOTIFIERS */
