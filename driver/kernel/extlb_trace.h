/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of the extlb driver: what the device asks for, what it is
 * answered, and how long it takes to let go of pages.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM extlb

#if !defined(_EXTLB_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _EXTLB_TRACE_H

#include <linux/tracepoint.h>

#include "extlb_hw.h"

/* A page request was taken out of the ring. */
TRACE_EVENT(extlb_page_request,
	    TP_PROTO(u32 context, const struct extlb_page_request *request),

	    TP_ARGS(context, request),

	    TP_STRUCT__entry(__field(u32, context)
			     __field(u32, group)
			     __field(u64, iova)
			     __field(u32, pages)
			     __field(bool, write)),

	    TP_fast_assign(__entry->context = context;
			   __entry->group = request->group;
			   __entry->iova = request->iova;
			   __entry->pages = request->pages;
			   __entry->write = request->flags & EXTLB_REQUEST_WRITE;),

	    TP_printk("context=%u group=%u iova=0x%llx pages=%u write=%d",
		      __entry->context, __entry->group, __entry->iova,
		      __entry->pages, __entry->write)
);

/* It is answered. */
TRACE_EVENT(extlb_page_response,
	    TP_PROTO(u32 context, u32 group, u32 response),

	    TP_ARGS(context, group, response),

	    TP_STRUCT__entry(__field(u32, context)
			     __field(u32, group)
			     __field(u32, response)),

	    TP_fast_assign(__entry->context = context;
			   __entry->group = group;
			   __entry->response = response;),

	    TP_printk("context=%u group=%u response=%s",
		      __entry->context, __entry->group,
		      __print_symbolic(__entry->response,
				       { EXTLB_RESPONSE_SUCCESS, "success" },
				       { EXTLB_RESPONSE_INVALID, "invalid" },
				       { EXTLB_RESPONSE_FAILURE, "failure" }))
);

/* The device has acknowledged that it lost leaves, all of them in a range. */
TRACE_EVENT(extlb_shootdown,
	    TP_PROTO(u32 context, unsigned long start, unsigned long end,
		     unsigned long pages, u64 ns),

	    TP_ARGS(context, start, end, pages, ns),

	    TP_STRUCT__entry(__field(u32, context)
			     __field(unsigned long, start)
			     __field(unsigned long, end)
			     __field(unsigned long, pages)
			     __field(u64, ns)),

	    TP_fast_assign(__entry->context = context;
			   __entry->start = start;
			   __entry->end = end;
			   __entry->pages = pages;
			   __entry->ns = ns;),

	    TP_printk("context=%u start=0x%lx end=0x%lx pages=%lu ns=%llu",
		      __entry->context, __entry->start, __entry->end,
		      __entry->pages, __entry->ns)
);

#endif /* _EXTLB_TRACE_H */

/* This part must be outside protection */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE extlb_trace
#include <trace/define_trace.h>
