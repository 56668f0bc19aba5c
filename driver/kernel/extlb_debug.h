/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tells the kernel which pages the device can reach, where the kernel asks
 * (CONFIG_PTE_NOTIFIERS_DEBUG). See extlb_debug.c.
 */
#ifndef _EXTLB_DEBUG_H
#define _EXTLB_DEBUG_H

#include <linux/types.h>

struct dentry;
struct extlb_ctx;
struct extlb_dev;
struct page;

#if IS_ENABLED(CONFIG_PTE_NOTIFIERS_DEBUG)
void extlb_debug_init(struct extlb_ctx *ctx);
int extlb_debug_add_table(struct page *table);
void extlb_debug_remove_table(struct extlb_ctx *ctx, struct page *table);
void extlb_debug_set(struct extlb_ctx *ctx, u64 *leaf, unsigned long addr,
		     unsigned long pfn);
void extlb_debug_clear(struct extlb_ctx *ctx, u64 *leaf, unsigned long pfn);
void extlb_debug_posted(struct extlb_ctx *ctx, u64 seq);
void extlb_debug_acked(struct extlb_ctx *ctx);
void extlb_debug_silent(struct extlb_ctx *ctx);
bool extlb_debug_skip_wait(struct extlb_dev *dev);
void extlb_debug_add_files(struct extlb_dev *dev, struct dentry *dir);
#else
static inline void extlb_debug_init(struct extlb_ctx *ctx) {}
static inline int extlb_debug_add_table(struct page *table)
{
	return 0;
}

static inline void extlb_debug_remove_table(struct extlb_ctx *ctx,
					    struct page *table) {}
static inline void extlb_debug_set(struct extlb_ctx *ctx, u64 *leaf,
				   unsigned long addr, unsigned long pfn) {}
static inline void extlb_debug_clear(struct extlb_ctx *ctx, u64 *leaf,
				     unsigned long pfn) {}
static inline void extlb_debug_posted(struct extlb_ctx *ctx, u64 seq) {}
static inline void extlb_debug_acked(struct extlb_ctx *ctx) {}
static inline void extlb_debug_silent(struct extlb_ctx *ctx) {}
static inline bool extlb_debug_skip_wait(struct extlb_dev *dev)
{
	return false;
}

static inline void extlb_debug_add_files(struct extlb_dev *dev,
					 struct dentry *dir) {}
#endif

#endif /* _EXTLB_DEBUG_H */
