// SPDX-License-Identifier: GPL-2.0
/*
 * What the driver and the device have counted, in debugfs, and switches for
 * tests:
 *
 *	ignore_notifier	breaks the rule, so that the oracle can be seen to notice
 *	hold_fills	fills stop between looking pages up and mapping them
 *			(extlb_fill.c), until it is 0 again: the time in which
 *			the pages can be taken away is then as long as a test
 *			needs. held_fills is how many have stopped there.
 *	ignore_stale	breaks the rule, too: fills map what they have looked up
 *			though it may have been taken away since
 */
#include <linux/debugfs.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/io.h>
#include <linux/log2.h>
#include <linux/seq_file.h>

#include "extlb.h"
#include "extlb_debug.h"

static struct dentry *extlb_root;

/* Log-linear: 8 buckets an octave. */
static unsigned int bucket_of(u64 value)
{
	unsigned int octave, index;

	if (value < 8)
		return value;
	octave = ilog2(value);
	index = (octave - 2) * 8 + ((value >> (octave - 3)) & 7);
	return min(index, EXTLB_HISTOGRAM_BUCKETS - 1U);
}

static u64 floor_of(unsigned int bucket)
{
	if (bucket < 8)
		return bucket;
	return (8 + bucket % 8ULL) << (bucket / 8 - 1);
}

void extlb_histogram_add(struct extlb_histogram *h, u64 ns)
{
	s64 max = atomic64_read(&h->max);

	atomic64_inc(&h->buckets[bucket_of(ns)]);
	while (ns > max && !atomic64_try_cmpxchg(&h->max, &max, ns))
		;
}

static u64 percentile(struct extlb_histogram *h, u64 total, u64 per_mille)
{
	u64 wanted = max(DIV_ROUND_UP_ULL(total * per_mille, 1000), 1ULL);
	u64 seen = 0;
	unsigned int i;

	for (i = 0; i < EXTLB_HISTOGRAM_BUCKETS; i++) {
		seen += atomic64_read(&h->buckets[i]);
		if (seen >= wanted)
			return floor_of(i);
	}
	return 0;
}

static int shootdown_latency_show(struct seq_file *m, void *v)
{
	struct extlb_dev *dev = m->private;
	struct extlb_histogram *h = &dev->shootdown_ns;
	u64 total = 0;
	unsigned int i;

	for (i = 0; i < EXTLB_HISTOGRAM_BUCKETS; i++)
		total += atomic64_read(&h->buckets[i]);
	seq_printf(m, "count %llu\np50 %llu\np99 %llu\nmax %lld\n", total,
		   percentile(h, total, 500), percentile(h, total, 990),
		   atomic64_read(&h->max));
	for (i = 0; i < EXTLB_HISTOGRAM_BUCKETS; i++) {
		s64 count = atomic64_read(&h->buckets[i]);

		if (count)
			seq_printf(m, "from %llu ns: %lld\n", floor_of(i), count);
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(shootdown_latency);

static int stats_show(struct seq_file *m, void *v)
{
	static const struct {
		const char *name;
		u32 reg;
	} counters[] = {
		{ "ops_completed", EXTLB_REG_OPS_COMPLETED },
		{ "ops_faulted", EXTLB_REG_OPS_FAULTED },
		{ "bytes", EXTLB_REG_BYTES },
		{ "tlb_hits", EXTLB_REG_TLB_HITS },
		{ "tlb_misses", EXTLB_REG_TLB_MISSES },
		{ "tlb_evictions", EXTLB_REG_TLB_EVICTIONS },
		{ "tlb_shot_down", EXTLB_REG_TLB_SHOT_DOWN },
		{ "invalidations", EXTLB_REG_INVALIDATIONS },
		{ "drains", EXTLB_REG_DRAINS },
		{ "page_requests", EXTLB_REG_PAGE_REQUESTS },
		{ "stray_responses", EXTLB_REG_STRAY_RESPONSES },
		{ "oracle_checks", EXTLB_REG_ORACLE_CHECKS },
		{ "oracle_suspects", EXTLB_REG_ORACLE_SUSPECTS },
		{ "oracle_stale", EXTLB_REG_ORACLE_STALE },
	};
	struct extlb_dev *dev = m->private;
	int i;

	seq_printf(m, "dead %d\nshootdowns %lld\nmissed_interrupts %lld\nlongest_wait_ns %lld\n",
		   extlb_is_dead(dev), atomic64_read(&dev->shootdowns),
		   atomic64_read(&dev->missed_interrupts),
		   atomic64_read(&dev->iq.longest_wait_ns));
	for (i = 0; i < ARRAY_SIZE(counters); i++)
		seq_printf(m, "%s %llu\n", counters[i].name,
			   extlb_read_counter(dev, counters[i].reg));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(stats);

static const char *stale_kind(u32 kind)
{
	switch (kind) {
	case EXTLB_STALE_KIND_NOT_INVALIDATED:
		return "not invalidated";
	case EXTLB_STALE_KIND_SURVIVED_INVALIDATION:
		return "survived an invalidation";
	case EXTLB_STALE_KIND_OUTLIVED_DRAIN:
		return "outlived a drain";
	case EXTLB_STALE_KIND_AUDIT:
		return "found by an audit";
	}
	return "unknown";
}

static int oracle_show(struct seq_file *m, void *v)
{
	struct extlb_dev *dev = m->private;
	void __iomem *regs = dev->regs;
	u32 i, kind;

	seq_printf(m, "checks %llu\nsuspects %llu\nstale %llu\n",
		   extlb_read_counter(dev, EXTLB_REG_ORACLE_CHECKS),
		   extlb_read_counter(dev, EXTLB_REG_ORACLE_SUSPECTS),
		   extlb_read_counter(dev, EXTLB_REG_ORACLE_STALE));
	mutex_lock(&dev->oracle_lock);
	for (i = 0; i < EXTLB_ORACLE_RECORDS && !extlb_is_dead(dev); i++) {
		writel(i, regs + EXTLB_REG_ORACLE_SELECT);
		kind = readl(regs + EXTLB_REG_ORACLE_KIND);
		if (!kind || kind == U32_MAX)
			break;
		seq_printf(m, "stale access: %s: context %u, iova %#llx, device used %#llx, process has %#llx, fill %llu, last invalidation %llu\n",
			   stale_kind(kind),
			   readl(regs + EXTLB_REG_ORACLE_CONTEXT),
			   readq(regs + EXTLB_REG_ORACLE_IOVA),
			   readq(regs + EXTLB_REG_ORACLE_DEVICE_GPA),
			   readq(regs + EXTLB_REG_ORACLE_CPU_GPA),
			   readq(regs + EXTLB_REG_ORACLE_FILL),
			   readq(regs + EXTLB_REG_ORACLE_INVALIDATION));
	}
	mutex_unlock(&dev->oracle_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(oracle);

static int contexts_show(struct seq_file *m, void *v)
{
	struct extlb_dev *dev = m->private;
	struct extlb_ctx *ctx;
	u32 i;

	for (i = 0; i < dev->contexts; i++) {
		ctx = extlb_ctx_get(dev, i);
		if (!ctx)
			continue;
		seq_printf(m, "%u: %s%s, error %u, mapped %lld, pinned %lld, filled %lld, page requests %lld, refused %lld, shootdowns %lld of %lld pages, callbacks %lld, retried fills %lld\n",
			   i, ctx->follow->name,
			   READ_ONCE(ctx->closing) ? ", stopped" : "",
			   READ_ONCE(ctx->error),
			   atomic64_read(&ctx->mapped_pages),
			   atomic64_read(&ctx->pinned_pages),
			   atomic64_read(&ctx->filled_pages),
			   atomic64_read(&ctx->page_requests),
			   atomic64_read(&ctx->refused_requests),
			   atomic64_read(&ctx->shootdowns),
			   atomic64_read(&ctx->shot_pages),
			   atomic64_read(&ctx->callbacks),
			   atomic64_read(&ctx->retried_fills));
		extlb_ctx_put(ctx);
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(contexts);

static int ignore_get(void *data, u64 *value)
{
	struct extlb_dev *dev = data;

	*value = READ_ONCE(dev->ignore_notifier);
	return 0;
}

/* The device asks for what it needs again, and gets what is there now. */
static void take_all_pages_back(struct extlb_dev *dev)
{
	struct extlb_ctx *ctx;
	u32 i;

	for (i = 0; i < dev->contexts; i++) {
		ctx = extlb_ctx_get(dev, i);
		if (!ctx)
			continue;
		mutex_lock(&ctx->lock);
		if (ctx->state == EXTLB_CTX_LIVE && !ctx->follow->pins)
			extlb_shoot_down(ctx, 0, EXTLB_IOVA_END, true);
		mutex_unlock(&ctx->lock);
		extlb_ctx_put(ctx);
	}
}

static int ignore_set(void *data, u64 value)
{
	struct extlb_dev *dev = data;

	if (value > EXTLB_IGNORE_SYNC)
		return -EINVAL;
	if (value)
		dev_warn(&dev->pdev->dev,
			 "the device keeps pages that the kernel takes back: memory will be corrupted\n");
	WRITE_ONCE(dev->ignore_notifier, value);
	if (!value)
		take_all_pages_back(dev);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(ignore_fops, ignore_get, ignore_set, "%llu\n");

void extlb_debugfs_add(struct extlb_dev *dev)
{
	struct dentry *dir = debugfs_create_dir(dev->name, extlb_root);

	dev->debugfs = dir;
	debugfs_create_file("stats", 0400, dir, dev, &stats_fops);
	debugfs_create_file("oracle", 0400, dir, dev, &oracle_fops);
	debugfs_create_file("shootdown_latency", 0400, dir, dev,
			    &shootdown_latency_fops);
	debugfs_create_file("contexts", 0400, dir, dev, &contexts_fops);
	debugfs_create_file("ignore_notifier", 0600, dir, dev, &ignore_fops);
	debugfs_create_bool("ignore_stale", 0600, dir, &dev->ignore_stale);
	debugfs_create_u32("hold_fills", 0600, dir, &dev->hold_fills);
	debugfs_create_atomic_t("held_fills", 0400, dir, &dev->held_fills);
	extlb_debug_add_files(dev, dir);
}

/* Waits for readers. */
void extlb_debugfs_remove(struct extlb_dev *dev)
{
	debugfs_remove_recursive(dev->debugfs);
}

void extlb_debugfs_init(void)
{
	extlb_root = debugfs_create_dir(KBUILD_MODNAME, NULL);
}

void extlb_debugfs_exit(void)
{
	debugfs_remove_recursive(extlb_root);
}
