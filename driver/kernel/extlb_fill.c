// SPDX-License-Identifier: GPL-2.0
/*
 * Fills of those ways to follow a process that cannot look at a pte and install
 * a leaf under one lock, as pte_notifier_fill() can. The page is looked up
 * first, and installed later; in between it may be taken away. So:
 *
 *  1. The fill begins: from here on it learns of each notification for its range.
 *  2. Each page is faulted in, for writing if the device wants to write, and
 *     looked up, with a reference that lasts until 4.
 *  3. Under pt_lock: if there was a notification since 1, all is given up and
 *     done again. Otherwise the leaves are installed.
 *  4. The references are dropped.
 *
 * What a notification is differs: see extlb_follow_mmu.c (after the pte has
 * changed) and extlb_follow_interval.c (before). Either takes pt_lock, to make
 * fills stale and to clear leaves, in this order. So a notification is either
 * before 3, and seen by it; or after 3, and finds the leaves.
 *
 * Dirty pages. Nobody sets the cpu's dirty bit when the device writes, so it has
 * to be set before: a clean page may be dropped. A lookup for writing alone would
 * not do: it marks the page, not the pte, and what then looks at the pte only
 * (MADV_FREE) would see nothing to flush. A write fault marks the pte, whether
 * or not that was writable before. Whoever makes it clean again flushes, and
 * that is a notification. So leaves are writable only if a write was asked for.
 *
 * No reference outlives the fill, so that nothing here hinders migration,
 * merging or reclaim for long. None is a pin (FOLL_PIN).
 */
#include <linux/fs.h>
#include <linux/hugetlb_inline.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/sched/signal.h>

#include "extlb.h"

#if IS_ENABLED(CONFIG_MMU_NOTIFIER)

/* Time between wake-ups of a fill that is to end. */
#define KICK_JIFFIES	(HZ / 50 + 1)

/*
 * Ordinary memory only, which is freed by way of the page tables. The same that
 * pte notifiers take, but for secret memory, which can be told by who looks its
 * pages up only.
 */
static bool is_suitable(struct vm_area_struct *vma)
{
	return !(vma->vm_flags &
		 (VM_IO | VM_PFNMAP | VM_MIXEDMAP | VM_SHADOW_STACK)) &&
	       !vma_is_dax(vma);
}

/* All of a range is mapped, and may be registered. Under mmap_lock. */
int extlb_fill_check_range(struct extlb_range *range)
{
	unsigned long addr = range->start;
	struct vm_area_struct *vma;

	VMA_ITERATOR(vmi, range->ctx->mm, addr);

	for_each_vma_range(vmi, vma, range->end) {
		if (vma->vm_start > addr || !is_suitable(vma))
			return -EINVAL;
		addr = vma->vm_end;
	}
	return addr >= range->end ? 0 : -EINVAL;
}

static int check_vma(struct extlb_fill *fill, struct vm_area_struct *vma)
{
	if (!vma || !is_suitable(vma))
		return -EFAULT;
	if (is_vm_hugetlb_page(vma))
		return -EOPNOTSUPP;
	return vma->vm_flags & (fill->write ? VM_WRITE : VM_READ) ? 0 : -EFAULT;
}

static bool is_over(struct extlb_fill *fill)
{
	return READ_ONCE(fill->range->closing) ||
	       READ_ONCE(fill->range->ctx->closing);
}

/*
 * Faults the page in, even if it is there: it is dirty then, if it is to be
 * written, and young. *@unlocked: mmap_lock was released, so that nothing is
 * known. The first page may take its time.
 */
static int fault_in(struct extlb_fill *fill, struct vm_area_struct *vma,
		    unsigned long addr, bool *unlocked)
{
	unsigned int flags = FAULT_FLAG_REMOTE | FAULT_FLAG_ALLOW_RETRY |
			     (fill->write ? FAULT_FLAG_WRITE : 0);
	bool first = addr == fill->start;
	vm_fault_t fault;

	flags |= first ? FAULT_FLAG_KILLABLE | fill->tried :
			 FAULT_FLAG_RETRY_NOWAIT;
	fault = handle_mm_fault(vma, addr, flags, NULL);

	if (fault & VM_FAULT_COMPLETED) {
		*unlocked = true;
		return 0;
	}
	if (fault & VM_FAULT_ERROR)
		return vm_fault_to_errno(fault, 0) ?: -EFAULT;
	if (fault & VM_FAULT_RETRY) {
		/* Who may not wait has not released the lock either. */
		if (!first)
			return -EAGAIN;
		*unlocked = true;
		fill->tried = FAULT_FLAG_TRIED;
	}
	return 0;
}

/*
 * Looks a page up, with a reference. What was faulted in just now can be gone
 * again, and take time to come back: then the page is NULL.
 */
static int look_up(struct extlb_fill *fill, unsigned long addr,
		   struct page **page)
{
	unsigned int flags = FOLL_NOWAIT | FOLL_HONOR_NUMA_FAULT |
			     (fill->write ? FOLL_WRITE : 0);
	long got = get_user_pages_remote(fill->range->ctx->mm, addr, 1, flags,
					 page, NULL);

	if (got != 1) {
		*page = NULL;
		return got;
	}
	if (is_zone_device_page(*page)) {
		put_page(*page);
		return -EFAULT;
	}
	return 0;
}

/* Under mmap_lock, which it may release: then *@unlocked. */
static int collect_one(struct extlb_fill *fill, bool *unlocked)
{
	unsigned long addr = fill->start + fill->npages * PAGE_SIZE;
	struct vm_area_struct *vma;
	struct page *page;
	int ret;

	vma = vma_lookup(fill->range->ctx->mm, addr);
	ret = check_vma(fill, vma);
	if (!ret)
		ret = fault_in(fill, vma, addr, unlocked);
	if (ret || *unlocked)
		return ret;
	ret = look_up(fill, addr, &page);
	if (ret)
		return ret;
	if (page)
		fill->pages[fill->npages++] = page;
	else if (addr != fill->start)
		return -EAGAIN;
	return 0;
}

/* Step 2: the first page by all means, others as far as they come at once. */
static int collect(struct extlb_fill *fill)
{
	struct mm_struct *mm = fill->range->ctx->mm;
	unsigned long wanted = min(PHYS_PFN(fill->end - fill->start),
				   ARRAY_SIZE(fill->pages));
	bool unlocked = true;
	int ret = 0;

	while (!ret && fill->npages < wanted) {
		if (is_over(fill)) {
			ret = -ENXIO;
			break;
		}
		if (unlocked && mmap_read_lock_killable(mm))
			return -EINTR;
		unlocked = false;
		ret = collect_one(fill, &unlocked);
		if (!ret && fatal_signal_pending(current))
			ret = -EINTR;
		/* The rest is not worth holding up whoever wants to write. */
		if (fill->npages && mmap_lock_is_contended(mm))
			break;
		cond_resched();
	}
	if (!unlocked)
		mmap_read_unlock(mm);
	return fill->npages ? 0 : ret;
}

/*
 * Step 3. The leaf of another page may still be there: the notification for it
 * is on its way, if it comes after the change. Its work is done here, then.
 */
static int install(struct extlb_fill *fill)
{
	struct extlb_ctx *ctx = fill->range->ctx;
	unsigned int done = 0;
	int ret = 0;

	spin_lock(&ctx->pt_lock);
	while (done < fill->npages) {
		unsigned long addr = fill->start + done * PAGE_SIZE;

		/* A notification may come whenever the lock is free. */
		if (is_over(fill))
			ret = -ENXIO;
		else if (fill->ops->is_stale(fill) &&
			 likely(!READ_ONCE(ctx->dev->ignore_stale)))
			ret = -EAGAIN;
		else
			ret = extlb_pt_install(ctx, addr,
					       page_to_pfn(fill->pages[done]),
					       fill->write);
		if (!ret) {
			done++;
			continue;
		}
		if (ret != -EEXIST)
			break;
		spin_unlock(&ctx->pt_lock);
		extlb_shoot_down(ctx, addr, addr + PAGE_SIZE, true);
		spin_lock(&ctx->pt_lock);
	}
	spin_unlock(&ctx->pt_lock);
	if (ret == -EAGAIN)
		atomic64_inc(&ctx->retried_fills);
	/* What was installed before it went wrong is good. */
	return done ? 0 : ret;
}

/* Fault injection: see extlb_debugfs.c. */
static void hold(struct extlb_fill *fill)
{
	struct extlb_dev *dev = fill->range->ctx->dev;

	if (likely(!READ_ONCE(dev->hold_fills)))
		return;
	atomic_inc(&dev->held_fills);
	while (READ_ONCE(dev->hold_fills) && !is_over(fill))
		schedule_timeout_uninterruptible(1);
	atomic_dec(&dev->held_fills);
}

/**
 * extlb_fill_run() - look pages up and map them for the device
 * @range: the registration
 * @start: first address
 * @end: end of the range
 * @write: the device wants to write
 * @ops: how it is known that a page was taken back meanwhile
 *
 * As extlb_follow_ops.fill().
 *
 * Return: 0, or why the page at @start is not mapped.
 */
int extlb_fill_run(struct extlb_range *range, unsigned long start,
		   unsigned long end, bool write,
		   const struct extlb_fill_ops *ops)
{
	struct extlb_ctx *ctx = range->ctx;
	struct extlb_fill fill = {
		.ops = ops,
		.range = range,
		.start = start,
		.end = end,
		.write = write,
		.task = current,
	};
	unsigned int i;
	int ret;

	ret = extlb_pt_prepare(ctx, start, end);
	if (ret)
		return ret;

	spin_lock(&ctx->pt_lock);
	list_add(&fill.node, &ctx->fills);
	spin_unlock(&ctx->pt_lock);

	if (ops->begin)
		ops->begin(&fill);
	ret = collect(&fill);
	if (!ret) {
		hold(&fill);
		ret = install(&fill);
	}
	for (i = 0; i < fill.npages; i++)
		put_page(fill.pages[i]);

	spin_lock(&ctx->pt_lock);
	list_del(&fill.node);
	spin_unlock(&ctx->pt_lock);
	return ret;
}

static bool kick(struct extlb_range *range)
{
	struct extlb_fill *fill;
	bool any = false;

	spin_lock(&range->ctx->pt_lock);
	list_for_each_entry(fill, &range->ctx->fills, node) {
		if (fill->range != range)
			continue;
		any = true;
		wake_up_process(fill->task);
	}
	spin_unlock(&range->ctx->pt_lock);
	return any;
}

/**
 * extlb_fill_stop() - wait for the fills of a registration that is being closed
 * @range: the registration
 *
 * One may wait in a page fault for as long as somebody likes (userfaultfd), in a
 * kernel thread, which nobody can kill. It is woken as often as it takes: a
 * sleeper in a fault has to cope with that, and then the fill sees that it is
 * over.
 */
void extlb_fill_stop(struct extlb_range *range)
{
	while (kick(range))
		schedule_timeout_uninterruptible(KICK_JIFFIES);
}

#endif /* CONFIG_MMU_NOTIFIER */
