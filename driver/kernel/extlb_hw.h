/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Registers and memory formats of the extlb device.
 *
 * Printed from the extlb-spec crate; do not edit. To print it again:
 *   cargo run -p extlb-spec --bin extlb-headers
 */
#ifndef _EXTLB_HW_H
#define _EXTLB_HW_H

#include <linux/build_bug.h>
#include <linux/types.h>

#define EXTLB_PCI_VENDOR_ID 4660

#define EXTLB_PCI_DEVICE_ID 0xe71b

#define EXTLB_BAR_REGS 0

#define EXTLB_BAR_DOORBELLS 2

#define EXTLB_DOORBELL_STRIDE 4096

#define EXTLB_MAX_CONTEXTS 256

#define EXTLB_IOVA_BITS 48

#define EXTLB_ID_VALUE 0x424c5845

#define EXTLB_VERSION_VALUE 0x10002

#define EXTLB_RING_LOG2_MIN 4

#define EXTLB_RING_LOG2_MAX 15

#define EXTLB_ORACLE_RECORDS 32

#define EXTLB_REQUEST_PAGES_MAX 64

#define EXTLB_VECTORS 4

#define EXTLB_PTE_LEVELS 4

#define EXTLB_PTE_ADDR_MASK 0xffffffffff000ULL

/* Identity: "EXLB". */
#define EXTLB_REG_ID 0x0

/* Interface version: major in bits 31:16, minor in bits 15:0. */
#define EXTLB_REG_VERSION 0x4

/* Capabilities, see the cap bits. */
#define EXTLB_REG_CAP 0x8

/* Control, see the ctrl bits. */
#define EXTLB_REG_CTRL 0x10

/* Status, see the status bits. */
#define EXTLB_REG_STATUS 0x14

/* Why the device stopped: a `FatalError`, 0 while it has not. */
#define EXTLB_REG_ERROR 0x18

/* What the fatal error is about: an address or an index. */
#define EXTLB_REG_ERROR_INFO 0x20

/* Guest-physical address of the context table. */
#define EXTLB_REG_CTX_TABLE 0x28

/* Number of entries of the context table, 1 to 256. */
#define EXTLB_REG_CTX_COUNT 0x30

/* Guest-physical address of the invalidation queue. */
#define EXTLB_REG_IQ_BASE 0x38

/* log2 of the number of entries of the invalidation queue. */
#define EXTLB_REG_IQ_LOG2 0x40

/* Guest-physical address of the page request ring. */
#define EXTLB_REG_PRQ_BASE 0x48

/* log2 of the number of entries of the page request ring. */
#define EXTLB_REG_PRQ_LOG2 0x50

/* Guest-physical address of the kernel's shadow page. */
#define EXTLB_REG_SHADOW 0x58

/* Asks the device to look at the kernel's shadow page again; the value does not matter. */
#define EXTLB_REG_KICK 0x60

/* Work operations that ended with success. */
#define EXTLB_REG_OPS_COMPLETED 0x100

/* Work operations that ended otherwise. */
#define EXTLB_REG_OPS_FAULTED 0x108

/* Bytes moved for work operations. */
#define EXTLB_REG_BYTES 0x110

/* Translations served by the TLB. */
#define EXTLB_REG_TLB_HITS 0x118

/* Translations that walked. */
#define EXTLB_REG_TLB_MISSES 0x120

/* Valid TLB entries replaced by another. */
#define EXTLB_REG_TLB_EVICTIONS 0x128

/* TLB entries removed by invalidation commands. */
#define EXTLB_REG_TLB_SHOT_DOWN 0x130

/* Invalidation commands done. */
#define EXTLB_REG_INVALIDATIONS 0x138

/* Drains done. */
#define EXTLB_REG_DRAINS 0x140

/* Page requests sent. */
#define EXTLB_REG_PAGE_REQUESTS 0x148

/* Page responses for no waiting request: late, repeated, or for a context that ended. */
#define EXTLB_REG_STRAY_RESPONSES 0x150

/* Accesses for work operations, by translation, that no RAM answered. Since 1.1. */
#define EXTLB_REG_BUS_ERRORS 0x158

/* Accesses that the oracle compared with the process's own page table. */
#define EXTLB_REG_ORACLE_CHECKS 0x180

/* Accesses that differed; each must be closed by an invalidation that covers it. */
#define EXTLB_REG_ORACLE_SUSPECTS 0x188

/* Stale accesses: the rule was broken. Stays 0 on a correct system. */
#define EXTLB_REG_ORACLE_STALE 0x190

/* Selects the record shown below; the first records since reset are kept. */
#define EXTLB_REG_ORACLE_SELECT 0x198

/* Kind of the selected record: a `StaleKind`, 0 for no record. */
#define EXTLB_REG_ORACLE_KIND 0x1a0

/* Context of the selected record. */
#define EXTLB_REG_ORACLE_CONTEXT 0x1a4

/* I/O virtual address of the access. */
#define EXTLB_REG_ORACLE_IOVA 0x1a8

/* Guest-physical address that the device used. */
#define EXTLB_REG_ORACLE_DEVICE_GPA 0x1b0

/*
 * Guest-physical address in the process's page table; all ones for not present, or for a
 * write where the process may not write.
 */
#define EXTLB_REG_ORACLE_CPU_GPA 0x1b8

/* Number of the TLB fill that the access used. */
#define EXTLB_REG_ORACLE_FILL 0x1c0

/* Number of the last invalidation done at the time. */
#define EXTLB_REG_ORACLE_INVALIDATION 0x1c8

/*
 * Selects the context whose statistics, since the last reset, are shown below. Since 1.2,
 * as are they.
 */
#define EXTLB_REG_CTX_STAT_SELECT 0x1d0

/* Translations of the selected context served by the TLB. */
#define EXTLB_REG_CTX_TLB_HITS 0x1d8

/* Translations of it that walked. */
#define EXTLB_REG_CTX_TLB_MISSES 0x1e0

/* Walks that found a leaf; the others ended in a page request or an error. */
#define EXTLB_REG_CTX_WALKS 0x1e8

/* Walks that began at a table that the walk cache knew, and not at the root. */
#define EXTLB_REG_CTX_WALK_CACHE_HITS 0x1f0

/* Valid TLB entries, of any context, replaced by fills of it. */
#define EXTLB_REG_CTX_TLB_EVICTIONS 0x1f8

/* TLB entries of it removed by invalidation commands. */
#define EXTLB_REG_CTX_TLB_SHOT_DOWN 0x200

/* MSI-X vectors. */
/* Fatal device error; read `STATUS` and `ERROR`. */
#define EXTLB_VECTOR_ERROR 0
/* The page request ring has new records. */
#define EXTLB_VECTOR_PAGE_REQUEST 1
/* An invalidation wait command with the interrupt flag completed. */
#define EXTLB_VECTOR_INVALIDATION 2
/* A work descriptor with the interrupt flag completed; see `event_seq` of the contexts. */
#define EXTLB_VECTOR_COMPLETION 3

/* Bits of `CTRL`. */
/* Run. Setting it checks the configuration; clearing it stops and drains. */
#define EXTLB_CTRL_ENABLE 1
/* Write 1 to reset the device; reads as 0. When a later read returns, all is done. */
#define EXTLB_CTRL_RESET 2

/* Bits of `STATUS`. */
/* The device runs. */
#define EXTLB_STATUS_ENABLED 1
/* The device stopped on a fatal error; only a reset helps. */
#define EXTLB_STATUS_FATAL 2

/* Fields of `CAP`. */
/* log2 of the number of contexts. */
#define EXTLB_CAP_CONTEXTS_LOG2_MASK 255
/* Width of an I/O virtual address. */
#define EXTLB_CAP_IOVA_BITS_MASK 0xff00
/* log2 of the largest invalidation queue and page request ring. */
#define EXTLB_CAP_RING_LOG2_MASK 0xff0000
/* The device has the oracle: it compares its translations with the process's own. */
#define EXTLB_CAP_ORACLE 0x100000000ULL

/* Why a device stopped. */
/* A register holds what the device cannot run with. */
#define EXTLB_FATAL_ERROR_BAD_CONFIG 1
/* An entry of the invalidation queue could not be read. */
#define EXTLB_FATAL_ERROR_IQ_FETCH 2
/* An entry of the invalidation queue makes no sense. */
#define EXTLB_FATAL_ERROR_BAD_COMMAND 3
/* The tail of the invalidation queue is further ahead than the queue is long. */
#define EXTLB_FATAL_ERROR_IQ_OVERRUN 4
/* An entry of the context table could not be read. */
#define EXTLB_FATAL_ERROR_CONTEXT_TABLE 5
/* The page request ring could not be written. */
#define EXTLB_FATAL_ERROR_PRQ_WRITE 6
/* The word that a wait command names could not be written. */
#define EXTLB_FATAL_ERROR_WAIT_WRITE 7
/* The kernel's shadow page could not be accessed. */
#define EXTLB_FATAL_ERROR_SHADOW 8

/* What makes an access stale. */
/*
 * The translation differed from the process's page table, and no invalidation that
 * covers it came within the bound.
 */
#define EXTLB_STALE_KIND_NOT_INVALIDATED 1
/* The translation differed, and was older than an invalidation that covers it. */
#define EXTLB_STALE_KIND_SURVIVED_INVALIDATION 2
/* The access was still running when a drain that should have waited was acknowledged. */
#define EXTLB_STALE_KIND_OUTLIVED_DRAIN 3
/* An audit found a translation that differs, and it stayed so. */
#define EXTLB_STALE_KIND_AUDIT 4

/* Bits of `ContextEntry::flags`. */
/* The context runs. A sync command that finds it clear stops the context. */
#define EXTLB_CONTEXT_VALID 1
/* `cpu_page_table` is valid: the oracle watches this context. */
#define EXTLB_CONTEXT_ORACLE 2

/* Bits of a page table entry. */
/* The entry is valid; if clear the device looks at no other bit. */
#define EXTLB_PTE_PRESENT 1
/* The device may write. Looked at in leaves only. */
#define EXTLB_PTE_WRITE 2
/* Set by the device when it used the leaf. */
#define EXTLB_PTE_ACCESSED 32
/* Set by the device when it wrote through the leaf. */
#define EXTLB_PTE_DIRTY 64
/* A leaf above level 1. */
#define EXTLB_PTE_LEAF 128

/* What a record of the page request ring says. */
/* Map a page and respond. */
#define EXTLB_REQUEST_KIND_PAGE 1
/* A context stopped on an error; there is no response. */
#define EXTLB_REQUEST_KIND_CONTEXT_ERROR 2

/* Bits of `PageRequest::flags`. */
/* The access is a write. */
#define EXTLB_REQUEST_WRITE 1

/* Answer to a page request. */
/* The page was mapped; the device walks again (and may ask again). */
#define EXTLB_RESPONSE_SUCCESS 0
/* There is no such page: the operation ends with a page fault. */
#define EXTLB_RESPONSE_INVALID 1
/* It could not be served: the context stops with an error. */
#define EXTLB_RESPONSE_FAILURE 2

/* Commands. */
/* Forget translations: of a range, of a context, or all. */
#define EXTLB_COMMAND_KIND_INVALIDATE 1
/* Acknowledge the commands before this one. */
#define EXTLB_COMMAND_KIND_WAIT 2
/*
 * Read the context's entry again: start it, change it or stop it. A stopped context
 * starts no new access, its operations end without a completion, and its
 * translations are forgotten; a drained wait behind it tells when it is silent. A
 * context with the same ring and shadow page as before goes on where it was, with the
 * new entry; else, and after a stop, it starts anew with an empty ring. One that has
 * failed stays so until it starts anew.
 */
#define EXTLB_COMMAND_KIND_CONTEXT_SYNC 3
/* Answer a page request. One that nobody waits for is counted and ignored. */
#define EXTLB_COMMAND_KIND_PAGE_RESPONSE 4
/*
 * Compare every translation of the context, in the TLB and in its page table, with the
 * process's own page table, and write an `AuditResult` at `addr`, a multiple of 64. A
 * debug feature.
 */
#define EXTLB_COMMAND_KIND_AUDIT 5

/* What an invalidation covers. */
/* `[addr, addr + value)` of a context. */
#define EXTLB_INVALIDATION_SCOPE_RANGE 0
/* All of a context. */
#define EXTLB_INVALIDATION_SCOPE_CONTEXT 1
/* Everything. */
#define EXTLB_INVALIDATION_SCOPE_ALL 2

/* Flags of a wait command. */
/* Write the 8 bytes `value` at `addr`, a multiple of 8, when done. */
#define EXTLB_WAIT_WRITE 1
/* Raise the invalidation interrupt when done (after the write). */
#define EXTLB_WAIT_INTERRUPT 2
/*
 * Done means: the commands before were carried out, no translation that they name is
 * in the TLB or comes back from before.
 */
#define EXTLB_WAIT_CLEARED 16
/*
 * Done means in addition: every access that began before has ended, and its data is in
 * RAM. Without either flag, done means that the commands before were read.
 */
#define EXTLB_WAIT_DRAINED 32

/* Flags of an audit command. */
/* The last look: each difference that it finds is a stale access. */
#define EXTLB_AUDIT_FLAG_FINAL 1

/* Entry of the context table, in guest RAM, read when a `ContextSync` command names it. */
struct extlb_context_entry {
	/* See the context flags. */
	__u64 flags;
	/* Guest-physical address of the root of the device's page table, a multiple of 4096. */
	__u64 page_table;
	/* I/O virtual address of the work queue's ring, a multiple of 4096. */
	__u64 ring;
	/* log2 of the number of descriptors of the ring, 1 to 12. */
	__u32 ring_log2;
	/* How many page requests of the context may wait for a response at once, at least 1. */
	__u32 credits;
	/* Guest-physical address of the context's shadow page, a multiple of 4096. */
	__u64 shadow;
	/*
	 * Guest-physical address of the root of the process's own page table (x86-64, four
	 * levels); looked at if the oracle flag is set.
	 */
	__u64 cpu_page_table;
	/*
	 * Share of the engine's time against contexts that have work at the same time, 0 to 64;
	 * 0 means 1.
	 */
	__u32 weight;
	/* Zero. */
	__u32 reserved0;
	/* Zero. */
	__u64 reserved1;
};

static_assert(sizeof(struct extlb_context_entry) == 64);

/* A record of the page request ring. */
struct extlb_page_request {
	/* A `RequestKind`. */
	__u32 kind;
	/* The context. */
	__u32 context;
	/* Page request: the address of the page. Context error: what it is about. */
	__u64 iova;
	/*
	 * How many pages from `iova` on the operation is going to need in the same way, 1 to 64.
	 * Only the first is waited for.
	 */
	__u32 pages;
	/* See the request flags. */
	__u32 flags;
	/* Names the request in its response. Unique among the waiting requests of a context. */
	__u32 group;
	/* Context error: a `ContextError`. */
	__u32 code;
};

static_assert(sizeof(struct extlb_page_request) == 32);

/* A command of the invalidation queue. */
struct extlb_command {
	/* A `CommandKind`. */
	__u32 kind;
	/* By kind: an `InvalidationScope`, wait flags, a `Response`, or audit flags; else zero. */
	__u32 flags;
	/* The context; zero for kinds that have none. */
	__u32 context;
	/* Page response: the group. Zero otherwise. */
	__u32 group;
	/* Range invalidation: start, a multiple of 4096. Wait, audit: where to write. */
	__u64 addr;
	/* Range invalidation: bytes, a multiple of 4096. Wait: what to write. */
	__u64 value;
};

static_assert(sizeof(struct extlb_command) == 32);

/* What an audit found. */
struct extlb_audit_result {
	/* Translations compared. */
	__u64 checked;
	/* Those that the process's page table does not have, or has with fewer rights. */
	__u64 mismatches;
	/* The first of them: its I/O virtual address. */
	__u64 iova;
	/* What the device would access there. */
	__u64 device_gpa;
	/* What the process has there; all ones for nothing. */
	__u64 cpu_gpa;
	/* Zero. */
	__u64 reserved0;
	/* Zero. */
	__u64 reserved1;
	/* 1, written last. */
	__u64 done;
};

static_assert(sizeof(struct extlb_audit_result) == 64);

/*
 * The kernel's shadow page: heads and tails of the privileged rings.
 *
 * The handshake of `iq_tail` with `iq_need_kick`, and of `prq_head` with `prq_need_kick`,
 * is the one of the context's shadow page; the kick is a write to the `KICK` register.
 */
struct extlb_kernel_shadow {
	/* Index after the last command. Written by the kernel. */
	__u32 iq_tail;
	/* Zero. */
	__u32 pad0[15];
	/* Index after the last command done; its slot may be used again. By the device. */
	__u32 iq_head;
	/* Zero. */
	__u32 pad1[15];
	/* Not 0: the device sleeps and wants a kick. By the device. */
	__u32 iq_need_kick;
	/* Zero. */
	__u32 pad2[15];
	/* Index after the last page request. By the device. */
	__u32 prq_tail;
	/* Zero. */
	__u32 pad3[15];
	/* Index after the last page request consumed. Written by the kernel. */
	__u32 prq_head;
	/* Zero. */
	__u32 pad4[15];
	/* Not 0: the page request ring is full, the device wants a kick when there is room. */
	__u32 prq_need_kick;
	/* Zero. */
	__u32 pad5[15];
	/* Free for the kernel: where it lets wait commands write. */
	__u64 wait[464];
};

static_assert(sizeof(struct extlb_kernel_shadow) == 4096);

#endif /* _EXTLB_HW_H */
