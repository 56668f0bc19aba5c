/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The interface of the kernel's own test driver for device page tables
 * (lib/test_hmm.c), with the device behind it: what the files of it share.
 */
#ifndef _EXTLB_HMM_H
#define _EXTLB_HMM_H

#include <linux/ioctl.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/types.h>

#include "extlb.h"

/* Numbers and structure are those of lib/test_hmm_uapi.h. */
struct extlb_hmm_cmd {
	__u64 addr;	/* in: where the device reads or writes */
	__u64 ptr;	/* in: where the data go to or come from */
	__u64 npages;	/* in */
	__u64 cpages;	/* out: pages done */
	__u64 faults;	/* out: page requests of the device */
};

#define EXTLB_HMM_READ			_IOWR('H', 0, struct extlb_hmm_cmd)
#define EXTLB_HMM_WRITE			_IOWR('H', 1, struct extlb_hmm_cmd)
#define EXTLB_HMM_MIGRATE_TO_DEV	_IOWR('H', 2, struct extlb_hmm_cmd)
#define EXTLB_HMM_MIGRATE_TO_SYS	_IOWR('H', 3, struct extlb_hmm_cmd)
#define EXTLB_HMM_SNAPSHOT		_IOWR('H', 4, struct extlb_hmm_cmd)
#define EXTLB_HMM_EXCLUSIVE		_IOWR('H', 5, struct extlb_hmm_cmd)
#define EXTLB_HMM_CHECK_EXCLUSIVE	_IOWR('H', 6, struct extlb_hmm_cmd)
#define EXTLB_HMM_RELEASE		_IOWR('H', 7, struct extlb_hmm_cmd)

/* What a snapshot says of a page. */
#define EXTLB_HMM_PROT_NONE	0x00
#define EXTLB_HMM_PROT_READ	0x01
#define EXTLB_HMM_PROT_WRITE	0x02
#define EXTLB_HMM_PROT_PMD	0x04
#define EXTLB_HMM_PROT_PUD	0x08
#define EXTLB_HMM_PROT_ZERO	0x10
#define EXTLB_HMM_PROT_ERROR	0xff

/* Data are moved in pieces of so many bytes. */
#define EXTLB_HMM_BOUNCE	(64 * PAGE_SIZE)

/*
 * Memory of the driver that the device sees in the context, at addresses which
 * no process has.
 */
struct extlb_hmm_shared {
	struct extlb_descriptor ring[2];
	struct extlb_completion record;
	u8 bounce[EXTLB_HMM_BOUNCE] __aligned(PAGE_SIZE);
};

/* An open file. */
struct extlb_hmm_file {
	struct extlb_ctx *ctx;
	struct mutex lock;		/* one command at a time; all below */
	void __iomem *doorbell;
	struct extlb_hmm_shared *shared;
	u32 tail;
};

/* extlb_hmm_queue.c */
int extlb_hmm_queue_init(struct extlb_hmm_file *hmm);
void extlb_hmm_queue_free(struct extlb_hmm_file *hmm);
u64 extlb_hmm_bounce_iova(void);
int extlb_hmm_run(struct extlb_hmm_file *hmm, u64 src, u64 dst, u64 len,
		  struct extlb_completion *record);

/* extlb_hmm_copy.c */
int extlb_hmm_copy(struct extlb_hmm_file *hmm, struct extlb_hmm_cmd *cmd,
		   bool write);

/* extlb_hmm_snapshot.c */
int extlb_hmm_snapshot(struct extlb_hmm_cmd *cmd);

#endif /* _EXTLB_HMM_H */
