// SPDX-License-Identifier: GPL-2.0
/*
 * Registrations: the ranges of addresses that a context may use.
 *
 * A registration has a handle, for the program, and lives in a tree by address,
 * for page requests. The tree shows what it covers now: parts that the process
 * has unmapped are gone from it, and can be registered anew.
 */
#include <linux/mm.h>
#include <linux/slab.h>

#include "extlb.h"

static void free_range(struct kref *ref)
{
	kfree(container_of(ref, struct extlb_range, ref));
}

void extlb_range_put(struct extlb_range *range)
{
	kref_put(&range->ref, free_range);
}

/**
 * extlb_range_find() - the registration that covers an address
 * @ctx: the context
 * @addr: the address
 * @end: returns the end of the covered piece
 *
 * Return: it, with a reference; or NULL.
 */
struct extlb_range *extlb_range_find(struct extlb_ctx *ctx, unsigned long addr,
				     unsigned long *end)
{
	MA_STATE(mas, &ctx->live, addr, addr);
	struct extlb_range *range;

	mtree_lock(&ctx->live);
	range = mas_walk(&mas);
	if (range) {
		kref_get(&range->ref);
		*end = mas.last + 1;
	}
	mtree_unlock(&ctx->live);
	return range;
}

/**
 * extlb_range_forget() - a part of a registration does not exist any more
 * @range: the registration
 * @start: start of the part
 * @end: end of the part
 *
 * Leaves alone what others have registered there since. May sleep. Must not
 * fail: what is freed later must not be found in the tree any more. To take
 * something out needs memory only if the tree has to be balanced.
 */
void extlb_range_forget(struct extlb_range *range, unsigned long start,
			unsigned long end)
{
	struct maple_tree *live = &range->ctx->live;
	struct extlb_range *found;

	MA_STATE(mas, live, start, start);

	mtree_lock(live);
	mas_for_each(&mas, found, end - 1) {
		if (found != range)
			continue;
		mas_set_range(&mas, max(mas.index, start),
			      min(mas.last, end - 1));
		mas_store_gfp(&mas, NULL,
			      GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);
	}
	mtree_unlock(live);
}

static int check_register(const struct extlb_register *arg)
{
	if (arg->flags || arg->reserved0)
		return -EINVAL;
	if (!arg->len || !PAGE_ALIGNED(arg->addr) || !PAGE_ALIGNED(arg->len))
		return -EINVAL;
	if (arg->addr >= EXTLB_IOVA_END ||
	    arg->len > EXTLB_IOVA_END - arg->addr ||
	    arg->addr + arg->len > TASK_SIZE_MAX)
		return -EINVAL;
	return 0;
}

static bool overlaps(struct extlb_ctx *ctx, unsigned long start,
		     unsigned long end)
{
	unsigned long index = start;

	return mt_find(&ctx->live, &index, end - 1);
}

/*
 * With the memory manager, for notifiers, and then into the tree, where page
 * requests find it; under mmap_lock both, so that nothing is unmapped between.
 */
static int register_locked(struct extlb_range *range)
{
	const struct extlb_follow_ops *follow = range->ctx->follow;
	struct maple_tree *live = &range->ctx->live;
	int ret;

	if (overlaps(range->ctx, range->start, range->end))
		return -EEXIST;
	if (follow->register_range) {
		ret = follow->register_range(range);
		if (ret)
			return ret;
	}
	ret = mtree_insert_range(live, range->start, range->end - 1, range,
				 GFP_KERNEL_ACCOUNT);
	if (ret && follow->register_range)
		follow->unregister_range(range);
	return ret;
}

/* Under ctx->lock, dev->sem, of a live context, by its own process. */
int extlb_range_register(struct extlb_ctx *ctx, struct extlb_register *arg)
{
	struct extlb_range *range;
	int ret = check_register(arg);

	if (ret)
		return ret;
	range = kzalloc(sizeof(*range), GFP_KERNEL_ACCOUNT);
	if (!range)
		return -ENOMEM;
	kref_init(&range->ref);
	range->ctx = ctx;
	range->start = arg->addr;
	range->end = arg->addr + arg->len;

	ret = xa_alloc(&ctx->ranges, &range->handle, range,
		       XA_LIMIT(1, EXTLB_MAX_RANGES), GFP_KERNEL_ACCOUNT);
	if (ret) {
		/* All handles are taken. */
		ret = ret == -EBUSY ? -ENOSPC : ret;
		goto free;
	}

	ret = mmap_write_lock_killable(ctx->mm);
	if (ret)
		goto erase;
	ret = register_locked(range);
	mmap_write_unlock(ctx->mm);
	if (ret)
		goto erase;

	if (ctx->follow->populate)
		ret = ctx->follow->populate(range);
	if (ret) {
		extlb_range_forget(range, range->start, range->end);
		goto erase;
	}
	arg->handle = range->handle;
	return 0;

erase:
	xa_erase(&ctx->ranges, range->handle);
free:
	extlb_range_put(range);
	return ret;
}

static void unregister(struct extlb_range *range)
{
	struct extlb_ctx *ctx = range->ctx;

	/*
	 * From here on nothing is installed. Only then the leaves are cleared,
	 * and only when the device has let go of the pages the memory manager
	 * is told to forget us: there are no calls of clear() after that.
	 */
	spin_lock(&ctx->pt_lock);
	range->closing = true;
	spin_unlock(&ctx->pt_lock);
	extlb_range_forget(range, range->start, range->end);
	extlb_shoot_down(ctx, range->start, range->end, true);

	ctx->follow->unregister_range(range);
	xa_erase(&ctx->ranges, range->handle);
	extlb_range_put(range);
}

/* Under ctx->lock. */
int extlb_range_unregister(struct extlb_ctx *ctx, u32 handle)
{
	struct extlb_range *range = xa_load(&ctx->ranges, handle);
	unsigned long start, end;

	if (!range)
		return -ENOENT;
	start = range->start;
	end = range->end;
	unregister(range);
	extlb_pt_prune(ctx, start, end);
	return 0;
}

/* All of a context that is stopped. Under ctx->lock. */
void extlb_range_unregister_all(struct extlb_ctx *ctx)
{
	struct extlb_range *range;
	unsigned long handle;

	xa_for_each(&ctx->ranges, handle, range)
		unregister(range);
	xa_destroy(&ctx->ranges);
	mtree_destroy(&ctx->live);
}
