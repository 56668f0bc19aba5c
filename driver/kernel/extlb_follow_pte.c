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
 *     for the acknowledgment. See extlb_shootdown.c.
 *  4. It returns, and the page may be freed. No leaf maps it, no TLB entry, no
 *     access under way; by 2 no leaf will.
 *
 * Between 2 and 3 another thread may map another page at the address, and a
 * fill may want to install that while the leaf of the old one is still there.
 * install() then does what the coming clear() would. The clear() takes away the
 * new leaf, too, for nothing: the device asks again.
 *
 * When the memory manager unmaps many pages, 3 comes in two parts: clear_begin()
 * for each page clears the leaf, and sync() waits for the device, once. 4 is
 * after that, and until then the folio is locked: a fill for the address does
 * not find another page. (If it finds the same one, because the unmap was given
 * up, install() has the device lose what was begun first. So a leaf is set only
 * where the device has nothing.)
 *
 * The order of a registration's end is the reverse of its life: install()
 * refuses (range->closing), leaves cleared and drained, unregistered. A clear()
 * that is missing after that has nothing to miss.
 */
#include <linux/mm.h>
#include <linux/moduleparam.h>

#include "extlb.h"

#if IS_ENABLED(CONFIG_PTE_NOTIFIERS)

static struct extlb_range *to_range(struct pte_notifier *pn)
{
	return container_of(pn, struct extlb_range, pn);
}

static bool batch = true;
module_param(batch, bool, 0644);
MODULE_PARM_DESC(batch,
		 "Wait once when the kernel unmaps many pages, and not for each (default on)");

static bool age = true;
module_param(age, bool, 0644);
MODULE_PARM_DESC(age,
		 "Tell the kernel which pages the device has used, so that it keeps them (default on)");

/* Atomic: page table and rmap locks may be held, reclaim may be under way. */
static void extlb_clear(struct pte_notifier *pn, unsigned long start,
			unsigned long end)
{
	struct extlb_range *range = to_range(pn);

	atomic64_inc(&range->ctx->callbacks);
	if (likely(!extlb_ignores_all(range->ctx)))
		extlb_shoot_down(range->ctx, start, end, false);
}

/* As extlb_clear(), of a page of many. extlb_sync() follows. */
static void extlb_clear_begin(struct pte_notifier *pn, unsigned long start,
			      unsigned long end)
{
	struct extlb_range *range = to_range(pn);

	if (!READ_ONCE(batch)) {
		extlb_clear(pn, start, end);
		return;
	}
	atomic64_inc(&range->ctx->callbacks);
	if (likely(!extlb_ignores_all(range->ctx)))
		extlb_shoot_down_begin(range->ctx, start, end);
}

static void extlb_sync(struct pte_notifier *pn)
{
	struct extlb_ctx *ctx = to_range(pn)->ctx;

	if (likely(!READ_ONCE(ctx->dev->ignore_notifier)))
		extlb_shoot_down_end(ctx);
}

static bool extlb_is_young(struct pte_notifier *pn, unsigned long start,
			   unsigned long end, bool clear)
{
	return READ_ONCE(age) &&
	       extlb_age(to_range(pn)->ctx, start, end, clear);
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
	if (extlb_ignores_all(range->ctx))
		return;
	extlb_shoot_down(range->ctx, start, end, true);
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
	.clear_begin = extlb_clear_begin,
	.sync = extlb_sync,
	.age = extlb_is_young,
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
	bool again = false, synced = false;
	int ret;

	for (;;) {
		spin_lock(&ctx->pt_lock);
		if (ctx->closing || range->closing)
			ret = -ENXIO;
		else if (!synced && extlb_is_begun(ctx, addr))
			ret = -EAGAIN;
		else
			ret = extlb_pt_install(ctx, addr, pfn, writable);
		spin_unlock(&ctx->pt_lock);
		if (ret == -EAGAIN) {
			extlb_shoot_down_end(ctx);
			/* What is begun here by now is only next to it: see 2. */
			synced = true;
			continue;
		}
		if (ret != -EEXIST)
			return ret;
		/*
		 * clear() has not come yet for the page that was here. The page
		 * table lock keeps out who might install another.
		 */
		if (WARN_ON_ONCE(again))
			return -EIO;
		extlb_shoot_down(ctx, addr, addr + PAGE_SIZE, false);
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
