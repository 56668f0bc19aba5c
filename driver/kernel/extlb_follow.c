// SPDX-License-Identifier: GPL-2.0
/*
 * The ways to follow a process, of which the kernel that this is built for
 * decides which there are; and which one a context takes.
 */
#include <linux/array_size.h>
#include <linux/moduleparam.h>
#include <linux/printk.h>
#include <linux/string.h>

#include "extlb.h"

static const struct extlb_follow_ops * const ways[] = {
#if IS_ENABLED(CONFIG_PTE_NOTIFIERS)
	&extlb_follow_pte,
#endif
#if IS_ENABLED(CONFIG_MMU_NOTIFIER)
	&extlb_follow_mmu,
	&extlb_follow_interval,
#endif
	&extlb_follow_pinned,
};

static char *follow = IS_ENABLED(CONFIG_PTE_NOTIFIERS) ? "pte" :
		      IS_ENABLED(CONFIG_MMU_NOTIFIER) ? "mmu" : "pinned";
module_param(follow, charp, 0444);
MODULE_PARM_DESC(follow,
		 "How the device follows the process unless the program says: pte, mmu, interval or pinned (default: the first of them that this kernel has)");

/* Flags that CREATE takes. */
u32 extlb_follow_flags(void)
{
	u32 flags = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(ways); i++)
		flags |= ways[i]->flag;
	return flags;
}

/* The way that a flag of CREATE stands for; NULL if there is none here. */
const struct extlb_follow_ops *extlb_follow_by_flag(u32 flag)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(ways); i++) {
		if (ways[i]->flag == flag)
			return ways[i];
	}
	return NULL;
}

/* The way that the module parameter stands for; NULL, and says so, if none. */
const struct extlb_follow_ops *extlb_follow_default(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(ways); i++) {
		if (!strcmp(ways[i]->name, follow))
			return ways[i];
	}
	pr_err(KBUILD_MODNAME ": follow=%s is unknown, or not possible with this kernel\n",
	       follow);
	return NULL;
}
