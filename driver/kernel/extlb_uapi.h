/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * Interface of the extlb driver.
 *
 * Printed from the extlb-spec crate; do not edit. To print it again:
 *   cargo run -p extlb-spec --bin extlb-headers
 */
#ifndef _UAPI_LINUX_EXTLB_H
#define _UAPI_LINUX_EXTLB_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define EXTLB_UAPI_VERSION 1

#define EXTLB_MMAP_DOORBELL 0

#define EXTLB_MMAP_SHADOW 4096

#define EXTLB_HISTOGRAM_BUCKETS 320

#define EXTLB_WORK_MAX_LEN 0x80000000

#define EXTLB_WORK_MAX_BATCH 4096

#define EXTLB_WORK_MAX_SEGMENTS 4096

#define EXTLB_WORK_RING_LOG2_MIN 1

#define EXTLB_WORK_RING_LOG2_MAX 12

/* Flags of `CREATE`. */
/* Follow the process with pte notifiers. */
#define EXTLB_CREATE_FOLLOW_PTE 1
/* Pin registered pages (FOLL_LONGTERM), as drivers without notifiers must. */
#define EXTLB_CREATE_FOLLOW_PINNED 2
/* Follow the process with an mmu notifier: told whenever the kernel flushes its TLBs. */
#define EXTLB_CREATE_FOLLOW_MMU 4
/* Follow the process with mmu interval notifiers: told before the kernel changes ptes. */
#define EXTLB_CREATE_FOLLOW_INTERVAL 8

/* Operations. */
/* Does nothing, and completes. */
#define EXTLB_OPCODE_NOP 0
/*
 * Copies `len` bytes from `src` to `dst`. The ranges may overlap: the result is as if all
 * had been read before any was written. To that end it goes from the highest address
 * down if `dst` lies in (`src`, `src` + `len`), from the lowest up otherwise. Overlap is
 * judged by these addresses; that of pages mapped twice, or of lists, has no defined
 * result, but stays within the destination.
 */
#define EXTLB_OPCODE_COPY 1
/* Writes the pattern `arg` to `len` bytes at `dst`; the last repetition may be cut. */
#define EXTLB_OPCODE_FILL 2
/* CRC32C (Castagnoli) of `len` bytes at `src`, into `Completion::result`. */
#define EXTLB_OPCODE_CRC32C 3
/* Compares `len` bytes at `src` and `dst`; `result` is the offset of the first difference. */
#define EXTLB_OPCODE_COMPARE 4
/*
 * Adds `arg` to the 8 bytes at `dst`, modulo 2^64, once and atomically, also against the
 * processors; `result` is what was there before.
 */
#define EXTLB_OPCODE_FETCH_ADD 5
/*
 * Writes `src` (a value, not an address) to the 8 bytes at `dst` if they are `arg`;
 * atomically likewise. `result` is what was there before: if it is `arg`, it was written.
 * Needs a page that may be written either way.
 */
#define EXTLB_OPCODE_COMPARE_SWAP 6
/*
 * Ends when every earlier operation of the queue has ended and its data is visible.
 * `result` is the number of those since the last fence that did not end with success;
 * `EarlierFailed` if there are any.
 */
#define EXTLB_OPCODE_FENCE 7
/*
 * Runs the `len` descriptors at `src`, a multiple of 64, in order, each with a completion
 * of its own. Then `bytes` is the number of those that ended, and `result` of those that
 * did not end with success. A fence among them that ends with `EarlierFailed` ends the
 * batch likewise.
 */
#define EXTLB_OPCODE_BATCH 8

/* Bits of `Descriptor::flags`. */
/*
 * Count the completion in `event_seq` and raise the completion interrupt. One interrupt
 * may stand for several completions.
 */
#define EXTLB_WORK_INTERRUPT 1
/*
 * `src` is the address of a list of `src_segments` segments, a multiple of 16; their
 * lengths add up to `len`. For copy, CRC32C and compare.
 */
#define EXTLB_WORK_SRC_LIST 2
/* Likewise `dst` and `dst_segments`. For copy, fill and compare. */
#define EXTLB_WORK_DST_LIST 4
/* No completion record on success; the interrupt, if asked for, comes all the same. */
#define EXTLB_WORK_QUIET 8

/* Bits of `Completion::fault`. */
/* Page fault: the access was a write. */
#define EXTLB_FAULT_WRITE 1
/*
 * A copy that ended early had gone from the highest address down: `bytes` are the last
 * ones, not the first.
 */
#define EXTLB_FAULT_FROM_END 2

/* How an operation ended. */
/* Not yet. */
#define EXTLB_STATUS_PENDING 0
/* All done. */
#define EXTLB_STATUS_SUCCESS 1
/* `fault_addr` is not mapped, or not writable, and software would not map it. */
#define EXTLB_STATUS_PAGE_FAULT 2
/*
 * Unknown opcode, unknown flag, a flag that the opcode does not take, or a reserved field
 * that is not zero.
 */
#define EXTLB_STATUS_BAD_DESCRIPTOR 3
/* `len` is more than the largest, or not what the operation takes. */
#define EXTLB_STATUS_BAD_LENGTH 4
/* An address range leaves the 48-bit address space; `fault_addr` is its start. */
#define EXTLB_STATUS_BAD_ADDRESS 5
/* The page table is broken at `fault_addr`: reserved bits, or an address outside RAM. */
#define EXTLB_STATUS_BUS_ERROR 6
/* Compare found a difference. */
#define EXTLB_STATUS_MISMATCH 7
/* `fault_addr` is not aligned as the operation needs it. */
#define EXTLB_STATUS_MISALIGNED 8
/* A fence, or a batch with such a fence: earlier operations did not end with success. */
#define EXTLB_STATUS_EARLIER_FAILED 9
/*
 * The segments of a list are too many, or do not add up to `len`. Found when the list is
 * read, piece by piece: `bytes` are done.
 */
#define EXTLB_STATUS_BAD_SEGMENTS 10
/* A batch within a batch. */
#define EXTLB_STATUS_NESTED_BATCH 11

/* Why one context stopped while the others go on. */
/* Its entry of the context table makes no sense. */
#define EXTLB_CONTEXT_ERROR_BAD_ENTRY 1
/* The tail is further ahead than the ring is long. */
#define EXTLB_CONTEXT_ERROR_RING_OVERRUN 2
/* A descriptor could not be read: its page request was refused, or the page table is broken. */
#define EXTLB_CONTEXT_ERROR_RING_FAULT 3
/* A completion record could not be written. */
#define EXTLB_CONTEXT_ERROR_COMPLETION_FAULT 4
/* The shadow page could not be accessed. */
#define EXTLB_CONTEXT_ERROR_SHADOW 5
/* Software answered a page request with failure. */
#define EXTLB_CONTEXT_ERROR_PAGE_REQUEST_FAILED 6

/*
 * A work descriptor, an entry of the ring. It must not change until it is retired; the device
 * may read it any number of times until then.
 */
struct extlb_descriptor {
	/* An `Opcode`. */
	__u8 opcode;
	/* See the descriptor flags. */
	__u8 flags;
	/* Zero. */
	__u16 reserved0;
	/* Zero. */
	__u32 reserved1;
	/*
	 * Where to read; of a list, the address of the list; of a batch, of the descriptors.
	 * Compare-swap: the value to write.
	 */
	__u64 src;
	/* Where to write; second operand of a compare; or the address of a list. */
	__u64 dst;
	/*
	 * Bytes, 0 to 2 GiB, any alignment. Fetch-add and compare-swap: 8. Batch: the number of
	 * descriptors.
	 */
	__u64 len;
	/* Address of the completion record, a multiple of 32. */
	__u64 completion;
	/*
	 * Fill: the pattern of 8 bytes, from `dst` on. CRC32C: the CRC to go on from, 0 at first.
	 * Fetch-add: what to add. Compare-swap: what to compare with.
	 */
	__u64 arg;
	/* Not looked at; for the program. */
	__u64 user;
	/* Segments of the list at `src`; zero without `SRC_LIST`. */
	__u32 src_segments;
	/* Segments of the list at `dst`; zero without `DST_LIST`. */
	__u32 dst_segments;
};

/* A piece of an operand that is given as a list (scatter/gather). */
struct extlb_segment {
	/* Address, any alignment. */
	__u64 addr;
	/* Bytes, may be 0. */
	__u64 len;
};

/*
 * A completion record. The device writes the other fields first and `status` last (release),
 * as one aligned word, after every byte of the operation is visible.
 */
struct extlb_completion {
	/* A `Status`; the program sets it to 0 before it submits. */
	__u32 status;
	/* See the fault bits. */
	__u32 fault;
	/* Bytes done from the start; on a fault all bytes below are done. */
	__u64 bytes;
	/* The address that faulted. */
	__u64 fault_addr;
	/* The result of the operation. */
	__u64 result;
};

/*
 * A context's shadow page: doorbell and state in RAM, so that a busy queue costs no exit
 * from the guest. Each word has a cache line of its own. The program can write all of the
 * page; the device trusts none of it, and keeps its own copy of what it wrote.
 *
 * To submit: write descriptors; store `tail` (release); full fence; load `need_kick`; if
 * it is not 0, write the context's doorbell page. The device does the mirror image before
 * it sleeps: store `need_kick` = 1; full fence; load `tail`; sleep only if nothing is new.
 * So at least one of both sees the other.
 */
struct extlb_context_shadow {
	/* Index after the last descriptor submitted. Written by the program. */
	__u32 tail;
	/* Zero. */
	__u32 pad0[15];
	/* Index after the last descriptor retired; its slot may be used again. By the device. */
	__u32 head;
	/* Zero. */
	__u32 pad1[15];
	/* Not 0: the device sleeps and wants a doorbell write. By the device. */
	__u32 need_kick;
	/* Zero. */
	__u32 pad2[15];
	/* Number of completions so far that asked for an interrupt. By the device. */
	__u32 event_seq;
	/* Zero. */
	__u32 pad3[15];
	/* Why the context stopped: a `ContextError`, 0 while it runs. By the device. */
	__u32 error;
	/* Zero. */
	__u32 pad4;
	/* The address that the error is about. By the device, before `error`. */
	__u64 error_addr;
	/* Zero. */
	__u32 pad5[956];
};

/* See `INFO`. */
struct extlb_info {
	/* Version of the interface. */
	__u32 version;
	/* Flags that `CREATE` takes here. */
	__u32 create_flags;
	/* Contexts of the device. */
	__u32 contexts;
	/* 1 if the device has the oracle. */
	__u32 oracle;
	/* Largest log2 of a work ring. */
	__u32 max_ring_log2;
	/* Zero. */
	__u32 reserved0;
	/* Zero. */
	__u64 reserved1;
};

/* See `CREATE`. */
struct extlb_create {
	/*
	 * Address of the work ring, a multiple of 4096; registered by the program like any
	 * other memory, before it submits.
	 */
	__u64 ring;
	/* log2 of its number of descriptors. */
	__u32 ring_log2;
	/* One of the create flags; 0 takes the driver's default. */
	__u32 flags;
	/* Returned: the number of the context. */
	__u32 context;
	/* Zero. */
	__u32 reserved0;
	/* Zero. */
	__u64 reserved1;
};

/* See `REGISTER`. */
struct extlb_register {
	/* Start, a multiple of 4096. */
	__u64 addr;
	/* Bytes, a multiple of 4096, not 0. */
	__u64 len;
	/* Zero. */
	__u32 flags;
	/* Returned: names the registration. */
	__u32 handle;
	/* Zero. */
	__u64 reserved0;
};

/* See `UNREGISTER`. */
struct extlb_unregister {
	/* From `REGISTER`. */
	__u32 handle;
	/* Zero. */
	__u32 reserved0;
};

/* See `STATS`. Counters of this context, unless said otherwise. */
struct extlb_stats {
	/* Times that the kernel took pages from the device and waited for its acknowledgment. */
	__u64 shootdowns;
	/* Device ptes cleared by them. */
	__u64 shot_pages;
	/* Page requests served. */
	__u64 page_requests;
	/* Page requests refused. */
	__u64 refused_requests;
	/* Device ptes installed. */
	__u64 filled_pages;
	/* Device ptes present now. */
	__u64 mapped_pages;
	/* Pages pinned now. */
	__u64 pinned_pages;
	/* Longest shootdown, in ns. */
	__u64 shootdown_max_ns;
	/* Device: operations that ended with success. */
	__u64 ops_completed;
	/* Device: operations that ended otherwise. */
	__u64 ops_faulted;
	/* Device: accesses that the oracle compared. */
	__u64 oracle_checks;
	/* Device: accesses that differed for a while. */
	__u64 oracle_suspects;
	/* Device: stale accesses. */
	__u64 oracle_stale;
	/* Calls of the memory manager, whether or not the device had something there. */
	__u64 callbacks;
	/* Times that pages were looked up for the device and changed before it had them. */
	__u64 retried_fills;
	/* Zero. */
	__u64 reserved;
	/*
	 * Latency of shootdowns in ns, from the call to the acknowledgment; for the buckets
	 * see the histogram's definition.
	 */
	__u64 shootdown_ns[320];
};

/* See `AUDIT`. */
struct extlb_audit {
	/* Returned: translations compared. */
	__u64 checked;
	/* Returned: those that differ, and stayed so. */
	__u64 mismatches;
	/* Returned: the first of them. */
	__u64 iova;
	/* Returned: what the device would access there. */
	__u64 device_gpa;
	/* Returned: what the process has there; all ones for nothing. */
	__u64 cpu_gpa;
	/* Zero. */
	__u64 reserved[3];
};

/* What the driver can do. */
#define EXTLB_IOC_INFO _IOWR(0xeb, 0, struct extlb_info)

/* Makes this open file a context. `EBUSY`: it is one, or all contexts are taken. */
#define EXTLB_IOC_CREATE _IOWR(0xeb, 1, struct extlb_create)

/*
 * Lets the device use a range of addresses: pages follow the process, nothing is locked
 * (or, in a pinned context, all pages are locked now). The range must be mapped.
 */
#define EXTLB_IOC_REGISTER _IOWR(0xeb, 2, struct extlb_register)

/* Takes a range back. When it returns the device cannot touch it through this range. */
#define EXTLB_IOC_UNREGISTER _IOWR(0xeb, 3, struct extlb_unregister)

/* Counters of this context and of the device. */
#define EXTLB_IOC_STATS _IOWR(0xeb, 4, struct extlb_stats)

/*
 * Lets the device compare its translations with the process's page table. `EOPNOTSUPP`
 * without the oracle. Transient differences are looked at again before they are reported.
 */
#define EXTLB_IOC_AUDIT _IOWR(0xeb, 5, struct extlb_audit)

#endif /* _UAPI_LINUX_EXTLB_H */
