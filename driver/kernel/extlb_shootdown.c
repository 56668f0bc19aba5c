// SPDX-License-Identifier: GPL-2.0
/*
 * Taking pages from the device: leaf, then TLB, then accesses.
 *
 * The leaves are cleared before the invalidation is posted, so a walk that comes
 * after it finds nothing; what was translated before it is drained before the
 * acknowledgment.
 *
 * When the kernel unmaps many pages, the device is asked about all of them at
 * once. Until then they are *begun*: the leaf is clear, the invalidation is not
 * posted. Whoever takes pages from the context meanwhile posts what was begun
 * along with his own.
 *
 * Where no leaf was present and nothing is begun, the device is not asked. That
 * is right because the TLB holds only what was a present leaf at some time since
 * it was last invalidated there: a leaf becomes not present only here (or in a
 * context that is stopped as a whole), and before pt_lock is released its
 * invalidation was posted, or it is among those begun. The device may not have
 * acknowledged that yet, if another CPU has just been here: so the
 * acknowledgment of the context's last invalidation is waited for in any case.
 * If it has come already, that costs one load.
 */
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/timekeeping.h>

#include "extlb.h"
#include "extlb_debug.h"
#include "extlb_trace.h"

static struct extlb_command invalidation(struct extlb_ctx *ctx,
					 unsigned long start, unsigned long end)
{
	return (struct extlb_command) {
		.kind = EXTLB_COMMAND_KIND_INVALIDATE,
		.flags = EXTLB_INVALIDATION_SCOPE_RANGE,
		.context = ctx->index,
		.addr = start,
		.value = end - start,
	};
}

/* Posts an invalidation; whoever comes later waits for it, too. Under pt_lock. */
void extlb_post_invalidation(struct extlb_ctx *ctx, unsigned long start,
			     unsigned long end)
{
	struct extlb_command command = invalidation(ctx, start, end);

	ctx->inval_seq = extlb_iq_post(ctx->dev, &command, 1, true);
}

/* How far a range is from a span; 0 if they touch. */
static unsigned long distance(const struct extlb_span *span,
			      unsigned long start, unsigned long end)
{
	if (end < span->start)
		return span->start - end;
	return start > span->end ? start - span->end : 0;
}

/*
 * Notes what has to be invalidated. If that makes too many spans, one gets wider
 * than it had to be: the device loses translations that it can get again.
 */
static void note_begun(struct extlb_ctx *ctx, const struct extlb_cleared *cleared)
{
	struct extlb_begun *begun = &ctx->begun;
	struct extlb_span *nearest = NULL;
	unsigned long best = ULONG_MAX;
	unsigned int i;

	begun->pages += cleared->pages;
	for (i = 0; i < begun->n; i++) {
		struct extlb_span *span = &begun->spans[i];
		unsigned long far = distance(span, cleared->start, cleared->end);

		if (far < best) {
			best = far;
			nearest = span;
		}
	}
	if (best && begun->n < EXTLB_BEGUN_SPANS) {
		nearest = &begun->spans[begun->n++];
		nearest->start = cleared->start;
		nearest->end = cleared->end;
		return;
	}
	nearest->start = min(nearest->start, cleared->start);
	nearest->end = max(nearest->end, cleared->end);
}

/* Posts what was begun, and tells what that was. Under pt_lock. */
static void post_begun(struct extlb_ctx *ctx, struct extlb_cleared *posted)
{
	struct extlb_command commands[EXTLB_BEGUN_SPANS];
	struct extlb_begun *begun = &ctx->begun;
	unsigned int i;

	*posted = (struct extlb_cleared){ .pages = begun->pages };
	if (!begun->n)
		return;
	posted->start = ULONG_MAX;
	for (i = 0; i < begun->n; i++) {
		struct extlb_span *span = &begun->spans[i];

		commands[i] = invalidation(ctx, span->start, span->end);
		posted->start = min(posted->start, span->start);
		posted->end = max(posted->end, span->end);
	}
	ctx->inval_seq = extlb_iq_post(ctx->dev, commands, begun->n, true);
	extlb_debug_posted(ctx, ctx->inval_seq);
	begun->n = 0;
	begun->pages = 0;
}

/**
 * extlb_shoot_down() - take a range of pages from the device
 * @ctx: the context
 * @start: first address
 * @end: end of the range; ~0UL for everything
 * @may_sleep: whether the caller may
 *
 * When it returns, no leaf of the range is left that was there before, the
 * device's TLB holds nothing of it, and no access to it is under way. The same
 * goes for what was begun before, in the range or elsewhere. Of what is above
 * the addresses of processes nothing is ever taken: pages of the driver.
 */
void extlb_shoot_down(struct extlb_ctx *ctx, unsigned long start,
		      unsigned long end, bool may_sleep)
{
	u64 begin = ktime_get_mono_fast_ns();
	struct extlb_cleared cleared, posted;
	u64 seq;

	spin_lock(&ctx->pt_lock);
	extlb_pt_clear(ctx, start, min(end, TASK_SIZE_MAX), &cleared);
	if (cleared.pages)
		note_begun(ctx, &cleared);
	post_begun(ctx, &posted);
	seq = ctx->inval_seq;
	spin_unlock(&ctx->pt_lock);

	if (!extlb_debug_skip_wait(ctx->dev))
		extlb_iq_wait(ctx->dev, seq, may_sleep);
	extlb_debug_acked(ctx);

	if (posted.pages) {
		u64 ns = ktime_get_mono_fast_ns() - begin;

		atomic64_inc(&ctx->shootdowns);
		atomic64_inc(&ctx->dev->shootdowns);
		atomic64_add(posted.pages, &ctx->shot_pages);
		extlb_histogram_add(&ctx->shootdown_ns, ns);
		extlb_histogram_add(&ctx->dev->shootdown_ns, ns);
		trace_extlb_shootdown(ctx->index, posted.start, posted.end,
				      posted.pages, ns);
	}
}

/**
 * extlb_shoot_down_begin() - begin to take a range of pages from the device
 * @ctx: the context
 * @start: first address
 * @end: end of the range
 *
 * When it returns, no leaf of the range is left. The device may use what it has
 * of it until extlb_shoot_down_end(), or extlb_shoot_down() of anything, returns.
 */
void extlb_shoot_down_begin(struct extlb_ctx *ctx, unsigned long start,
			    unsigned long end)
{
	struct extlb_cleared cleared;

	spin_lock(&ctx->pt_lock);
	extlb_pt_clear(ctx, start, min(end, TASK_SIZE_MAX), &cleared);
	if (cleared.pages)
		note_begun(ctx, &cleared);
	spin_unlock(&ctx->pt_lock);
}

/* Takes from the device what was begun. Does not sleep. */
void extlb_shoot_down_end(struct extlb_ctx *ctx)
{
	/* Nothing more than that. */
	extlb_shoot_down(ctx, 0, 0, false);
}

/**
 * extlb_age() - whether the device has used pages
 * @ctx: the context
 * @start: first address
 * @end: end of the range
 * @clear: from now on they count as not used
 *
 * The device sets the accessed bit of a leaf when it walks to it, not when it
 * uses what its TLB has. So where the bit was cleared the translation has to go,
 * or a page that is used all the time would not look so. Nobody waits for that:
 * the device loses no access. If the queue has no room to spare, the next one
 * who takes pages away sees to it.
 *
 * Return: whether it has used any since the last call with @clear.
 */
bool extlb_age(struct extlb_ctx *ctx, unsigned long start, unsigned long end,
	       bool clear)
{
	struct extlb_command command;
	struct extlb_cleared aged;
	bool young;

	spin_lock(&ctx->pt_lock);
	young = extlb_pt_age(ctx, start, end, clear, &aged);
	if (aged.pages) {
		command = invalidation(ctx, aged.start, aged.end);
		/* None of them is taken away. */
		aged.pages = 0;
		if (!extlb_iq_try_post(ctx->dev, &command))
			note_begun(ctx, &aged);
	}
	spin_unlock(&ctx->pt_lock);
	return young;
}

/* Whether an address may be among those begun. Under pt_lock. */
bool extlb_is_begun(struct extlb_ctx *ctx, unsigned long addr)
{
	unsigned int i;

	for (i = 0; i < ctx->begun.n; i++) {
		if (addr >= ctx->begun.spans[i].start &&
		    addr < ctx->begun.spans[i].end)
			return true;
	}
	return false;
}
