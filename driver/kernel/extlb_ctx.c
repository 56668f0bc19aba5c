// SPDX-License-Identifier: GPL-2.0
/*
 * Contexts: made by CREATE, stopped when the process ends, closed when the file
 * is closed or the device goes away; in any order.
 *
 *	stop	the device is silent for the context: its entry is invalid, the
 *		device has acknowledged that, and no page is mapped. Comes from
 *		the memory manager when the address space goes, and from close.
 *	close	stop; then registrations, work, the number of the context and
 *		the page table are given back. What remains is memory that open
 *		files and mappings hold.
 */
#include <linux/gfp.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "extlb.h"
#include "extlb_debug.h"

static bool oracle = true;
module_param(oracle, bool, 0444);
MODULE_PARM_DESC(oracle,
		 "Tell the device the process's page table, so that it can check its translations (default on)");

/* Of an open file; there is no context yet. */
static struct extlb_ctx *new_ctx(struct extlb_dev *dev)
{
	struct extlb_ctx *ctx = kvzalloc(sizeof(*ctx), GFP_KERNEL_ACCOUNT);

	if (!ctx)
		return NULL;
	kref_init(&ctx->ref);
	kref_get(&dev->ref);
	ctx->dev = dev;
	INIT_LIST_HEAD(&ctx->node);
	mutex_init(&ctx->lock);
	mutex_init(&ctx->stop_lock);
	spin_lock_init(&ctx->pt_lock);
	INIT_LIST_HEAD(&ctx->fills);
	extlb_debug_init(ctx);
	mt_init(&ctx->live);
	xa_init_flags(&ctx->ranges, XA_FLAGS_ALLOC1);
	spin_lock_init(&ctx->fault_lock);
	INIT_WORK(&ctx->fault_work, extlb_fault_work);
	init_waitqueue_head(&ctx->wait);
	return ctx;
}

static void free_pages_of(struct extlb_ctx *ctx)
{
	free_page((unsigned long)ctx->shadow);
	free_page((unsigned long)ctx->no_doorbell);
	ctx->shadow = NULL;
	ctx->no_doorbell = NULL;
}

static void free_ctx(struct kref *ref)
{
	struct extlb_ctx *ctx = container_of(ref, struct extlb_ctx, ref);

	/* Closed, so the device is done with the shadow page. */
	free_pages_of(ctx);
	if (ctx->mm)
		mmdrop(ctx->mm);
	put_pid(ctx->owner);
	extlb_dev_put(ctx->dev);
	kvfree(ctx);
}

void extlb_ctx_put(struct extlb_ctx *ctx)
{
	kref_put(&ctx->ref, free_ctx);
}

/* The context with a number; NULL if there is none, or it is being set up. */
struct extlb_ctx *extlb_ctx_get(struct extlb_dev *dev, u32 index)
{
	struct extlb_ctx *ctx = NULL;

	spin_lock(&dev->ctx_lock);
	if (index < dev->contexts)
		ctx = dev->ctx[index];
	/* Pairs with extlb_ctx_create(). */
	if (ctx && smp_load_acquire(&ctx->state) == EXTLB_CTX_LIVE)
		kref_get(&ctx->ref);
	else
		ctx = NULL;
	spin_unlock(&dev->ctx_lock);
	return ctx;
}

static int take_index(struct extlb_ctx *ctx)
{
	struct extlb_dev *dev = ctx->dev;
	u32 i;

	spin_lock(&dev->ctx_lock);
	for (i = 0; i < dev->contexts && dev->ctx[i]; i++)
		;
	if (i < dev->contexts) {
		dev->ctx[i] = ctx;
		ctx->index = i;
	}
	spin_unlock(&dev->ctx_lock);
	return i < dev->contexts ? 0 : -EBUSY;
}

static void give_index(struct extlb_ctx *ctx)
{
	spin_lock(&ctx->dev->ctx_lock);
	ctx->dev->ctx[ctx->index] = NULL;
	spin_unlock(&ctx->dev->ctx_lock);
}

/* Makes the device read the entry again, and waits until it did. */
static void sync_entry(struct extlb_ctx *ctx)
{
	struct extlb_command command = {
		.kind = EXTLB_COMMAND_KIND_CONTEXT_SYNC,
		.context = ctx->index,
	};

	extlb_iq_wait(ctx->dev, extlb_iq_post(ctx->dev, &command, 1, true), true);
}

static void write_entry(struct extlb_ctx *ctx, const struct extlb_create *arg)
{
	struct extlb_context_entry *entry = &ctx->dev->table[ctx->index];
	u64 flags = EXTLB_CONTEXT_VALID;

	/*
	 * The oracle reads four levels, as x86-64 has them. Pinned pages stay
	 * with the device whatever becomes of the process's ptes: there a
	 * difference means nothing. The root lives as long as mm_count is held;
	 * the tables below go after the context was stopped.
	 */
	if (IS_ENABLED(CONFIG_X86_64) && !pgtable_l5_enabled() && oracle &&
	    !ctx->follow->pins && (ctx->dev->cap & EXTLB_CAP_ORACLE)) {
		flags |= EXTLB_CONTEXT_ORACLE;
		entry->cpu_page_table = virt_to_phys(ctx->mm->pgd);
	}
	entry->page_table = virt_to_phys(ctx->root);
	entry->ring = arg->ring;
	entry->ring_log2 = arg->ring_log2;
	entry->credits = EXTLB_CREDITS;
	entry->shadow = virt_to_phys(ctx->shadow);
	entry->flags = flags;
}

static int check_create(const struct extlb_create *arg)
{
	u64 bytes;

	if (arg->reserved0 || arg->reserved1)
		return -EINVAL;
	if (arg->flags & ~(EXTLB_CREATE_FOLLOW_PTE | EXTLB_CREATE_FOLLOW_PINNED |
			   EXTLB_CREATE_FOLLOW_MMU | EXTLB_CREATE_FOLLOW_INTERVAL))
		return -EINVAL;
	if (hweight32(arg->flags) > 1)
		return -EINVAL;
	if (arg->flags & ~extlb_follow_flags())
		return -EOPNOTSUPP;
	if (arg->ring_log2 < EXTLB_WORK_RING_LOG2_MIN ||
	    arg->ring_log2 > EXTLB_WORK_RING_LOG2_MAX)
		return -EINVAL;
	bytes = sizeof(struct extlb_descriptor) << arg->ring_log2;
	if (!PAGE_ALIGNED(arg->ring) || arg->ring >= EXTLB_IOVA_END ||
	    bytes > EXTLB_IOVA_END - arg->ring)
		return -EINVAL;
	return 0;
}

/* The pages that programs map. They live as long as the file. */
static int alloc_pages_of(struct extlb_ctx *ctx)
{
	ctx->shadow = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	ctx->no_doorbell = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	return ctx->shadow && ctx->no_doorbell ? 0 : -ENOMEM;
}

/* Makes an open file a context. Under ctx->lock and dev->sem. */
int extlb_ctx_create(struct extlb_ctx *ctx, struct extlb_create *arg)
{
	int ret = check_create(arg);

	if (ret)
		return ret;
	if (ctx->state != EXTLB_CTX_NEW)
		return -EBUSY;

	ret = extlb_pt_init(ctx);
	if (ret)
		return ret;
	ret = alloc_pages_of(ctx) ?: take_index(ctx);
	if (ret)
		goto free;

	ctx->follow = arg->flags ? extlb_follow_by_flag(arg->flags) :
				   extlb_follow_default();
	mmgrab(current->mm);
	ctx->mm = current->mm;
	ctx->owner = get_pid(task_tgid(current));
	if (ctx->follow->attach) {
		ret = ctx->follow->attach(ctx);
		if (ret)
			goto drop_mm;
	}
	/* The device has not looked yet: the first doorbell must be rung. */
	ctx->shadow->need_kick = 1;
	write_entry(ctx, arg);
	/* Pairs with acquire in extlb_dev.c: all of the above is set up. */
	smp_store_release(&ctx->state, EXTLB_CTX_LIVE);
	sync_entry(ctx);
	arg->context = ctx->index;
	return 0;

drop_mm:
	put_pid(ctx->owner);
	ctx->owner = NULL;
	mmdrop(ctx->mm);
	ctx->mm = NULL;
	give_index(ctx);
free:
	free_pages_of(ctx);
	extlb_pt_free(ctx);
	return ret;
}

/**
 * extlb_ctx_stop() - make the device silent for a context
 * @ctx: the context
 *
 * When it returns, no access of the device for this context is under way and
 * none will come, and its page table maps nothing. May be called again, and by
 * several at once: each returns when that is so. Must not take a lock that is
 * held while a notifier is unregistered.
 */
void extlb_ctx_stop(struct extlb_ctx *ctx)
{
	struct extlb_cleared cleared;

	mutex_lock(&ctx->stop_lock);
	if (!ctx->stopped) {
		spin_lock(&ctx->pt_lock);
		ctx->closing = true;
		spin_unlock(&ctx->pt_lock);

		/*
		 * Not the fields that it would read if it were valid: all the
		 * device needs to know is that it is not.
		 */
		WRITE_ONCE(ctx->dev->table[ctx->index].flags, 0);
		sync_entry(ctx);

		/*
		 * Nothing walks the table any more. A clear() that comes while
		 * the device was being stopped did its own work.
		 */
		spin_lock(&ctx->pt_lock);
		extlb_pt_clear(ctx, 0, EXTLB_IOVA_END, &cleared);
		ctx->begun = (struct extlb_begun){};
		extlb_debug_silent(ctx);
		spin_unlock(&ctx->pt_lock);
		ctx->stopped = true;
	}
	mutex_unlock(&ctx->stop_lock);
	wake_up_all(&ctx->wait);
}

/**
 * extlb_ctx_flush() - a process that has the file is ending
 * @ctx: the context
 *
 * While a fault is served, the address space of the process is in use. It must
 * not stay so beyond the process: if memory is short and the process is killed
 * for that, the killer waits for its memory as long as there is the process, and
 * then kills somebody else. So the owner waits here. The open file would be too
 * late: the mapping of the doorbell is a reference to it.
 */
void extlb_ctx_flush(struct extlb_ctx *ctx)
{
	struct extlb_dev *dev = ctx->dev;

	down_read(&dev->sem);
	mutex_lock(&ctx->lock);
	if (ctx->state == EXTLB_CTX_LIVE && ctx->owner == task_tgid(current)) {
		extlb_ctx_stop(ctx);
		/* Ends fills, too. */
		extlb_range_unregister_all(ctx);
		flush_work(&ctx->fault_work);
	}
	mutex_unlock(&ctx->lock);
	up_read(&dev->sem);
}

/* Gives back all that the context has. Under dev->sem; takes ctx->lock. */
void extlb_ctx_close(struct extlb_ctx *ctx)
{
	mutex_lock(&ctx->lock);
	if (ctx->state == EXTLB_CTX_LIVE) {
		extlb_ctx_stop(ctx);
		extlb_range_unregister_all(ctx);
		if (ctx->follow->detach)
			ctx->follow->detach(ctx);

		/*
		 * A stopped context sends no page requests, but some may be in
		 * the ring. They have to be out of there before the number
		 * names somebody else: a refusal would hit an operation of his.
		 */
		extlb_prq_consume(ctx->dev);
		if (cancel_work_sync(&ctx->fault_work))
			extlb_ctx_put(ctx);
		memset(&ctx->dev->table[ctx->index], 0,
		       sizeof(struct extlb_context_entry));
		give_index(ctx);
		extlb_pt_free(ctx);
	}
	/* As in extlb_ctx_create(); what is closed here was stopped before. */
	smp_store_release(&ctx->state, EXTLB_CTX_CLOSED);
	mutex_unlock(&ctx->lock);
	wake_up_all(&ctx->wait);
}

/* For a file that is being opened; NULL without memory. */
struct extlb_ctx *extlb_ctx_open(struct extlb_dev *dev,
				 struct address_space *mapping)
{
	struct extlb_ctx *ctx = new_ctx(dev);

	if (!ctx)
		return NULL;
	ctx->mapping = mapping;
	spin_lock(&dev->ctx_lock);
	list_add(&ctx->node, &dev->files);
	spin_unlock(&dev->ctx_lock);
	extlb_watchdog_start(dev);
	return ctx;
}

/* The file is being closed. */
void extlb_ctx_release(struct extlb_ctx *ctx)
{
	struct extlb_dev *dev = ctx->dev;

	down_read(&dev->sem);
	extlb_ctx_close(ctx);
	spin_lock(&dev->ctx_lock);
	list_del_init(&ctx->node);
	spin_unlock(&dev->ctx_lock);
	up_read(&dev->sem);
	extlb_ctx_put(ctx);
}

/* Nothing more comes from the device for this context. */
bool extlb_ctx_is_over(struct extlb_ctx *ctx)
{
	/* As in extlb_ctx_close(). */
	return smp_load_acquire(&ctx->state) == EXTLB_CTX_CLOSED ||
	       READ_ONCE(ctx->error) || READ_ONCE(ctx->closing) ||
	       extlb_is_dead(ctx->dev);
}

/* The device stopped the context for an error. */
void extlb_ctx_error(struct extlb_ctx *ctx, u32 code)
{
	WRITE_ONCE(ctx->error, code ?: EXTLB_CONTEXT_ERROR_BAD_ENTRY);
	wake_up_all(&ctx->wait);
}
