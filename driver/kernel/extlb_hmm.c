// SPDX-License-Identifier: GPL-2.0
/*
 * The interface of the kernel's own test driver for device page tables
 * (lib/test_hmm.c), on /dev/hmm_dmirror*, with the device behind it: so that the
 * suite which the kernel has for that driver can be run against this one.
 *
 * An open file is a context of the device for whoever opened it. What is read
 * and written is so by the device, through its own page table, with page
 * requests; the process is followed as the module parameter "follow" says. What
 * the device does not have is refused: it has no memory that the process's pages
 * could migrate to, and no access that shuts out the processor.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "extlb.h"
#include "extlb_hmm.h"

/*
 * As many as the suite knows. It takes them for devices with memory of different
 * kinds; here all are alike.
 */
#define UNITS		4
/* Pages of a mapping of the file. */
#define MAX_MAPPED	16

static bool hmm;
module_param(hmm, bool, 0444);
MODULE_PARM_DESC(hmm,
		 "Offer the interface of lib/test_hmm.c on /dev/hmm_dmirror*, served by the first device (default off)");

struct extlb_hmm {
	struct extlb_hmm_unit {
		struct miscdevice misc;
		struct extlb_dev *dev;
		char name[16];
	} units[UNITS];
};

static int create(struct extlb_hmm_file *file, struct extlb_dev *dev)
{
	int ret = down_read_killable(&dev->sem);

	if (ret)
		return ret;
	ret = -EIO;
	if (!dev->removed && !extlb_is_dead(dev))
		ret = extlb_hmm_queue_init(file);
	up_read(&dev->sem);
	return ret;
}

static int hmm_open(struct inode *inode, struct file *filp)
{
	/* misc_open() keeps misc_deregister() out meanwhile. */
	struct extlb_hmm_unit *unit = container_of(filp->private_data,
						   struct extlb_hmm_unit, misc);
	struct extlb_hmm_file *file;
	int ret = -ENOMEM;

	if (!current->mm)
		return -EINVAL;
	file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);
	if (!file)
		return -ENOMEM;
	mutex_init(&file->lock);
	file->ctx = extlb_ctx_open(unit->dev, filp->f_mapping);
	if (!file->ctx)
		goto free;
	ret = create(file, unit->dev);
	if (ret)
		goto release;
	filp->private_data = file;
	return nonseekable_open(inode, filp);

release:
	extlb_ctx_release(file->ctx);
	extlb_hmm_queue_free(file);
free:
	kfree(file);
	return ret;
}

static int hmm_release(struct inode *inode, struct file *filp)
{
	struct extlb_hmm_file *file = filp->private_data;

	/* When the context is closed the device is done with the shared memory. */
	extlb_ctx_release(file->ctx);
	extlb_hmm_queue_free(file);
	kfree(file);
	return 0;
}

static int check(const struct extlb_hmm_cmd *cmd)
{
	if (!PAGE_ALIGNED(cmd->addr) || cmd->addr >= TASK_SIZE_MAX)
		return -EINVAL;
	if (!cmd->npages || cmd->npages > (TASK_SIZE_MAX - cmd->addr) >> PAGE_SHIFT)
		return -EINVAL;
	return 0;
}

static int execute(struct extlb_hmm_file *file, unsigned int number,
		   struct extlb_hmm_cmd *cmd)
{
	/* What is there belongs to the process that opened the file. */
	if (current->mm != file->ctx->mm)
		return -EPERM;

	switch (number) {
	case EXTLB_HMM_READ:
		return extlb_hmm_copy(file, cmd, false);
	case EXTLB_HMM_WRITE:
		return extlb_hmm_copy(file, cmd, true);
	case EXTLB_HMM_SNAPSHOT:
		return extlb_hmm_snapshot(cmd);
	}
	return -EOPNOTSUPP;
}

static long hmm_ioctl(struct file *filp, unsigned int number, unsigned long arg)
{
	struct extlb_hmm_file *file = filp->private_data;
	void __user *user = (void __user *)arg;
	struct extlb_hmm_cmd cmd;
	int ret;

	switch (number) {
	case EXTLB_HMM_READ:
	case EXTLB_HMM_WRITE:
	case EXTLB_HMM_SNAPSHOT:
	case EXTLB_HMM_MIGRATE_TO_DEV:
	case EXTLB_HMM_MIGRATE_TO_SYS:
	case EXTLB_HMM_EXCLUSIVE:
	case EXTLB_HMM_CHECK_EXCLUSIVE:
	case EXTLB_HMM_RELEASE:
		break;
	default:
		return -ENOTTY;
	}

	if (copy_from_user(&cmd, user, sizeof(cmd)))
		return -EFAULT;
	ret = check(&cmd);
	if (ret)
		return ret;
	cmd.cpages = 0;
	cmd.faults = 0;

	ret = mutex_lock_killable(&file->lock);
	if (ret)
		return ret;
	ret = execute(file, number, &cmd);
	mutex_unlock(&file->lock);
	if (ret)
		return ret;
	return copy_to_user(user, &cmd, sizeof(cmd)) ? -EFAULT : 0;
}

/* Ordinary pages that the driver puts there itself: a mapping of mixed pages. */
static int hmm_mmap(struct file *filp, struct vm_area_struct *vma)
{
	unsigned long addr;

	if (vma_pages(vma) > MAX_MAPPED)
		return -EINVAL;
	for (addr = vma->vm_start; addr < vma->vm_end; addr += PAGE_SIZE) {
		struct page *page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
		int ret;

		if (!page)
			return -ENOMEM;
		ret = vm_insert_page(vma, addr, page);
		/* The mapping has a reference of its own. */
		put_page(page);
		if (ret)
			return ret;
	}
	return 0;
}

static const struct file_operations hmm_fops = {
	.owner = THIS_MODULE,
	.open = hmm_open,
	.release = hmm_release,
	.unlocked_ioctl = hmm_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.mmap = hmm_mmap,
};

static void deregister(struct extlb_hmm *all, int units)
{
	while (units--)
		misc_deregister(&all->units[units].misc);
	kfree(all);
}

static int add(struct extlb_dev *dev)
{
	struct extlb_hmm *all = kzalloc(sizeof(*all), GFP_KERNEL);
	int i, ret;

	if (!all)
		return -ENOMEM;
	for (i = 0; i < UNITS; i++) {
		struct extlb_hmm_unit *unit = &all->units[i];

		unit->dev = dev;
		snprintf(unit->name, sizeof(unit->name), "hmm_dmirror%d", i);
		unit->misc = (struct miscdevice) {
			.minor = MISC_DYNAMIC_MINOR,
			.name = unit->name,
			.fops = &hmm_fops,
			.parent = &dev->pdev->dev,
			.mode = 0666,
		};
		ret = misc_register(&unit->misc);
		if (ret) {
			deregister(all, i);
			return ret;
		}
	}
	dev->hmm = all;
	return 0;
}

/*
 * Offers the interface, if it is wanted, on the first device. The device is
 * whole without it.
 */
void extlb_hmm_add(struct extlb_dev *dev)
{
	int ret;

	if (!hmm || dev->id)
		return;
	ret = -EOPNOTSUPP;
	/*
	 * A device that has its pages for good follows nothing. And the driver's
	 * own pages are mapped for it above those of processes.
	 */
	if (!extlb_follow_default()->pins && TASK_SIZE_MAX <= EXTLB_KERNEL_IOVA)
		ret = add(dev);
	if (ret)
		dev_warn(&dev->pdev->dev, "no /dev/hmm_dmirror*: error %d\n", ret);
}

/* Nobody can open it when it returns. */
void extlb_hmm_remove(struct extlb_dev *dev)
{
	if (dev->hmm)
		deregister(dev->hmm, UNITS);
	dev->hmm = NULL;
}
