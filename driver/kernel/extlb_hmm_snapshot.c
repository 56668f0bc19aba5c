// SPDX-License-Identifier: GPL-2.0
/*
 * Snapshots: what the page table of the process has, page by page, without a
 * fault. It is the processor's table that is asked about, as in the test driver:
 * what a device could have without anybody's help. What this device has of it is
 * a cache, and may be less.
 */
#include <linux/hugetlb_inline.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "extlb.h"
#include "extlb_hmm.h"

#define CHUNK	64

static u8 of_leaf(bool writable, u8 size)
{
	return (writable ? EXTLB_HMM_PROT_WRITE : EXTLB_HMM_PROT_READ) | size;
}

static u8 of_pte(pte_t pte)
{
	if (!pte_present(pte) || pte_protnone(pte))
		return EXTLB_HMM_PROT_NONE;
	if (is_zero_pfn(pte_pfn(pte)))
		return EXTLB_HMM_PROT_ZERO | of_leaf(pte_write(pte), 0);
	if (pte_special(pte))
		return EXTLB_HMM_PROT_ERROR;
	return of_leaf(pte_write(pte), 0);
}

/*
 * Lockless, as get_user_pages_fast() does it: while interrupts are off no table
 * is freed. mmap_lock alone would not do, khugepaged takes tables away under the
 * locks of the file.
 */
static u8 walk(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgdp = pgd_offset(mm, addr), pgd = READ_ONCE(*pgdp);
	p4d_t *p4dp, p4d;
	pud_t *pudp, pud;
	pmd_t *pmdp, pmd;

	if (!pgd_present(pgd))
		return EXTLB_HMM_PROT_NONE;
	p4dp = p4d_offset_lockless(pgdp, pgd, addr);
	p4d = READ_ONCE(*p4dp);
	if (!p4d_present(p4d))
		return EXTLB_HMM_PROT_NONE;
	pudp = pud_offset_lockless(p4dp, p4d, addr);
	pud = READ_ONCE(*pudp);
	if (!pud_present(pud))
		return EXTLB_HMM_PROT_NONE;
	if (pud_leaf(pud))
		return of_leaf(pud_write(pud), EXTLB_HMM_PROT_PUD);
	pmdp = pmd_offset_lockless(pudp, pud, addr);
	pmd = pmdp_get_lockless(pmdp);
	if (!pmd_present(pmd) || pmd_protnone(pmd))
		return EXTLB_HMM_PROT_NONE;
	if (pmd_leaf(pmd))
		return of_leaf(pmd_write(pmd), EXTLB_HMM_PROT_PMD);
	return of_pte(ptep_get_lockless(pte_offset_kernel(&pmd, addr)));
}

static u8 look_at(struct mm_struct *mm, unsigned long addr)
{
	struct vm_area_struct *vma = vma_lookup(mm, addr);
	unsigned long flags;
	u8 prot;

	if (!vma || !(vma->vm_flags & VM_READ) ||
	    (vma->vm_flags & (VM_IO | VM_PFNMAP)))
		return EXTLB_HMM_PROT_ERROR;
	local_irq_save(flags);
	prot = walk(mm, addr);
	local_irq_restore(flags);
	return prot;
}

/* Of the current process. Return: 0, -EFAULT or -EINTR. */
int extlb_hmm_snapshot(struct extlb_hmm_cmd *cmd)
{
	void __user *user = u64_to_user_ptr(cmd->ptr);
	struct mm_struct *mm = current->mm;
	unsigned long addr = cmd->addr;
	u8 prots[CHUNK];
	int ret;

	while (cmd->cpages < cmd->npages) {
		u64 n = min(cmd->npages - cmd->cpages, (u64)CHUNK), i;

		ret = mmap_read_lock_killable(mm);
		if (ret)
			return ret;
		for (i = 0; i < n; i++, addr += PAGE_SIZE)
			prots[i] = look_at(mm, addr);
		mmap_read_unlock(mm);

		if (copy_to_user(user, prots, n))
			return -EFAULT;
		user += n;
		cmd->cpages += n;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}
