// SPDX-License-Identifier: GPL-2.0
/*
 * Page requests: the device asks for a page, software maps it and responds.
 *
 * The ring is emptied in one go, into a queue of each context; each context's
 * queue is served by a work item of its own, so that a fault which takes long
 * (swap, a file, userfaultfd) delays nobody else. Nothing that comes from the
 * device is trusted: numbers are checked, and what makes no sense is refused or
 * dropped.
 */
#include <linux/delay.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>

#include "extlb.h"
#include "extlb_trace.h"

/* Tries for which a request waits for memory, and ms between them. */
#define NOMEM_TRIES	20
#define NOMEM_WAIT_MS	50

static void respond(struct extlb_ctx *ctx, const struct extlb_page_request *request,
		    u32 response)
{
	struct extlb_command command = {
		.kind = EXTLB_COMMAND_KIND_PAGE_RESPONSE,
		.flags = response,
		.context = ctx->index,
		.group = request->group,
	};

	atomic64_inc(response == EXTLB_RESPONSE_SUCCESS ? &ctx->page_requests :
							  &ctx->refused_requests);
	trace_extlb_page_response(ctx->index, request->group, response);
	/* After the leaves: extlb_iq_post() orders them. */
	extlb_iq_post(ctx->dev, &command, 1, false);
}

static bool is_closing(struct extlb_ctx *ctx)
{
	return READ_ONCE(ctx->closing) || extlb_is_dead(ctx->dev);
}

/* Maps what is asked for. Return: 0 or an errno. */
static int map_request(struct extlb_ctx *ctx,
		       const struct extlb_page_request *request)
{
	unsigned long start = request->iova, end, limit;
	unsigned int tries = 0, nomem = 0;
	struct extlb_range *range;
	int ret;

	for (;;) {
		if (is_closing(ctx))
			return -ENXIO;
		range = extlb_range_find(ctx, start, &limit);
		if (!range)
			return -ENXIO;
		end = max(start + request->pages * PAGE_SIZE,
			  READ_ONCE(ctx->fill_ahead));
		end = min(end, limit);
		ret = ctx->follow->fill(range, start, end,
					request->flags & EXTLB_REQUEST_WRITE);
		extlb_range_put(range);

		switch (ret) {
		case -ENOMEM:
			if (++nomem == NOMEM_TRIES)
				return ret;
			msleep(NOMEM_WAIT_MS);
			break;
		case -EAGAIN:
		case -EINTR:
		case -ESTALE:
			/* Somebody changes the same addresses all the time. */
			if (++tries % 16 == 0)
				usleep_range(50, 100);
			break;
		default:
			return ret;
		}
		cond_resched();
	}
}

static void serve(struct extlb_ctx *ctx, const struct extlb_page_request *request)
{
	struct mem_cgroup *memcg, *old;
	int ret = -ENXIO;

	if (is_closing(ctx))
		return;
	if (!ctx->follow->pins && mmget_not_zero(ctx->mm)) {
		/* Page tables are charged to the process, as its own are. */
		memcg = get_mem_cgroup_from_mm(ctx->mm);
		old = set_active_memcg(memcg);
		ret = map_request(ctx, request);
		set_active_memcg(old);
		mem_cgroup_put(memcg);
		/*
		 * Perhaps the last user, with all of exit_mmap() to do. Not
		 * later: extlb_ctx_flush() waits for it.
		 */
		mmput(ctx->mm);
	}
	/* Nobody waits for a response in a context that was stopped. */
	if (is_closing(ctx))
		return;
	respond(ctx, request, !ret ? EXTLB_RESPONSE_SUCCESS :
		ret == -ENOMEM ? EXTLB_RESPONSE_FAILURE : EXTLB_RESPONSE_INVALID);
}

static bool take_request(struct extlb_ctx *ctx, struct extlb_page_request *request)
{
	bool any;

	spin_lock(&ctx->fault_lock);
	any = ctx->fault_head != ctx->fault_tail;
	if (any)
		*request = ctx->faults[ctx->fault_head++ % EXTLB_CREDITS];
	spin_unlock(&ctx->fault_lock);
	return any;
}

/* Serves the requests of one context. Has a reference to it. */
void extlb_fault_work(struct work_struct *work)
{
	struct extlb_ctx *ctx = container_of(work, struct extlb_ctx, fault_work);
	struct extlb_page_request request;

	while (take_request(ctx, &request))
		serve(ctx, &request);
	extlb_ctx_put(ctx);
}

static bool is_valid(const struct extlb_page_request *request)
{
	return request->iova < EXTLB_IOVA_END && PAGE_ALIGNED(request->iova) &&
	       request->pages >= 1 && request->pages <= EXTLB_REQUEST_PAGES_MAX &&
	       !(request->flags & ~EXTLB_REQUEST_WRITE);
}

/* False: more requests wait than the context has credits. */
static bool queue_request(struct extlb_ctx *ctx,
			  const struct extlb_page_request *request)
{
	bool room;

	spin_lock(&ctx->fault_lock);
	room = ctx->fault_tail - ctx->fault_head < EXTLB_CREDITS;
	if (room)
		ctx->faults[ctx->fault_tail++ % EXTLB_CREDITS] = *request;
	spin_unlock(&ctx->fault_lock);
	if (!room)
		return false;

	kref_get(&ctx->ref);
	if (!queue_work(ctx->dev->wq, &ctx->fault_work))
		extlb_ctx_put(ctx);
	return true;
}

static void dispatch(struct extlb_dev *dev,
		     const struct extlb_page_request *request)
{
	struct extlb_ctx *ctx = extlb_ctx_get(dev, request->context);

	/* Of a context that has been stopped meanwhile, most likely. */
	if (!ctx)
		return;

	switch (request->kind) {
	case EXTLB_REQUEST_KIND_PAGE:
		trace_extlb_page_request(ctx->index, request);
		if (!is_valid(request) || !queue_request(ctx, request)) {
			dev_warn_ratelimited(&dev->pdev->dev,
					     "context %u: page request makes no sense: iova %#llx, %u pages, flags %#x\n",
					     ctx->index, request->iova,
					     request->pages, request->flags);
			respond(ctx, request, EXTLB_RESPONSE_INVALID);
		}
		break;
	case EXTLB_REQUEST_KIND_CONTEXT_ERROR:
		dev_dbg(&dev->pdev->dev, "context %u: error %u at %#llx\n",
			ctx->index, request->code, request->iova);
		extlb_ctx_error(ctx, request->code);
		break;
	default:
		dev_warn_ratelimited(&dev->pdev->dev,
				     "record of unknown kind %u in the page request ring\n",
				     request->kind);
	}
	extlb_ctx_put(ctx);
}

/**
 * extlb_prq_consume() - take all records out of the page request ring
 * @dev: the device
 *
 * When it returns, all that were there when it was called have been handed to
 * their contexts.
 */
void extlb_prq_consume(struct extlb_dev *dev)
{
	struct extlb_prq *prq = &dev->prq;
	u32 tail;

	mutex_lock(&prq->lock);
	while (!extlb_is_dead(dev)) {
		/* Pairs with the device: records before the tail. */
		tail = smp_load_acquire(&dev->shadow->prq_tail);
		if (tail == prq->head)
			break;
		if (tail - prq->head > prq->entries) {
			extlb_fence(dev, "tail of the page request ring makes no sense");
			break;
		}
		while (prq->head != tail) {
			struct extlb_page_request request =
				prq->ring[prq->head & (prq->entries - 1)];

			prq->head++;
			dispatch(dev, &request);
		}
		/* The records were copied: their slots may be used again. */
		smp_store_release(&dev->shadow->prq_head, prq->head);
		extlb_kick(dev, &dev->shadow->prq_need_kick);
	}
	mutex_unlock(&prq->lock);
}
