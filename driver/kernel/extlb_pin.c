// SPDX-License-Identifier: GPL-2.0
/*
 * Pinned mode: what a driver without pte notifiers has to do. All pages of a
 * registration are faulted in and pinned when it is made, whether they are going
 * to be used or not, and stay where they are until it ends. For comparison.
 */
#include <linux/capability.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "extlb.h"

#define BATCH		256
#define PINNED_WRITE	1UL

static struct page *page_of(unsigned long entry)
{
	return (struct page *)(entry & ~PINNED_WRITE);
}

/*
 * Accounts @npages as pinned by the process: VmPin of /proc/PID/status, limited
 * by RLIMIT_MEMLOCK. More than the machine has is refused at once, and not
 * found out by killing everybody else first.
 */
static int account(struct mm_struct *mm, unsigned long npages)
{
	unsigned long limit = totalram_pages();
	s64 pinned = atomic64_add_return(npages, &mm->pinned_vm);

	if (!capable(CAP_IPC_LOCK))
		limit = min(limit, rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT);
	if (pinned > limit) {
		atomic64_sub(npages, &mm->pinned_vm);
		return -ENOMEM;
	}
	return 0;
}

/*
 * How far the VMA at @addr goes, and whether it can be written. What happens to
 * the VMA after mmap_lock is released shows when its pages are pinned.
 */
static int look_up_vma(struct mm_struct *mm, unsigned long addr,
		       unsigned long *end, bool *writable)
{
	struct vm_area_struct *vma;
	int ret = mmap_read_lock_killable(mm);

	if (ret)
		return ret;
	vma = vma_lookup(mm, addr);
	if (vma) {
		*end = min(*end, vma->vm_end);
		*writable = vma->vm_flags & VM_WRITE;
	} else {
		ret = -EFAULT;
	}
	mmap_read_unlock(mm);
	return ret;
}

/* Pins [addr, end), with as many calls as it takes. */
static int pin_pages(struct extlb_range *range, struct page **batch)
{
	unsigned long addr = range->start;

	while (addr < range->end) {
		unsigned long end = min(range->end, addr + BATCH * PAGE_SIZE);
		bool writable;
		int ret, i;

		if (fatal_signal_pending(current))
			return -EINTR;
		ret = look_up_vma(range->ctx->mm, addr, &end, &writable);
		if (ret)
			return ret;
		ret = pin_user_pages_fast(addr, PHYS_PFN(end - addr),
					  FOLL_LONGTERM |
					  (writable ? FOLL_WRITE : 0), batch);
		if (ret <= 0)
			return ret ?: -EFAULT;
		for (i = 0; i < ret; i++)
			range->pages[range->npages++] = (unsigned long)batch[i] |
						(writable ? PINNED_WRITE : 0);
		addr += (unsigned long)ret * PAGE_SIZE;
		cond_resched();
	}
	return 0;
}

static void unpin_pages(struct extlb_range *range)
{
	unsigned long i;

	for (i = 0; i < range->npages; i++) {
		struct page *page = page_of(range->pages[i]);

		unpin_user_pages_dirty_lock(&page, 1,
					    range->pages[i] & PINNED_WRITE);
		if (i % BATCH == 0)
			cond_resched();
	}
	range->npages = 0;
	kvfree(range->pages);
	range->pages = NULL;
}

static void map_pages(struct extlb_range *range)
{
	struct extlb_ctx *ctx = range->ctx;
	unsigned long i;

	for (i = 0; i < range->npages; i++) {
		unsigned long addr = range->start + i * PAGE_SIZE;
		unsigned long entry = range->pages[i];

		/* Only this context's own calls prune, and they hold its lock. */
		spin_lock(&ctx->pt_lock);
		if (!ctx->closing)
			extlb_pt_set(ctx, extlb_pt_leaf(ctx, addr), addr,
				     page_to_pfn(page_of(entry)),
				     entry & PINNED_WRITE);
		spin_unlock(&ctx->pt_lock);
		if (i % BATCH == 0)
			cond_resched();
	}
}

/* Under ctx->lock, by the context's own process, without mmap_lock. */
static int extlb_pin_populate(struct extlb_range *range)
{
	unsigned long npages = PHYS_PFN(range->end - range->start);
	struct extlb_ctx *ctx = range->ctx;
	struct page **batch;
	int ret;

	ret = account(ctx->mm, npages);
	if (ret)
		return ret;
	ret = -ENOMEM;
	range->pages = kvmalloc_array(npages, sizeof(*range->pages),
				      GFP_KERNEL_ACCOUNT);
	batch = kmalloc_array(BATCH, sizeof(*batch), GFP_KERNEL);
	if (range->pages && batch)
		ret = pin_pages(range, batch);
	kfree(batch);
	if (!ret)
		ret = extlb_pt_prepare(ctx, range->start, range->end);
	if (ret) {
		unpin_pages(range);
		atomic64_sub(npages, &ctx->mm->pinned_vm);
		return ret;
	}
	map_pages(range);
	atomic64_add(npages, &ctx->pinned_pages);
	return 0;
}

/* The device has let go of the pages. */
static void extlb_pin_unregister(struct extlb_range *range)
{
	unsigned long npages = range->npages;

	unpin_pages(range);
	atomic64_sub(npages, &range->ctx->mm->pinned_vm);
	atomic64_sub(npages, &range->ctx->pinned_pages);
}

const struct extlb_follow_ops extlb_follow_pinned = {
	.name = "pinned",
	.flag = EXTLB_CREATE_FOLLOW_PINNED,
	.pins = true,
	.populate = extlb_pin_populate,
	.unregister_range = extlb_pin_unregister,
};
