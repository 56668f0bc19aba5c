// SPDX-License-Identifier: GPL-2.0
/*
 * Does what must not be done, one thing for each of the kernel's checkers, to
 * see that it is noticed: insmod extlb_plant.ko what=NAME.
 */
#include <linux/cleanup.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timer.h>

static char *what = "";
module_param(what, charp, 0444);
MODULE_PARM_DESC(what, "lock, sleep, list, timer, free, leak or page");

/* Two locks, taken in either order: lockdep. */
static void plant_lock(void)
{
	static DEFINE_MUTEX(a);
	static DEFINE_MUTEX(b);

	scoped_guard(mutex, &a)
		scoped_guard(mutex, &b)
			cond_resched();
	scoped_guard(mutex, &b)
		scoped_guard(mutex, &a)
			cond_resched();
}

/* An allocation that may sleep, where nothing may: DEBUG_ATOMIC_SLEEP. */
static void plant_sleep(void)
{
	static DEFINE_SPINLOCK(lock);
	void *memory;

	spin_lock(&lock);
	memory = kmalloc(64, GFP_KERNEL);
	spin_unlock(&lock);
	kfree(memory);
}

/* An entry taken out of its list twice: DEBUG_LIST. */
static void plant_list(void)
{
	LIST_HEAD(head);
	struct list_head entry;

	list_add(&entry, &head);
	list_del(&entry);
	list_del(&entry);
}

static void plant_expire(struct timer_list *timer)
{
}

/* A timer that is set up anew while it runs: DEBUG_OBJECTS. */
static void plant_timer(void)
{
	static struct timer_list timer;

	timer_setup(&timer, plant_expire, 0);
	mod_timer(&timer, jiffies + HZ);
	timer_setup(&timer, plant_expire, 0);
	timer_delete_sync(&timer);
}

/* Memory that is used after it was freed: KASAN. */
static void plant_free(void)
{
	int *memory = kmalloc(64, GFP_KERNEL);

	if (!memory)
		return;
	kfree(memory);
	OPTIMIZER_HIDE_VAR(memory);
	WRITE_ONCE(*memory, 1);
}

/* Memory that nobody points to any more: kmemleak. */
static void plant_leak(void)
{
	void *memory = NULL;
	int i;

	/* Several: a word that happens to be left on a stack hides one of them. */
	for (i = 0; i < 8; i++) {
		memory = kmalloc(192, GFP_KERNEL);
		OPTIMIZER_HIDE_VAR(memory);
	}
}

/*
 * A write to a free page that no processor's instrumentation sees, as a
 * device's would be: PAGE_POISONING.
 */
static void plant_page(void)
{
	unsigned long page = __get_free_page(GFP_KERNEL);
	LIST_HEAD(taken);
	int i;

	if (!page)
		return;
	free_page(page);
	asm volatile("movq $0, (%0)" : : "r" (page + 64) : "memory");
	/* Until the page is handed out again, which is when it is looked at. */
	for (i = 0; i < 4096; i++) {
		struct page *next = alloc_page(GFP_KERNEL);

		if (!next)
			break;
		list_add(&next->lru, &taken);
		if (page_address(next) == (void *)page)
			break;
	}
	while (!list_empty(&taken)) {
		struct page *next = list_first_entry(&taken, struct page, lru);

		list_del(&next->lru);
		__free_page(next);
	}
}

static const struct {
	const char *name;
	void (*plant)(void);
} plants[] = {
	{ "lock", plant_lock },
	{ "sleep", plant_sleep },
	{ "list", plant_list },
	{ "timer", plant_timer },
	{ "free", plant_free },
	{ "leak", plant_leak },
	{ "page", plant_page },
};

static int __init plant_init(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(plants); i++) {
		if (!strcmp(plants[i].name, what)) {
			plants[i].plant();
			return 0;
		}
	}
	return -EINVAL;
}

static void __exit plant_exit(void)
{
}

module_init(plant_init);
module_exit(plant_exit);

MODULE_DESCRIPTION("Faults planted for the kernel's checkers");
MODULE_LICENSE("GPL");
