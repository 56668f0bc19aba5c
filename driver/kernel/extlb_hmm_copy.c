// SPDX-License-Identifier: GPL-2.0
/*
 * Reading and writing a process's memory with the device, piece by piece through
 * a bounce buffer.
 *
 * The test driver mirrors the whole address space of its process. Here a range
 * has to be registered, and has to be mapped for that. So what a command touches
 * is registered when it is touched first, by whole mappings, and stays so; what
 * the process unmaps leaves the registration by itself.
 */
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "extlb.h"
#include "extlb_hmm.h"

/* How far ahead of the device pages are mapped, at most, when it asks for one. */
#define FILL_AHEAD	SZ_16M

static bool is_covered(struct extlb_ctx *ctx, unsigned long addr,
		       unsigned long *end)
{
	struct extlb_range *range = extlb_range_find(ctx, addr, end);

	if (range)
		extlb_range_put(range);
	return range;
}

/*
 * The part of a mapping around @addr that is not registered. Return: 0; 1 if
 * nothing is mapped there, and *@end says how far; -EINTR.
 */
static int find_gap(struct extlb_ctx *ctx, unsigned long addr,
		    unsigned long *start, unsigned long *end)
{
	MA_STATE(mas, &ctx->live, addr, addr);
	struct vm_area_struct *vma;
	int ret = mmap_read_lock_killable(ctx->mm);

	if (ret)
		return ret;
	vma = find_vma(ctx->mm, addr);
	ret = !vma || vma->vm_start > addr;
	*start = vma ? vma->vm_start : TASK_SIZE_MAX;
	*end = vma ? min(vma->vm_end, TASK_SIZE_MAX) : TASK_SIZE_MAX;
	mmap_read_unlock(ctx->mm);
	if (ret) {
		*end = *start;
		return 1;
	}

	mtree_lock(&ctx->live);
	if (!mas_walk(&mas)) {
		*start = max(*start, mas.index);
		*end = min(*end - 1, mas.last) + 1;
	}
	mtree_unlock(&ctx->live);
	return 0;
}

/* More than a context may have: of most of them there is nothing left. */
static void forget_all(struct extlb_ctx *ctx)
{
	struct extlb_range *range;
	unsigned long handle;

	xa_for_each(&ctx->ranges, handle, range)
		extlb_range_unregister(ctx, handle);
}

/*
 * Registers what there is in [start, end). What is not mapped, or not fit for
 * registration, is left for the device to find out. Under ctx->lock and dev->sem.
 */
static int cover_locked(struct extlb_ctx *ctx, unsigned long start,
			unsigned long end)
{
	unsigned long addr = start, from, to;
	int ret;

	while (addr < end) {
		struct extlb_register arg = {};

		if (is_covered(ctx, addr, &to)) {
			addr = to;
			continue;
		}
		ret = find_gap(ctx, addr, &from, &to);
		if (ret < 0)
			return ret;
		if (!ret) {
			arg.addr = from;
			arg.len = to - from;
			ret = extlb_range_register(ctx, &arg);
			if (ret == -ENOSPC) {
				forget_all(ctx);
				addr = start;
				continue;
			}
			if (ret == -EINTR || ret == -ENOMEM)
				return ret;
		}
		addr = to;
	}
	return 0;
}

static int cover(struct extlb_ctx *ctx, unsigned long start, unsigned long end)
{
	struct extlb_dev *dev = ctx->dev;
	int ret = down_read_killable(&dev->sem);

	if (ret)
		return ret;
	ret = mutex_lock_killable(&ctx->lock);
	if (ret)
		goto up;
	ret = -EIO;
	if (!dev->removed && ctx->state == EXTLB_CTX_LIVE)
		ret = cover_locked(ctx, start, end);
	mutex_unlock(&ctx->lock);
up:
	up_read(&dev->sem);
	return ret;
}

/* Why the device did not get a page, as the test driver says it. */
static int refusal(struct mm_struct *mm, const struct extlb_completion *record)
{
	struct vm_area_struct *vma;
	int ret = mmap_read_lock_killable(mm);

	if (ret)
		return ret;
	ret = -EFAULT;
	vma = vma_lookup(mm, record->fault_addr);
	if (vma && (vma->vm_flags & VM_READ) && !(vma->vm_flags & VM_WRITE) &&
	    (record->fault & EXTLB_FAULT_WRITE))
		ret = -EPERM;
	mmap_read_unlock(mm);
	return ret;
}

/* Copies between [start, end) of the process and the bounce buffer. */
static int copy_piece(struct extlb_hmm_file *hmm, unsigned long start,
		      unsigned long end, bool write)
{
	u64 bounce = extlb_hmm_bounce_iova();
	struct extlb_ctx *ctx = hmm->ctx;
	struct extlb_completion record;
	unsigned long addr = start, limit;
	int ret;

	for (;;) {
		u64 mine = bounce + (addr - start);

		/* Another thread may map and unmap the same all the time. */
		if (fatal_signal_pending(current))
			return -EINTR;
		ret = cover(ctx, addr, end);
		if (ret)
			return ret;
		ret = extlb_hmm_run(hmm, write ? mine : addr,
				    write ? addr : mine, end - addr, &record);
		if (ret)
			return ret;
		if (record.status == EXTLB_STATUS_SUCCESS)
			return 0;
		/* What the device says is not trusted: least of all an address. */
		if (record.status != EXTLB_STATUS_PAGE_FAULT ||
		    record.bytes > end - addr ||
		    record.fault_addr < addr || record.fault_addr >= end)
			return -EIO;
		addr += record.bytes;

		/*
		 * Refused though it is registered, or not mapped at all: that is
		 * the answer. But the process may have mapped something anew
		 * since it was registered; then once more.
		 */
		if (is_covered(ctx, record.fault_addr, &limit))
			return refusal(ctx->mm, &record);
		ret = cover(ctx, record.fault_addr, record.fault_addr + 1);
		if (ret)
			return ret;
		if (!is_covered(ctx, record.fault_addr, &limit))
			return refusal(ctx->mm, &record);
	}
}

/**
 * extlb_hmm_copy() - let the device read or write memory of the process
 * @hmm: the file; its lock is held
 * @cmd: what to copy
 * @write: the device writes what is at cmd->ptr; else it reads, to there
 *
 * Return: 0; -EFAULT if something is not mapped or not readable, -EPERM if it is
 * not writable, -EINTR, -EIO.
 */
int extlb_hmm_copy(struct extlb_hmm_file *hmm, struct extlb_hmm_cmd *cmd,
		   bool write)
{
	unsigned long addr = cmd->addr, end = addr + (cmd->npages << PAGE_SHIFT);
	void __user *user = u64_to_user_ptr(cmd->ptr);
	u8 *bounce = hmm->shared->bounce;
	struct extlb_ctx *ctx = hmm->ctx;
	s64 before = atomic64_read(&ctx->page_requests);
	int ret = 0;

	for (; addr < end && !ret; user += EXTLB_HMM_BOUNCE) {
		unsigned long next = min(end, addr + EXTLB_HMM_BOUNCE);
		unsigned long len = next - addr;

		/* Whose page the device asks for first gets the rest as well. */
		WRITE_ONCE(ctx->fill_ahead, min(end, addr + FILL_AHEAD));
		if (write && copy_from_user(bounce, user, len))
			ret = -EFAULT;
		ret = ret ?: copy_piece(hmm, addr, next, write);
		if (!ret && !write && copy_to_user(user, bounce, len))
			ret = -EFAULT;
		if (!ret)
			cmd->cpages += PHYS_PFN(len);
		addr = next;
	}
	WRITE_ONCE(ctx->fill_ahead, 0);
	/* Each was counted before it was answered, and all are answered. */
	cmd->faults = atomic64_read(&ctx->page_requests) - before;
	return ret;
}
