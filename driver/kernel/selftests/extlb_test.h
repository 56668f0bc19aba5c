/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A process with a context, registered memory and a work queue, for each test.
 */
#ifndef EXTLB_TEST_H
#define EXTLB_TEST_H

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <time.h>

#include "kselftest_harness.h"

#include "extlb_uapi.h"

#define PAGE		4096UL
#define DATA_PAGES	16
#define DATA_SIZE	(DATA_PAGES * PAGE)
#define RING_LOG2	4
#define RING_ENTRIES	16
/* An operation is done in microseconds, unless the machine has other things to do. */
#define PATIENCE_S	20

FIXTURE(extlb) {
	int fd;
	__u32 context;
	__u32 data_handle;
	struct extlb_descriptor *ring;
	struct extlb_completion *record;
	struct extlb_context_shadow *shadow;
	__u32 *doorbell;
	__u8 *data;
	__u32 tail;
};

/* 0 or an errno. */
static int call(int fd, unsigned long request, void *arg)
{
	return ioctl(fd, request, arg) ? errno : 0;
}

static int add(int fd, void *addr, size_t len, __u32 *handle)
{
	struct extlb_register arg = {
		.addr = (uintptr_t)addr,
		.len = len,
	};
	int ret = call(fd, EXTLB_IOC_REGISTER, &arg);

	if (handle)
		*handle = arg.handle;
	return ret;
}

static int take_back(int fd, __u32 handle)
{
	struct extlb_unregister arg = { .handle = handle };

	return call(fd, EXTLB_IOC_UNREGISTER, &arg);
}

static void *map(void *where, size_t len)
{
	return mmap(where, len, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | (where ? MAP_FIXED : 0), -1, 0);
}

static __u64 page_requests(int fd)
{
	struct extlb_stats stats = {};

	return ioctl(fd, EXTLB_IOC_STATS, &stats) ? 0 : stats.page_requests;
}

static bool all(const __u8 *bytes, __u8 value, size_t len)
{
	while (len--) {
		if (*bytes++ != value)
			return false;
	}
	return true;
}

/* Hands an operation to the device, and does not wait. */
static void submit(FIXTURE_DATA(extlb) * self, struct extlb_descriptor op)
{
	struct extlb_context_shadow *shadow = self->shadow;

	memset(self->record, 0, sizeof(*self->record));
	op.completion = (uintptr_t)self->record;
	self->ring[self->tail % RING_ENTRIES] = op;
	__atomic_store_n(&shadow->tail, ++self->tail, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&shadow->need_kick, __ATOMIC_RELAXED))
		__atomic_store_n(self->doorbell, 1, __ATOMIC_RELAXED);
}

/* How the operation ended; EXTLB_STATUS_PENDING if it did not. */
static __u32 finish(FIXTURE_DATA(extlb) * self)
{
	struct timespec pause = { .tv_nsec = 20000 };
	time_t end = time(NULL) + PATIENCE_S;
	__u32 status;

	do {
		status = __atomic_load_n(&self->record->status, __ATOMIC_ACQUIRE);
		if (status == EXTLB_STATUS_PENDING)
			nanosleep(&pause, NULL);
	} while (status == EXTLB_STATUS_PENDING && time(NULL) < end);
	return status;
}

static __u32 copy(FIXTURE_DATA(extlb) * self, void *dst, const void *src, size_t len)
{
	submit(self, (struct extlb_descriptor) {
		.opcode = EXTLB_OPCODE_COPY,
		.src = (uintptr_t)src,
		.dst = (uintptr_t)dst,
		.len = len,
	});
	return finish(self);
}

static __u32 fill(FIXTURE_DATA(extlb) * self, void *dst, __u8 value, size_t len)
{
	submit(self, (struct extlb_descriptor) {
		.opcode = EXTLB_OPCODE_FILL,
		.dst = (uintptr_t)dst,
		.len = len,
		.arg = 0x0101010101010101ULL * value,
	});
	return finish(self);
}

FIXTURE_SETUP(extlb)
{
	struct extlb_create create = { .ring_log2 = RING_LOG2 };
	struct extlb_info info = {};
	void *queue;

	self->fd = open("/dev/extlb0", O_RDWR | O_CLOEXEC);
	if (self->fd < 0 && errno == ENOENT)
		SKIP(return, "no /dev/extlb0");
	ASSERT_GE(self->fd, 0);
	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_INFO, &info));
	ASSERT_EQ(EXTLB_UAPI_VERSION, info.version);

	/* A page for the ring, one for the record. */
	queue = map(NULL, 2 * PAGE);
	ASSERT_NE(MAP_FAILED, queue);
	self->ring = queue;
	self->record = queue + PAGE;
	/* And one behind the data that is not registered. */
	self->data = map(NULL, DATA_SIZE + PAGE);
	ASSERT_NE(MAP_FAILED, self->data);

	create.ring = (uintptr_t)self->ring;
	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_CREATE, &create));
	self->context = create.context;
	ASSERT_EQ(0, add(self->fd, queue, 2 * PAGE, NULL));
	ASSERT_EQ(0, add(self->fd, self->data, DATA_SIZE, &self->data_handle));

	self->doorbell = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			      self->fd, EXTLB_MMAP_DOORBELL);
	ASSERT_NE(MAP_FAILED, self->doorbell);
	self->shadow = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			    self->fd, EXTLB_MMAP_SHADOW);
	ASSERT_NE(MAP_FAILED, self->shadow);
}

FIXTURE_TEARDOWN(extlb)
{
	if (self->fd >= 0)
		EXPECT_EQ(0, close(self->fd));
}

#endif /* EXTLB_TEST_H */
