// SPDX-License-Identifier: GPL-2.0
/*
 * A context whose work queue is the driver's own. Ring, completion record and
 * bounce buffer are pages of the driver, mapped for the device at addresses above
 * all that processes have: no notifier comes for them, and they stay until the
 * context was closed.
 *
 * One operation is under way at a time, so one record will do.
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>

#include "extlb.h"
#include "extlb_hmm.h"

#define IOVA_OF(field) \
	(EXTLB_KERNEL_IOVA + offsetof(struct extlb_hmm_shared, field))

u64 extlb_hmm_bounce_iova(void)
{
	return IOVA_OF(bounce);
}

/* The device has not been told of the context's ring yet, or has an empty one. */
static int map_shared(struct extlb_hmm_file *hmm)
{
	unsigned long size = PAGE_ALIGN(sizeof(*hmm->shared)), at;
	struct extlb_ctx *ctx = hmm->ctx;
	int ret = extlb_pt_prepare(ctx, EXTLB_KERNEL_IOVA,
				   EXTLB_KERNEL_IOVA + size);

	if (ret)
		return ret;
	for (at = 0; at < size; at += PAGE_SIZE) {
		unsigned long pfn = vmalloc_to_pfn((void *)hmm->shared + at);
		u64 *leaf;

		spin_lock(&ctx->pt_lock);
		/* Nothing is registered yet, so nothing has been pruned. */
		leaf = extlb_pt_leaf(ctx, EXTLB_KERNEL_IOVA + at);
		if (leaf && !ctx->closing)
			extlb_pt_set(ctx, leaf, EXTLB_KERNEL_IOVA + at, pfn,
				     true);
		else
			ret = -ENXIO;
		spin_unlock(&ctx->pt_lock);
	}
	return ret;
}

/*
 * Makes the context, for the current process. Under dev->sem. What was made
 * before an error is given back by extlb_ctx_release(), which must come first,
 * and extlb_hmm_queue_free().
 */
int extlb_hmm_queue_init(struct extlb_hmm_file *hmm)
{
	struct extlb_create arg = {
		.ring = IOVA_OF(ring),
		.ring_log2 = ilog2(ARRAY_SIZE(hmm->shared->ring)),
	};
	struct extlb_ctx *ctx = hmm->ctx;
	int ret;

	hmm->shared = __vmalloc(PAGE_ALIGN(sizeof(*hmm->shared)),
				GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!hmm->shared)
		return -ENOMEM;

	mutex_lock(&ctx->lock);
	ret = extlb_ctx_create(ctx, &arg) ?: map_shared(hmm);
	mutex_unlock(&ctx->lock);
	if (ret)
		return ret;

	hmm->doorbell = ioremap(ctx->dev->doorbells +
				ctx->index * EXTLB_DOORBELL_STRIDE,
				EXTLB_DOORBELL_STRIDE);
	return hmm->doorbell ? 0 : -ENOMEM;
}

/* The context is closed. */
void extlb_hmm_queue_free(struct extlb_hmm_file *hmm)
{
	if (hmm->doorbell)
		iounmap(hmm->doorbell);
	vfree(hmm->shared);
}

static void submit(struct extlb_hmm_file *hmm, u64 src, u64 dst, u64 len)
{
	struct extlb_context_shadow *shadow = hmm->ctx->shadow;
	struct extlb_hmm_shared *shared = hmm->shared;

	memset(&shared->record, 0, sizeof(shared->record));
	/*
	 * The operation before has ended, so the one before that is retired, and
	 * its slot, which is this one, is free.
	 */
	shared->ring[hmm->tail % ARRAY_SIZE(shared->ring)] = (struct extlb_descriptor) {
		.opcode = EXTLB_OPCODE_COPY,
		.flags = EXTLB_WORK_INTERRUPT,
		.src = src,
		.dst = dst,
		.len = len,
		.completion = IOVA_OF(record),
	};
	/* Record and descriptor before the tail. */
	dma_wmb();
	WRITE_ONCE(shadow->tail, ++hmm->tail);
	/* The handshake of the shadow page, see extlb_kick(). */
	mb();
	if (READ_ONCE(shadow->need_kick))
		writel(1, hmm->doorbell);
}

static bool has_ended(struct extlb_hmm_file *hmm)
{
	/* Acquire: with it the rest of the record, and the data. */
	return smp_load_acquire(&hmm->shared->record.status);
}

/*
 * Nobody waits for the operation any more, so its buffer must not be used again:
 * the context is over. Who was killed has no use for it.
 */
static void abandon(struct extlb_hmm_file *hmm)
{
	struct extlb_dev *dev = hmm->ctx->dev;

	down_read(&dev->sem);
	extlb_ctx_stop(hmm->ctx);
	up_read(&dev->sem);
}

/**
 * extlb_hmm_run() - let the device copy, and wait for it
 * @hmm: the file; its lock is held
 * @src: from here
 * @dst: to here
 * @len: bytes
 * @record: returns the completion record
 *
 * No other lock is held while waiting: the operation may need pages that take
 * long to come, and the device may be removed meanwhile.
 *
 * Return: 0 if the operation has ended, well or not; -EINTR if the caller is
 * being killed; -EIO if the context is over.
 */
int extlb_hmm_run(struct extlb_hmm_file *hmm, u64 src, u64 dst, u64 len,
		  struct extlb_completion *record)
{
	struct extlb_ctx *ctx = hmm->ctx;
	struct extlb_dev *dev = ctx->dev;
	int ret = down_read_killable(&dev->sem);

	if (ret)
		return ret;
	if (dev->removed || extlb_ctx_is_over(ctx)) {
		up_read(&dev->sem);
		return -EIO;
	}
	submit(hmm, src, dst, len);
	up_read(&dev->sem);

	ret = wait_event_killable(ctx->wait,
				  has_ended(hmm) || extlb_ctx_is_over(ctx));
	if (ret) {
		abandon(hmm);
		return -EINTR;
	}
	if (!has_ended(hmm))
		return -EIO;
	*record = hmm->shared->record;
	return 0;
}
