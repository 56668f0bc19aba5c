// SPDX-License-Identifier: GPL-2.0
/*
 * The character device: open, ioctl, mmap, poll, read, close.
 */
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "extlb.h"

#define AUDIT_TRIES	20
#define AUDIT_WAIT_MS	10

static enum extlb_ctx_state state_of(struct extlb_ctx *ctx)
{
	/* Pairs with extlb_ctx_create(): what it set up is there. */
	return smp_load_acquire(&ctx->state);
}

static int extlb_open(struct inode *inode, struct file *file)
{
	/* misc_open() keeps misc_deregister() out meanwhile. */
	struct extlb_dev *dev = container_of(file->private_data,
					     struct extlb_dev, misc);
	struct extlb_ctx *ctx = extlb_ctx_open(dev, file->f_mapping);

	if (!ctx)
		return -ENOMEM;
	file->private_data = ctx;
	return nonseekable_open(inode, file);
}

static int extlb_release(struct inode *inode, struct file *file)
{
	extlb_ctx_release(file->private_data);
	return 0;
}

static int extlb_flush(struct file *file, fl_owner_t id)
{
	if (current->flags & PF_EXITING)
		extlb_ctx_flush(file->private_data);
	return 0;
}

static int get_info(struct extlb_ctx *ctx, struct extlb_info *arg)
{
	if (arg->reserved0 || arg->reserved1)
		return -EINVAL;
	*arg = (struct extlb_info) {
		.version = EXTLB_UAPI_VERSION,
		.create_flags = extlb_follow_flags(),
		.contexts = ctx->dev->contexts,
		.oracle = !!(ctx->dev->cap & EXTLB_CAP_ORACLE),
		.max_ring_log2 = EXTLB_WORK_RING_LOG2_MAX,
	};
	return 0;
}

static int get_stats(struct extlb_ctx *ctx, struct extlb_stats *arg)
{
	struct extlb_dev *dev = ctx->dev;
	int i;

	if (arg->reserved)
		return -EINVAL;
	*arg = (struct extlb_stats) {
		.shootdowns = atomic64_read(&ctx->shootdowns),
		.shot_pages = atomic64_read(&ctx->shot_pages),
		.page_requests = atomic64_read(&ctx->page_requests),
		.refused_requests = atomic64_read(&ctx->refused_requests),
		.filled_pages = atomic64_read(&ctx->filled_pages),
		.mapped_pages = atomic64_read(&ctx->mapped_pages),
		.pinned_pages = atomic64_read(&ctx->pinned_pages),
		.shootdown_max_ns = atomic64_read(&ctx->shootdown_ns.max),
		.ops_completed = extlb_read_counter(dev, EXTLB_REG_OPS_COMPLETED),
		.ops_faulted = extlb_read_counter(dev, EXTLB_REG_OPS_FAULTED),
		.oracle_checks = extlb_read_counter(dev, EXTLB_REG_ORACLE_CHECKS),
		.oracle_suspects = extlb_read_counter(dev, EXTLB_REG_ORACLE_SUSPECTS),
		.oracle_stale = extlb_read_counter(dev, EXTLB_REG_ORACLE_STALE),
		.callbacks = atomic64_read(&ctx->callbacks),
		.retried_fills = atomic64_read(&ctx->retried_fills),
	};
	for (i = 0; i < EXTLB_HISTOGRAM_BUCKETS; i++)
		arg->shootdown_ns[i] = atomic64_read(&ctx->shootdown_ns.buckets[i]);
	return extlb_is_dead(dev) ? -EIO : 0;
}

/* One audit by the device, into the kernel's shadow page. Under audit_lock. */
static int audit_once(struct extlb_ctx *ctx, bool final,
		      struct extlb_audit_result *result)
{
	struct extlb_dev *dev = ctx->dev;
	struct extlb_audit_result *shared =
		(void *)&dev->shadow->wait[EXTLB_WAIT_AUDIT];
	struct extlb_command command = {
		.kind = EXTLB_COMMAND_KIND_AUDIT,
		.flags = final ? EXTLB_AUDIT_FLAG_FINAL : 0,
		.context = ctx->index,
		.addr = dev->shadow_dma + offsetof(struct extlb_kernel_shadow,
						   wait[EXTLB_WAIT_AUDIT]),
	};

	memset(shared, 0, sizeof(*shared));
	extlb_iq_wait(dev, extlb_iq_post(dev, &command, 1, true), true);
	*result = *shared;
	return result->done == 1 ? 0 : -EIO;
}

static int audit(struct extlb_ctx *ctx, struct extlb_audit *arg)
{
	struct extlb_dev *dev = ctx->dev;
	struct extlb_audit_result result;
	int tries, ret, i;

	for (i = 0; i < ARRAY_SIZE(arg->reserved); i++) {
		if (arg->reserved[i])
			return -EINVAL;
	}
	if (!(dev->table[ctx->index].flags & EXTLB_CONTEXT_ORACLE))
		return -EOPNOTSUPP;

	/*
	 * A pte that another thread has changed, and whose clear() has not come
	 * yet, differs for a moment. The last try goes on the device's record.
	 */
	for (tries = 1; ; tries++) {
		ret = mutex_lock_killable(&dev->audit_lock);
		if (ret)
			return ret;
		ret = audit_once(ctx, tries == AUDIT_TRIES, &result);
		mutex_unlock(&dev->audit_lock);
		if (ret || !result.mismatches || tries == AUDIT_TRIES)
			break;
		schedule_timeout_killable(msecs_to_jiffies(AUDIT_WAIT_MS));
		if (fatal_signal_pending(current))
			return -EINTR;
	}
	*arg = (struct extlb_audit) {
		.checked = result.checked,
		.mismatches = result.mismatches,
		.iova = result.iova,
		.device_gpa = result.device_gpa,
		.cpu_gpa = result.cpu_gpa,
	};
	return ret;
}

/* Under dev->sem and ctx->lock, by the context's own process. */
static int context_ioctl(struct extlb_ctx *ctx, unsigned int cmd, void *arg)
{
	struct extlb_unregister *unregister = arg;

	if (cmd == EXTLB_IOC_CREATE)
		return extlb_ctx_create(ctx, arg);
	if (ctx->state != EXTLB_CTX_LIVE)
		return -EINVAL;

	switch (cmd) {
	case EXTLB_IOC_REGISTER:
		return extlb_range_register(ctx, arg);
	case EXTLB_IOC_UNREGISTER:
		if (unregister->reserved0)
			return -EINVAL;
		return extlb_range_unregister(ctx, unregister->handle);
	case EXTLB_IOC_STATS:
		return get_stats(ctx, arg);
	case EXTLB_IOC_AUDIT:
		return audit(ctx, arg);
	}
	return -ENOTTY;
}

static int locked_ioctl(struct extlb_ctx *ctx, unsigned int cmd, void *arg)
{
	struct extlb_dev *dev = ctx->dev;
	int ret;

	ret = down_read_killable(&dev->sem);
	if (ret)
		return ret;
	if (dev->removed || extlb_is_dead(dev)) {
		ret = -EIO;
		goto up;
	}
	ret = mutex_lock_killable(&ctx->lock);
	if (ret)
		goto up;
	if (ctx->mm && ctx->mm != current->mm)
		ret = -EPERM;
	else if (cmd == EXTLB_IOC_INFO)
		ret = get_info(ctx, arg);
	else
		ret = context_ioctl(ctx, cmd, arg);
	mutex_unlock(&ctx->lock);
	if (!ret && extlb_is_dead(dev))
		ret = -EIO;
up:
	up_read(&dev->sem);
	return ret;
}

/* Nobody would know its name. A program that guesses it harms itself only. */
static void forget_registration(struct extlb_ctx *ctx,
				const struct extlb_register *reg)
{
	struct extlb_unregister arg = { .handle = reg->handle };

	locked_ioctl(ctx, EXTLB_IOC_UNREGISTER, &arg);
}

static long extlb_ioctl(struct file *file, unsigned int cmd, unsigned long user)
{
	void __user *uptr = (void __user *)user;
	size_t size = _IOC_SIZE(cmd);
	void *arg;
	long ret;

	switch (cmd) {
	case EXTLB_IOC_INFO:
	case EXTLB_IOC_CREATE:
	case EXTLB_IOC_REGISTER:
	case EXTLB_IOC_UNREGISTER:
	case EXTLB_IOC_STATS:
	case EXTLB_IOC_AUDIT:
		break;
	default:
		return -ENOTTY;
	}

	/*
	 * The size is one of the above: at most that of the statistics. The
	 * memory is the program's, and a fault there takes as long as it likes
	 * (userfaultfd): no lock of ours is held meanwhile.
	 */
	arg = memdup_user(uptr, size);
	if (IS_ERR(arg))
		return PTR_ERR(arg);
	ret = locked_ioctl(file->private_data, cmd, arg);
	if (!ret && copy_to_user(uptr, arg, size)) {
		if (cmd == EXTLB_IOC_REGISTER)
			forget_registration(file->private_data, arg);
		ret = -EFAULT;
	}
	kfree(arg);
	return ret;
}

/*
 * The doorbell page is mapped when it is touched, so that a page that is mapped
 * while the device goes away is either not mapped or found by
 * unmap_mapping_range(): at that time the VMA is where that looks.
 *
 * Without a device there is a page in its place that nobody reads. A program
 * cannot know, when it rings, that the device has gone; it is to be told by an
 * error of its next call, and not to be killed by a signal.
 */
static vm_fault_t doorbell_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct extlb_ctx *ctx = vma->vm_file->private_data;
	struct extlb_dev *dev = ctx->dev;
	int srcu = srcu_read_lock(&dev->srcu);
	phys_addr_t bell = dev->doorbells + ctx->index * EXTLB_DOORBELL_STRIDE;
	vm_fault_t ret;

	/* The file, and with it the page, outlives the mapping. */
	if (READ_ONCE(dev->removed))
		ret = vmf_insert_pfn_prot(vma, vmf->address,
					  PHYS_PFN(virt_to_phys(ctx->no_doorbell)),
					  vm_get_page_prot(vma->vm_flags));
	else
		ret = vmf_insert_pfn(vma, vmf->address, PHYS_PFN(bell));
	srcu_read_unlock(&dev->srcu, srcu);
	return ret;
}

static const struct vm_operations_struct doorbell_ops = {
	.fault = doorbell_fault,
};

static int extlb_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct extlb_ctx *ctx = file->private_data;

	if (state_of(ctx) != EXTLB_CTX_LIVE)
		return -EINVAL;
	if (ctx->mm != current->mm)
		return -EPERM;
	if (extlb_is_dead(ctx->dev))
		return -EIO;
	if (vma_pages(vma) != 1 || !(vma->vm_flags & VM_SHARED) ||
	    (vma->vm_flags & VM_EXEC))
		return -EINVAL;
	/* A child has no business with the context of its parent. */
	vm_flags_mod(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP, VM_MAYEXEC);

	switch (vma->vm_pgoff) {
	case PHYS_PFN(EXTLB_MMAP_DOORBELL):
		vm_flags_set(vma, VM_IO | VM_PFNMAP);
		vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
		vma->vm_ops = &doorbell_ops;
		return 0;
	case PHYS_PFN(EXTLB_MMAP_SHADOW):
		return vm_insert_page(vma, vma->vm_start,
				      virt_to_page(ctx->shadow));
	}
	return -EINVAL;
}

/* The program can write event_seq: it then fools itself about its own events. */
static bool has_events(struct extlb_ctx *ctx)
{
	return READ_ONCE(ctx->shadow->event_seq) != READ_ONCE(ctx->events_taken);
}

static __poll_t extlb_poll(struct file *file, poll_table *table)
{
	struct extlb_ctx *ctx = file->private_data;
	__poll_t mask = 0;

	poll_wait(file, &ctx->wait, table);
	if (state_of(ctx) == EXTLB_CTX_NEW)
		return EPOLLERR;
	if (ctx->shadow && has_events(ctx))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (extlb_ctx_is_over(ctx))
		mask |= EPOLLERR | EPOLLHUP;
	return mask;
}

/* Two readers share the events: each gets some. */
static u32 take_events(struct extlb_ctx *ctx)
{
	u32 taken = READ_ONCE(ctx->events_taken), now;

	do {
		now = READ_ONCE(ctx->shadow->event_seq);
	} while (!try_cmpxchg(&ctx->events_taken, &taken, now));
	return now - taken;
}

static ssize_t extlb_read(struct file *file, char __user *buf, size_t size,
			  loff_t *pos)
{
	struct extlb_ctx *ctx = file->private_data;
	u64 count;
	int ret;

	if (size < sizeof(count) || state_of(ctx) == EXTLB_CTX_NEW)
		return -EINVAL;
	if (!ctx->shadow)
		return -EIO;
	while (!(count = take_events(ctx))) {
		if (extlb_ctx_is_over(ctx))
			return -EIO;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		ret = wait_event_interruptible(ctx->wait, has_events(ctx) ||
					       extlb_ctx_is_over(ctx));
		if (ret)
			return ret;
	}
	return copy_to_user(buf, &count, sizeof(count)) ? -EFAULT : sizeof(count);
}

const struct file_operations extlb_fops = {
	.owner = THIS_MODULE,
	.open = extlb_open,
	.flush = extlb_flush,
	.release = extlb_release,
	.unlocked_ioctl = extlb_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = extlb_mmap,
	.poll = extlb_poll,
	.read = extlb_read,
};
