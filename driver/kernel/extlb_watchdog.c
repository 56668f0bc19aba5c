// SPDX-License-Identifier: GPL-2.0
/*
 * The watchdog: looks now and then whether the device still works, and whether
 * something waits that no interrupt told of.
 *
 * A message that a device does not send, or that is lost on its way, would leave
 * a page request in the ring, and the program that needs the page waiting, until
 * by chance another request comes. A device that has reset itself says nothing
 * at all; a shootdown would find it out, but there may be none. So once a period:
 * one register, and two words in RAM. Not while no file is open.
 */
#include <linux/io.h>
#include <linux/jiffies.h>
#include <linux/moduleparam.h>

#include "extlb.h"

static unsigned int watchdog_ms = 1000;
module_param(watchdog_ms, uint, 0644);
MODULE_PARM_DESC(watchdog_ms,
		 "How often to look after the device while it is in use, 10 to 60000; 0: never (default 1000)");

static unsigned long period(void)
{
	unsigned int ms = READ_ONCE(watchdog_ms);

	/* Switched off: look whether it is on again. */
	return msecs_to_jiffies(ms ? clamp(ms, 10U, 60000U) : 1000);
}

static void look_at_status(struct extlb_dev *dev)
{
	u32 status = readl(dev->regs + EXTLB_REG_STATUS);

	/* Whoever fenced it meanwhile has reset it, too. */
	if (extlb_is_dead(dev))
		return;
	if (status == U32_MAX)
		extlb_fence(dev, "the device is gone: registers read all ones");
	else if (status & EXTLB_STATUS_FATAL)
		extlb_fatal(dev);
	else if (!(status & EXTLB_STATUS_ENABLED))
		extlb_fence(dev, "the device has reset itself");
}

/*
 * Records that were there a period ago and still are: their interrupt is lost.
 * Should it only be late, nothing is wrong with being early.
 */
static void look_at_requests(struct extlb_dev *dev)
{
	u32 head = READ_ONCE(dev->prq.head);
	u32 tail = READ_ONCE(dev->shadow->prq_tail);

	if (tail != head && head == dev->watched_head && tail == dev->watched_tail) {
		atomic64_inc(&dev->missed_interrupts);
		dev_warn_ratelimited(&dev->pdev->dev,
				     "page requests without an interrupt: is one lost?\n");
		extlb_prq_consume(dev);
	}
	dev->watched_head = head;
	dev->watched_tail = tail;
}

static bool is_used(struct extlb_dev *dev)
{
	bool used;

	spin_lock(&dev->ctx_lock);
	used = !list_empty(&dev->files);
	spin_unlock(&dev->ctx_lock);
	return used;
}

static void watchdog_work(struct work_struct *work)
{
	struct extlb_dev *dev = container_of(work, struct extlb_dev,
					     watchdog.work);

	if (extlb_is_dead(dev))
		return;
	if (READ_ONCE(watchdog_ms)) {
		look_at_status(dev);
		look_at_requests(dev);
		extlb_wake_completed(dev);
	}
	if (is_used(dev))
		extlb_watchdog_start(dev);
}

void extlb_watchdog_init(struct extlb_dev *dev)
{
	INIT_DELAYED_WORK(&dev->watchdog, watchdog_work);
}

/* A file was opened: looks after the device as long as there is one. */
void extlb_watchdog_start(struct extlb_dev *dev)
{
	/* Not the queue of those that may all sleep in a fault. */
	schedule_delayed_work(&dev->watchdog, period());
}

/* Nobody can open a file any more. */
void extlb_watchdog_stop(struct extlb_dev *dev)
{
	cancel_delayed_work_sync(&dev->watchdog);
}
