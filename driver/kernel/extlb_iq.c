// SPDX-License-Identifier: GPL-2.0
/*
 * The invalidation queue: commands to the device, and waiting for it.
 *
 * A command that must be waited for is followed by a wait command, which lets
 * the device write a sequence number to RAM. The device works in order, so one
 * word serves everybody: whoever waits for n waits for the word to reach n. No
 * register is read, and nothing is locked while waiting; any number of CPUs
 * wait at once.
 *
 * Posting and waiting are fit for atomic context: clear() of a pte notifier
 * comes under page table locks. The device never makes the queue wait for a
 * page request or for an operation, so the waits here end by themselves; if
 * the device breaks that promise it is fenced off.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/moduleparam.h>
#include <linux/timekeeping.h>

#include "extlb.h"

/*
 * Far beyond what any device needs, but a device that is a process on a busy
 * host may have to wait for a processor; and below the 20 s after which the
 * kernel calls a CPU that waits here locked up.
 */
static unsigned int ack_timeout_ms = 10000;
module_param(ack_timeout_ms, uint, 0644);
MODULE_PARM_DESC(ack_timeout_ms,
		 "Time the device has to acknowledge an invalidation before it is fenced off, 10 to 60000 (default 10000)");

/* Spins before a waiter that may sleep does so. */
#define SPINS_BEFORE_SLEEP	2000

/* This clock may go back a little: so signed. */
static s64 ns_since(u64 begin)
{
	return ktime_get_mono_fast_ns() - begin;
}

/* Whether who began to wait then has waited enough. */
static bool is_over(u64 begin)
{
	return ns_since(begin) >
	       clamp(READ_ONCE(ack_timeout_ms), 10U, 60000U) * 1000000LL;
}

/* For the administrator, beside the limit. */
static void note_wait(struct extlb_iq *iq, u64 begin)
{
	s64 longest = atomic64_read(&iq->longest_wait_ns);
	s64 ns = ns_since(begin);

	while (ns > longest &&
	       !atomic64_try_cmpxchg(&iq->longest_wait_ns, &longest, ns))
		;
}

/* Wakes the device if it sleeps. See the handshake in the shadow page. */
void extlb_kick(struct extlb_dev *dev, const u32 *need_kick)
{
	/*
	 * Our index was stored before; the device sets need_kick before it
	 * looks at the index for the last time. With a full fence on each side
	 * one sees the other. mb(), not smp_mb(): the device is there on a
	 * machine of one CPU, too.
	 */
	mb();
	if (READ_ONCE(*need_kick))
		writel(1, dev->regs + EXTLB_REG_KICK);
}

static void put_command(struct extlb_iq *iq, const struct extlb_command *command)
{
	iq->ring[iq->tail & (iq->entries - 1)] = *command;
	iq->tail++;
}

/*
 * Takes the lock when there is room for @need commands. False: the device is
 * dead; the lock is held all the same.
 */
static bool lock_with_room(struct extlb_dev *dev, u32 need)
	__acquires(&dev->iq.lock)
{
	struct extlb_iq *iq = &dev->iq;
	bool room = false;
	u64 begin = 0;
	u32 used;

	spin_lock(&iq->lock);
	while (!extlb_is_dead(dev)) {
		used = iq->tail - READ_ONCE(dev->shadow->iq_head);
		room = used + need <= iq->entries;
		if (room)
			break;
		spin_unlock(&iq->lock);

		if (used > iq->entries)
			extlb_fence(dev, "head of the invalidation queue makes no sense");
		else if (!begin)
			begin = ktime_get_mono_fast_ns();
		else if (is_over(begin))
			extlb_fence(dev, "invalidation queue stays full");
		cpu_relax();
		spin_lock(&iq->lock);
	}
	if (begin)
		note_wait(iq, begin);
	return room;
}

/* Shows the device what was put. Under the lock. */
static void publish(struct extlb_dev *dev)
{
	/* The commands, and what they are about, before the tail. */
	dma_wmb();
	WRITE_ONCE(dev->shadow->iq_tail, dev->iq.tail);
	extlb_kick(dev, &dev->shadow->iq_need_kick);
}

/**
 * extlb_iq_post() - post commands
 * @dev: the device
 * @commands: the commands
 * @count: their number, fewer than half of the smallest ring
 * @ack: post a wait command behind them, for cleared and drained
 *
 * All that was stored before, above all to page tables and context entries, is
 * visible to the device when it carries out the commands.
 *
 * Return: with @ack what to give to extlb_iq_wait(); 0 if the device is dead:
 * then there is nothing to wait for.
 */
u64 extlb_iq_post(struct extlb_dev *dev, const struct extlb_command *commands,
		  unsigned int count, bool ack)
{
	struct extlb_iq *iq = &dev->iq;
	unsigned int i;
	u64 seq = 0;

	if (!lock_with_room(dev, count + ack))
		goto unlock;

	for (i = 0; i < count; i++)
		put_command(iq, &commands[i]);
	if (ack) {
		struct extlb_command wait = {
			.kind = EXTLB_COMMAND_KIND_WAIT,
			.flags = EXTLB_WAIT_WRITE | EXTLB_WAIT_CLEARED |
				 EXTLB_WAIT_DRAINED,
			.addr = dev->shadow_dma +
				offsetof(struct extlb_kernel_shadow,
					 wait[EXTLB_WAIT_ACK]),
		};

		seq = ++iq->seq;
		wait.value = seq;
		put_command(iq, &wait);
	}
	publish(dev);
unlock:
	spin_unlock(&iq->lock);
	return seq;
}

/**
 * extlb_iq_try_post() - post a command that is not worth waiting for room
 * @dev: the device
 * @command: the command; nobody learns when it was carried out
 *
 * Return: whether it was posted, or the device is dead.
 */
bool extlb_iq_try_post(struct extlb_dev *dev,
		       const struct extlb_command *command)
{
	struct extlb_iq *iq = &dev->iq;
	bool room, dead;
	u32 used;

	spin_lock(&iq->lock);
	dead = extlb_is_dead(dev);
	used = iq->tail - READ_ONCE(dev->shadow->iq_head);
	/* Half of it is for those who must. */
	room = !dead && used < iq->entries / 2;
	if (room) {
		put_command(iq, command);
		publish(dev);
	}
	spin_unlock(&iq->lock);
	return room || dead;
}

static bool acknowledged(struct extlb_dev *dev, u64 seq)
{
	/* Acquire: the page is reused only after the device let go of it. */
	u64 ack = smp_load_acquire(&dev->shadow->wait[EXTLB_WAIT_ACK]);

	return (s64)(ack - seq) >= 0;
}

/* Whether extlb_iq_wait() would not wait. */
bool extlb_iq_acknowledged(struct extlb_dev *dev, u64 seq)
{
	return acknowledged(dev, seq) || extlb_is_dead(dev);
}

/**
 * extlb_iq_wait() - wait until the device has acknowledged
 * @dev: the device
 * @seq: from extlb_iq_post()
 * @may_sleep: whether the caller may
 *
 * When it returns, the device does not access what the invalidation was about:
 * either it said so, or it was fenced off.
 */
void extlb_iq_wait(struct extlb_dev *dev, u64 seq, bool may_sleep)
{
	unsigned int spins = 0;
	u64 begin = 0;

	while (!acknowledged(dev, seq) && !extlb_is_dead(dev)) {
		/* What takes fewer spins than this is not worth a clock. */
		if (++spins % 64 == 0) {
			if (!begin)
				begin = ktime_get_mono_fast_ns();
			else if (is_over(begin))
				extlb_fence(dev, "no acknowledgment of an invalidation");
		}
		if (may_sleep && spins > SPINS_BEFORE_SLEEP)
			usleep_range(20, 50);
		else
			cpu_relax();
	}
	/* The fence, too: the caller has waited for it. */
	if (begin)
		note_wait(&dev->iq, begin);
}
