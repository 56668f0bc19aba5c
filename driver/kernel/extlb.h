/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the extlb driver share.
 *
 * Locks, outermost first; README.md says what each is for:
 *
 *	extlb_hmm_file.lock
 *	extlb_dev.sem
 *	  extlb_ctx.lock
 *	    mmap_lock
 *	      [mutex of the pte notifier core]
 *	        extlb_ctx.stop_lock
 *	      [i_mmap, anon_vma, folio and page table locks; pte notifier lock]
 *	        extlb_ctx.pt_lock
 *	          extlb_iq.lock
 *	          extlb_dev.fence_lock
 *	    extlb_prq.lock
 *	      extlb_dev.ctx_lock, extlb_ctx.fault_lock, extlb_iq.lock
 *
 * None of them is taken in interrupt context: the interrupt handlers are
 * threads. So plain spin_lock() it is, and interrupts stay enabled while
 * somebody waits for the device.
 */
#ifndef _EXTLB_H
#define _EXTLB_H

#include <linux/atomic.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/maple_tree.h>
#include <linux/miscdevice.h>
#include <linux/mm_types.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/srcu.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#if IS_ENABLED(CONFIG_PTE_NOTIFIERS)
#include <linux/pte_notifier.h>
#endif
#if IS_ENABLED(CONFIG_MMU_NOTIFIER)
#include <linux/mmu_notifier.h>
#endif

#include "extlb_hw.h"
#include "extlb_uapi.h"

#if !defined(CONFIG_64BIT) || defined(__BIG_ENDIAN)
#error "The memory formats of extlb are those of a 64-bit little-endian machine"
#endif

#define EXTLB_IOVA_END		BIT(EXTLB_IOVA_BITS)
/* Here, above what processes have, the driver may map pages of its own. */
#define EXTLB_KERNEL_IOVA	BIT(EXTLB_IOVA_BITS - 1)
/* Page requests of one context that may wait at a time. */
#define EXTLB_CREDITS		16
/* Registrations of one context. */
#define EXTLB_MAX_RANGES	4096

/* Words of extlb_kernel_shadow.wait. */
#define EXTLB_WAIT_ACK		0	/* sequence of the last wait done */
#define EXTLB_WAIT_AUDIT	8	/* an extlb_audit_result, aligned to 64 */

/* Latencies as programs read them, see the histogram in the spec. */
struct extlb_histogram {
	atomic64_t buckets[EXTLB_HISTOGRAM_BUCKETS];
	atomic64_t max;
};

/* The invalidation queue: commands to the device. */
struct extlb_iq {
	spinlock_t lock;		/* of all below, and of the order of @seq */
	struct extlb_command *ring;
	dma_addr_t dma;
	u32 entries;
	u32 tail;
	u64 seq;			/* of the last wait posted */
	atomic64_t longest_wait_ns;	/* for the device, or the fence */
};

/* The page request ring: requests from the device. */
struct extlb_prq {
	struct mutex lock;		/* of the consumer's side */
	struct extlb_page_request *ring;
	dma_addr_t dma;
	u32 entries;
	u32 head;
};

struct extlb_dev {
	struct kref ref;
	struct pci_dev *pdev;
	int id;
	char name[16];
	struct miscdevice misc;
	struct extlb_hmm *hmm;		/* see extlb_hmm.c; may be absent */
	struct dentry *debugfs;

	/* Held for reading by whoever talks to the device in a system call. */
	struct rw_semaphore sem;
	bool removed;			/* under sem; and under srcu for faults */
	struct srcu_struct srcu;

	/*
	 * The device is fenced off: it accesses no memory any more, and will
	 * not. Set once, after that is so; see extlb_fence().
	 */
	bool dead;
	spinlock_t fence_lock;		/* who fences */
	struct work_struct dead_work;

	void __iomem *regs;
	phys_addr_t doorbells;
	u64 cap;
	u32 contexts;			/* number of entries of @table */

	struct extlb_kernel_shadow *shadow;
	dma_addr_t shadow_dma;
	struct extlb_context_entry *table;
	dma_addr_t table_dma;
	struct extlb_iq iq;
	struct extlb_prq prq;
	struct workqueue_struct *wq;

	struct delayed_work watchdog;
	u32 watched_head, watched_tail;	/* of the page request ring, last time */
	atomic64_t missed_interrupts;

	spinlock_t ctx_lock;		/* of @ctx and @files */
	struct extlb_ctx *ctx[EXTLB_MAX_CONTEXTS];
	struct list_head files;		/* of extlb_ctx.node: all open files */

	struct mutex audit_lock;	/* of the audit's words in @shadow */
	struct mutex oracle_lock;	/* of ORACLE_SELECT */
	u32 ignore_notifier;		/* an enum extlb_ignore */
	bool ignore_stale;		/* fault injection, see extlb_debugfs.c */
	u32 hold_fills;
	atomic_t held_fills;
#if IS_ENABLED(CONFIG_PTE_NOTIFIERS_DEBUG)
	bool skip_wait;
#endif
	struct extlb_histogram shootdown_ns;
	atomic64_t shootdowns;
};

/* What of the notifier is ignored, so that the oracle can be seen to notice. */
enum extlb_ignore {
	EXTLB_IGNORE_NOTHING,
	EXTLB_IGNORE_ALL,
	EXTLB_IGNORE_SYNC,		/* the end of what was begun */
};

enum extlb_ctx_state {
	EXTLB_CTX_NEW,			/* open, no context yet */
	EXTLB_CTX_LIVE,
	EXTLB_CTX_CLOSED,
};

/* Addresses [start, end). */
struct extlb_span {
	unsigned long start, end;
};

#define EXTLB_BEGUN_SPANS	8

/* Leaves that are clear, and of which the device was not told yet. */
struct extlb_begun {
	unsigned long pages;
	unsigned int n;
	struct extlb_span spans[EXTLB_BEGUN_SPANS];
};

struct extlb_ctx;
struct extlb_range;

/*
 * A way to follow a process: what a context does so that the device loses pages
 * before the kernel reuses them, and how it gets them.
 */
struct extlb_follow_ops {
	const char *name;		/* of the module's parameter, and in debugfs */
	u32 flag;			/* of CREATE */
	/*
	 * Pages stay with the device whatever becomes of the process's ptes:
	 * there is nothing to fill, and nothing for the oracle to compare.
	 */
	bool pins;

	/* The context begins and ends to follow current->mm. Optional. */
	int (*attach)(struct extlb_ctx *ctx);
	void (*detach)(struct extlb_ctx *ctx);
	/*
	 * Takes up a registration under mmap_lock for writing, so that nothing
	 * is unmapped before page requests find it; optional. Then @populate
	 * without mmap_lock; optional, and undoes what it did if it fails.
	 */
	int (*register_range)(struct extlb_range *range);
	int (*populate)(struct extlb_range *range);
	/*
	 * The leaves are gone, and none is installed any more. When it returns,
	 * no callback and no fill is under way.
	 */
	void (*unregister_range)(struct extlb_range *range);
	/*
	 * Maps the page at @start for the device, and as many up to @end as come
	 * without waiting. The caller holds mm_users of the context's mm, and no
	 * lock. Return: 0, or the reason why @start is not mapped; -EAGAIN,
	 * -EINTR or -ESTALE: try again. Not for those that pin.
	 */
	int (*fill)(struct extlb_range *range, unsigned long start,
		    unsigned long end, bool write);
};

/* An open file, and its context once there is one. */
struct extlb_ctx {
	struct kref ref;
	struct extlb_dev *dev;
	struct list_head node;		/* in extlb_dev.files */
	struct address_space *mapping;	/* of the open file */

	struct mutex lock;		/* of state changes and registrations */
	enum extlb_ctx_state state;	/* set to LIVE with release semantics */
	u32 index;			/* in the context table */
	const struct extlb_follow_ops *follow;
#if IS_ENABLED(CONFIG_MMU_NOTIFIER)
	struct mmu_notifier mn;
#endif
	struct mm_struct *mm;		/* mm_count is held, mm_users is not */
	struct pid *owner;		/* the process that made it */
	struct extlb_context_shadow *shadow;
	void *no_doorbell;		/* mapped instead when the device is gone */

	struct mutex stop_lock;		/* of the following */
	bool stopped;			/* the device is silent for this context */

	/*
	 * The page table, and what says whether it may grow. Callbacks from
	 * the memory manager take pt_lock in atomic context.
	 */
	spinlock_t pt_lock;
	u64 *root;
	bool closing;			/* no table and no leaf is added any more */
	struct extlb_begun begun;
	u64 inval_seq;			/* wait of the last invalidation posted */
	struct list_head fills;		/* of extlb_fill.node */
#if IS_ENABLED(CONFIG_PTE_NOTIFIERS_DEBUG)
	struct list_head held;		/* cleared leaves, see extlb_debug.c */
#endif

	struct maple_tree live;		/* address -> range that covers it now */
	struct xarray ranges;		/* handle -> range */

	spinlock_t fault_lock;		/* of the queue of page requests */
	struct extlb_page_request faults[EXTLB_CREDITS];
	unsigned int fault_head, fault_tail;
	struct work_struct fault_work;
	unsigned long fill_ahead;	/* pages up to here are going to be needed */

	wait_queue_head_t wait;		/* pollers and readers */
	u32 events_seen;		/* by the interrupt handler */
	u32 events_taken;		/* by read() */
	u32 error;			/* a ContextError */

	atomic64_t shootdowns, shot_pages, page_requests, refused_requests;
	atomic64_t filled_pages, mapped_pages, pinned_pages;
	atomic64_t callbacks, retried_fills;
	struct extlb_histogram shootdown_ns;
};

/* A registration. */
struct extlb_range {
	struct kref ref;
	struct extlb_ctx *ctx;
	unsigned long start, end;
	u32 handle;
	bool closing;			/* under pt_lock: nothing is installed any more */
#if IS_ENABLED(CONFIG_PTE_NOTIFIERS)
	struct pte_notifier pn;
#endif
#if IS_ENABLED(CONFIG_MMU_NOTIFIER)
	struct mmu_interval_notifier mni;
#endif
	/* Pinned mode: struct page pointers, bit 0 set if pinned for writing. */
	unsigned long *pages;
	unsigned long npages;
};

struct extlb_fill;

/* What differs between those who look pages up for the device. */
struct extlb_fill_ops {
	/* Makes the fill learn of notifications from now on; optional. */
	void (*begin)(struct extlb_fill *fill);
	/* Whether one has come. Under pt_lock. */
	bool (*is_stale)(struct extlb_fill *fill);
};

/* Looking pages up for the device, see extlb_fill.c. */
struct extlb_fill {
	const struct extlb_fill_ops *ops;
	struct extlb_range *range;
	unsigned long start, end;
	bool write;

	bool stale;			/* for @ops, under pt_lock */
	unsigned long seq;		/* likewise, of who began */

	struct list_head node;		/* in extlb_ctx.fills */
	struct task_struct *task;
	unsigned int tried;		/* FAULT_FLAG_TRIED, or 0 */
	unsigned int npages;		/* looked up, with a reference each */
	struct page *pages[EXTLB_REQUEST_PAGES_MAX];
};

/* What a clear took away, or made old. */
struct extlb_cleared {
	unsigned long start, end;	/* bounds of the leaves */
	unsigned long pages;
};

/* extlb_drv.c */
void extlb_fence(struct extlb_dev *dev, const char *reason);
void extlb_fatal(struct extlb_dev *dev);
void extlb_wake_completed(struct extlb_dev *dev);
u64 extlb_read_counter(struct extlb_dev *dev, u32 reg);
void extlb_dev_put(struct extlb_dev *dev);

static inline bool extlb_is_dead(struct extlb_dev *dev)
{
	/* Pairs with extlb_fence(): if so, it is silent already. */
	return smp_load_acquire(&dev->dead);
}

/* The negative control: whether the device keeps what is taken from @ctx. */
static inline bool extlb_ignores_all(struct extlb_ctx *ctx)
{
	return READ_ONCE(ctx->dev->ignore_notifier) == EXTLB_IGNORE_ALL;
}

/* extlb_dev.c */
extern const struct file_operations extlb_fops;

/* extlb_ctx.c */
struct extlb_ctx *extlb_ctx_open(struct extlb_dev *dev,
				 struct address_space *mapping);
void extlb_ctx_release(struct extlb_ctx *ctx);
bool extlb_ctx_is_over(struct extlb_ctx *ctx);
int extlb_ctx_create(struct extlb_ctx *ctx, struct extlb_create *arg);
void extlb_ctx_stop(struct extlb_ctx *ctx);
void extlb_ctx_flush(struct extlb_ctx *ctx);
void extlb_ctx_close(struct extlb_ctx *ctx);
struct extlb_ctx *extlb_ctx_get(struct extlb_dev *dev, u32 index);
void extlb_ctx_put(struct extlb_ctx *ctx);
void extlb_ctx_error(struct extlb_ctx *ctx, u32 code);

/* extlb_range.c */
int extlb_range_register(struct extlb_ctx *ctx, struct extlb_register *arg);
int extlb_range_unregister(struct extlb_ctx *ctx, u32 handle);
void extlb_range_unregister_all(struct extlb_ctx *ctx);
struct extlb_range *extlb_range_find(struct extlb_ctx *ctx, unsigned long addr,
				     unsigned long *end);
void extlb_range_forget(struct extlb_range *range, unsigned long start,
			unsigned long end);
void extlb_range_put(struct extlb_range *range);

/* extlb_pgtable.c */
int extlb_pt_init(struct extlb_ctx *ctx);
void extlb_pt_free(struct extlb_ctx *ctx);
int extlb_pt_prepare(struct extlb_ctx *ctx, unsigned long start,
		     unsigned long end);
u64 *extlb_pt_leaf(struct extlb_ctx *ctx, unsigned long addr);
void extlb_pt_set(struct extlb_ctx *ctx, u64 *leaf, unsigned long addr,
		  unsigned long pfn, bool writable);
int extlb_pt_install(struct extlb_ctx *ctx, unsigned long addr,
		     unsigned long pfn, bool writable);
void extlb_pt_clear(struct extlb_ctx *ctx, unsigned long start,
		    unsigned long end, struct extlb_cleared *cleared);
bool extlb_pt_age(struct extlb_ctx *ctx, unsigned long start,
		  unsigned long end, bool clear, struct extlb_cleared *aged);
void extlb_pt_prune(struct extlb_ctx *ctx, unsigned long start,
		    unsigned long end);

/* extlb_shootdown.c */
void extlb_post_invalidation(struct extlb_ctx *ctx, unsigned long start,
			     unsigned long end);
void extlb_shoot_down(struct extlb_ctx *ctx, unsigned long start,
		      unsigned long end, bool may_sleep);
void extlb_shoot_down_begin(struct extlb_ctx *ctx, unsigned long start,
			    unsigned long end);
void extlb_shoot_down_end(struct extlb_ctx *ctx);
bool extlb_age(struct extlb_ctx *ctx, unsigned long start, unsigned long end,
	       bool clear);
bool extlb_is_begun(struct extlb_ctx *ctx, unsigned long addr);

/* extlb_follow.c */
u32 extlb_follow_flags(void);
const struct extlb_follow_ops *extlb_follow_by_flag(u32 flag);
const struct extlb_follow_ops *extlb_follow_default(void);

/* The ways to follow a process, each in a file of its own. */
extern const struct extlb_follow_ops extlb_follow_pte;
extern const struct extlb_follow_ops extlb_follow_mmu;
extern const struct extlb_follow_ops extlb_follow_interval;
extern const struct extlb_follow_ops extlb_follow_pinned;

/* extlb_fill.c */
int extlb_fill_check_range(struct extlb_range *range);
int extlb_fill_run(struct extlb_range *range, unsigned long start,
		   unsigned long end, bool write,
		   const struct extlb_fill_ops *ops);
void extlb_fill_stop(struct extlb_range *range);

/* extlb_iq.c */
u64 extlb_iq_post(struct extlb_dev *dev, const struct extlb_command *commands,
		  unsigned int count, bool ack);
bool extlb_iq_try_post(struct extlb_dev *dev,
		       const struct extlb_command *command);
bool extlb_iq_acknowledged(struct extlb_dev *dev, u64 seq);
void extlb_iq_wait(struct extlb_dev *dev, u64 seq, bool may_sleep);
void extlb_kick(struct extlb_dev *dev, const u32 *need_kick);

/* extlb_prq.c */
void extlb_prq_consume(struct extlb_dev *dev);
void extlb_fault_work(struct work_struct *work);

/* extlb_watchdog.c */
void extlb_watchdog_init(struct extlb_dev *dev);
void extlb_watchdog_start(struct extlb_dev *dev);
void extlb_watchdog_stop(struct extlb_dev *dev);

/* extlb_hmm.c */
void extlb_hmm_add(struct extlb_dev *dev);
void extlb_hmm_remove(struct extlb_dev *dev);

/* extlb_debugfs.c */
void extlb_debugfs_add(struct extlb_dev *dev);
void extlb_debugfs_remove(struct extlb_dev *dev);
void extlb_debugfs_init(void);
void extlb_debugfs_exit(void);
void extlb_histogram_add(struct extlb_histogram *h, u64 ns);

#endif /* _EXTLB_H */
