// SPDX-License-Identifier: GPL-2.0
/*
 * What the driver does on /dev/hmm_dmirror0, of which the kernel's own suite for
 * that interface (tools/testing/selftests/mm/hmm-tests.c) does not ask: calls that
 * make no sense, what the device does not have, limits, and who is killed.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "kselftest_harness.h"

#include "lib/test_hmm_uapi.h"

#define NODE		"/dev/hmm_dmirror0"
#define PAGE		4096UL
#define PAGES		16
#define SIZE		(PAGES * PAGE)
/* Everything below is of processes; what is above is not. */
#define PROCESS_END	0x800000000000UL
/* No device has more contexts. */
#define MANY		512
/* What has to happen does so in milliseconds, unless the machine is busy. */
#define PATIENCE_MS	20000

FIXTURE(mirror) {
	int fd;
	__u8 *data;	/* of the process, for the device */
	__u8 *user;	/* what is handed over and received */
	struct hmm_dmirror_cmd cmd;
};

static void *map(size_t len)
{
	return mmap(NULL, len, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

FIXTURE_SETUP(mirror)
{
	self->fd = open(NODE, O_RDWR | O_CLOEXEC);
	if (self->fd < 0 && errno == ENOENT)
		SKIP(return, "no " NODE);
	ASSERT_GE(self->fd, 0);
	self->data = map(SIZE);
	self->user = map(SIZE);
	ASSERT_NE(MAP_FAILED, self->data);
	ASSERT_NE(MAP_FAILED, self->user);
}

FIXTURE_TEARDOWN(mirror)
{
	if (self->fd >= 0)
		EXPECT_EQ(0, close(self->fd));
}

/* 0 or an errno; the result is in self->cmd. */
static int call(FIXTURE_DATA(mirror) * self, unsigned long request,
		const void *addr, void *ptr, __u64 npages)
{
	self->cmd = (struct hmm_dmirror_cmd) {
		.addr = (uintptr_t)addr,
		.ptr = (uintptr_t)ptr,
		.npages = npages,
		.cpages = 77,
		.faults = 88,
	};
	return ioctl(self->fd, request, &self->cmd) ? errno : 0;
}

static int dev_read(FIXTURE_DATA(mirror) * self, const void *addr, __u64 npages)
{
	return call(self, HMM_DMIRROR_READ, addr, self->user, npages);
}

static int dev_write(FIXTURE_DATA(mirror) * self, void *addr, __u64 npages)
{
	return call(self, HMM_DMIRROR_WRITE, addr, self->user, npages);
}

static bool all(const __u8 *bytes, __u8 value, size_t len)
{
	while (len--) {
		if (*bytes++ != value)
			return false;
	}
	return true;
}

/* How many files can be open at a time. All are closed again. */
static int count_contexts(void)
{
	int fds[MANY], n = 0, count;

	while (n < MANY && (fds[n] = open(NODE, O_RDWR | O_CLOEXEC)) >= 0)
		n++;
	count = n < MANY && errno == EBUSY ? n : -1;
	while (n--)
		close(fds[n]);
	return count;
}

TEST_F(mirror, what_the_device_has_not_got_is_refused)
{
	static const unsigned long requests[] = {
		HMM_DMIRROR_MIGRATE_TO_DEV,
		HMM_DMIRROR_MIGRATE_TO_SYS,
		HMM_DMIRROR_EXCLUSIVE,
		HMM_DMIRROR_CHECK_EXCLUSIVE,
		HMM_DMIRROR_RELEASE,
	};
	size_t i;

	memset(self->data, 1, SIZE);
	memset(self->user, 2, SIZE);
	for (i = 0; i < ARRAY_SIZE(requests); i++) {
		EXPECT_EQ(EOPNOTSUPP, call(self, requests[i], self->data,
					   self->user, PAGES));
		/* And nothing is said to have been done. */
		EXPECT_EQ(77, self->cmd.cpages);
	}
	EXPECT_TRUE(all(self->data, 1, SIZE));
	EXPECT_TRUE(all(self->user, 2, SIZE));
}

TEST_F(mirror, unknown_calls_are_refused)
{
	EXPECT_EQ(ENOTTY, call(self, _IOWR('H', 8, struct hmm_dmirror_cmd),
			       self->data, self->user, 1));
	EXPECT_EQ(ENOTTY, call(self, _IOWR('H', 0, __u64), self->data,
			       self->user, 1));
	EXPECT_EQ(-1, ioctl(self->fd, HMM_DMIRROR_READ, NULL));
	EXPECT_EQ(EFAULT, errno);
}

TEST_F(mirror, addresses_that_are_no_processs_are_refused)
{
	static const unsigned long requests[] = {
		HMM_DMIRROR_READ, HMM_DMIRROR_WRITE, HMM_DMIRROR_SNAPSHOT,
	};
	const struct {
		__u64 addr, npages;
	} wrong[] = {
		{ (uintptr_t)self->data + 1, 1 },
		{ (uintptr_t)self->data, 0 },
		{ (uintptr_t)self->data, ~0ULL },
		{ (uintptr_t)self->data, 1ULL << 52 },
		{ (uintptr_t)self->data, PROCESS_END / PAGE },
		/* The driver's own pages: ring, record and bounce buffer. */
		{ PROCESS_END, 1 },
		{ PROCESS_END + PAGE, 1 },
		{ PROCESS_END - PAGE, 2 },
		{ 1ULL << 48, 1 },
		{ ~(PAGE - 1), 1 },
		{ 0xffff888000000000, 1 },
	};
	size_t i, j;

	for (i = 0; i < ARRAY_SIZE(requests); i++) {
		for (j = 0; j < ARRAY_SIZE(wrong); j++)
			EXPECT_EQ(EINVAL, call(self, requests[i],
					       (void *)wrong[j].addr,
					       self->user, wrong[j].npages));
	}
	EXPECT_EQ(EFAULT, dev_read(self, NULL, 1));
}

TEST_F(mirror, data_come_from_and_go_to_the_callers_own_memory)
{
	void *const wrong[] = {
		NULL, (void *)PROCESS_END, (void *)0xffff888000000000,
		(void *)-PAGE,
	};
	size_t i;

	memset(self->data, 1, SIZE);
	for (i = 0; i < ARRAY_SIZE(wrong); i++) {
		EXPECT_EQ(EFAULT, call(self, HMM_DMIRROR_READ, self->data,
				       wrong[i], 1));
		EXPECT_EQ(EFAULT, call(self, HMM_DMIRROR_WRITE, self->data,
				       wrong[i], 1));
		EXPECT_EQ(EFAULT, call(self, HMM_DMIRROR_SNAPSHOT, self->data,
				       wrong[i], 1));
	}
	ASSERT_EQ(0, mprotect(self->user, SIZE, PROT_READ));
	EXPECT_EQ(EFAULT, dev_read(self, self->data, 1));
	ASSERT_EQ(0, mprotect(self->user, SIZE, PROT_READ | PROT_WRITE));
	EXPECT_EQ(0, dev_read(self, self->data, PAGES));
	EXPECT_EQ(PAGES, self->cmd.cpages);
	EXPECT_TRUE(all(self->user, 1, SIZE));
}

TEST_F(mirror, a_hole_ends_a_command)
{
	__u8 *hole = self->data + PAGE;

	memset(self->data, 1, SIZE);
	memset(self->user, 2, SIZE);
	ASSERT_EQ(0, munmap(hole, PAGE));
	EXPECT_EQ(EFAULT, dev_write(self, self->data, 3));
	EXPECT_TRUE(all(self->data, 2, PAGE));
	EXPECT_TRUE(all(self->data + 2 * PAGE, 1, PAGE));
	EXPECT_EQ(EFAULT, dev_read(self, self->data, 3));

	/* What is mapped there later is found, though nobody says so. */
	ASSERT_EQ(hole, mmap(hole, PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	EXPECT_EQ(0, dev_write(self, self->data, 3));
	EXPECT_TRUE(all(self->data, 2, 3 * PAGE));
}

TEST_F(mirror, the_device_follows)
{
	memset(self->user, 1, SIZE);
	ASSERT_EQ(0, dev_write(self, self->data, PAGES));
	ASSERT_EQ(0, madvise(self->data, PAGE, MADV_DONTNEED));
	ASSERT_EQ(0, dev_read(self, self->data, 2));
	EXPECT_TRUE(all(self->user, 0, PAGE));
	EXPECT_TRUE(all(self->user + PAGE, 1, PAGE));

	ASSERT_EQ(0, mprotect(self->data, SIZE, PROT_READ));
	EXPECT_EQ(EPERM, dev_write(self, self->data, 1));
	EXPECT_EQ(0, dev_read(self, self->data, 1));
	ASSERT_EQ(0, mprotect(self->data, SIZE, PROT_NONE));
	EXPECT_EQ(EFAULT, dev_write(self, self->data, 1));
	EXPECT_EQ(EFAULT, dev_read(self, self->data, 1));
}

TEST_F(mirror, a_snapshot_looks_and_touches_nothing)
{
	int i;

	ASSERT_EQ(0, mprotect(self->data, PAGE, PROT_NONE));
	self->data[PAGE] = 1;
	self->data[2 * PAGE] = 1;
	ASSERT_EQ(0, mprotect(self->data + 2 * PAGE, PAGE, PROT_READ));
	ASSERT_EQ(0, munmap(self->data + 3 * PAGE, PAGE));
	EXPECT_TRUE(all(self->data + 4 * PAGE, 0, PAGE));

	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, call(self, HMM_DMIRROR_SNAPSHOT, self->data,
				  self->user, 6));
		EXPECT_EQ(6, self->cmd.cpages);
		EXPECT_EQ(HMM_DMIRROR_PROT_ERROR, self->user[0]);
		EXPECT_EQ(HMM_DMIRROR_PROT_WRITE, self->user[1]);
		EXPECT_EQ(HMM_DMIRROR_PROT_READ, self->user[2]);
		EXPECT_EQ(HMM_DMIRROR_PROT_ERROR, self->user[3]);
		EXPECT_EQ(HMM_DMIRROR_PROT_ZERO | HMM_DMIRROR_PROT_READ,
			  self->user[4]);
		EXPECT_EQ(HMM_DMIRROR_PROT_NONE, self->user[5]);
	}
}

TEST_F(mirror, mappings_of_the_file_are_small)
{
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 17 * PAGE, PROT_READ, MAP_PRIVATE,
				   self->fd, 0));
	EXPECT_EQ(EINVAL, errno);
}

/* There are more mappings than a context of the device can have. */
TEST_F(mirror, mappings_without_end)
{
	const size_t pages = 5000;
	__u8 *many = map(pages * PAGE), *got = map(pages * PAGE);
	size_t i;

	ASSERT_NE(MAP_FAILED, many);
	ASSERT_NE(MAP_FAILED, got);
	for (i = 0; i < pages; i++) {
		many[i * PAGE] = i * 7;
		if (i % 2)
			ASSERT_EQ(0, mprotect(many + i * PAGE, PAGE, PROT_READ));
	}
	ASSERT_EQ(0, call(self, HMM_DMIRROR_READ, many, got, pages));
	EXPECT_EQ(pages, self->cmd.cpages);
	EXPECT_EQ(0, memcmp(many, got, pages * PAGE));
}

TEST_F(mirror, a_child_has_no_part_in_it)
{
	int status;
	pid_t pid;

	memset(self->data, 1, SIZE);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		memset(self->data, 2, SIZE);
		if (dev_read(self, self->data, 1) != EPERM ||
		    dev_write(self, self->data, 1) != EPERM ||
		    call(self, HMM_DMIRROR_SNAPSHOT, self->data, self->user, 1) != EPERM)
			_exit(1);
		_exit(0);
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_EQ(0, dev_read(self, self->data, PAGES));
	EXPECT_TRUE(all(self->user, 1, SIZE));
}

TEST_F(mirror, closing_gives_all_back)
{
	int count = count_contexts();

	ASSERT_GT(count, 0);
	EXPECT_EQ(count, count_contexts());
	EXPECT_EQ(0, dev_read(self, self->data, 1));
}

/* Tells when somebody waits for a page. */
static void *watch(void *fds)
{
	int uffd = ((int *)fds)[0], tell = ((int *)fds)[1];
	struct pollfd pollfd = { .fd = uffd, .events = POLLIN };

	if (poll(&pollfd, 1, PATIENCE_MS) != 1 || write(tell, "", 1) != 1)
		_exit(3);
	return NULL;
}

/* Has the device wait for a page that never comes. */
static void wait_for_ever(FIXTURE_DATA(mirror) * self, int tell)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { (uintptr_t)self->data, SIZE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fds[2] = { syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), tell };
	pthread_t thread;

	self->fd = open(NODE, O_RDWR | O_CLOEXEC);
	if (self->fd < 0 || fds[0] < 0 || ioctl(fds[0], UFFDIO_API, &api) ||
	    ioctl(fds[0], UFFDIO_REGISTER, &reg) ||
	    pthread_create(&thread, NULL, watch, fds))
		_exit(1);
	dev_read(self, self->data, 1);
	_exit(2);
}

TEST_F(mirror, who_is_killed_while_waiting_leaves_nothing_behind)
{
	int before = count_contexts(), told[2], status, i;
	char c;

	ASSERT_GT(before, 0);
	ASSERT_EQ(0, pipe(told));
	for (i = 0; i < 4; i++) {
		struct pollfd pollfd = { .fd = told[0], .events = POLLIN };
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid)
			wait_for_ever(self, told[1]);
		/* The device has asked, and nobody answers. */
		ASSERT_EQ(1, poll(&pollfd, 1, PATIENCE_MS));
		ASSERT_EQ(1, read(told[0], &c, 1));
		ASSERT_EQ(0, waitpid(pid, &status, WNOHANG));
		ASSERT_EQ(0, kill(pid, SIGKILL));
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_TRUE(WIFSIGNALED(status));
		EXPECT_EQ(SIGKILL, WTERMSIG(status));
	}
	EXPECT_EQ(before, count_contexts());
	memset(self->data, 3, SIZE);
	EXPECT_EQ(0, dev_read(self, self->data, PAGES));
	EXPECT_TRUE(all(self->user, 3, SIZE));
}

TEST_HARNESS_MAIN
