// SPDX-License-Identifier: GPL-2.0
/*
 * What the driver promises to programs: calls and their errors, operations by
 * virtual address, and that the device follows the process's page table.
 *
 * Pages that the process loses are looked at from both sides: what the device
 * then says, and what memory says that was somebody else's by then.
 */
#include "extlb_test.h"

/* Calls and their errors. */

TEST_F(extlb, info)
{
	struct extlb_info info = {};

	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_INFO, &info));
	EXPECT_NE(0, info.create_flags);
	EXPECT_LT(self->context, info.contexts);
	EXPECT_EQ(EXTLB_WORK_RING_LOG2_MAX, info.max_ring_log2);
	EXPECT_EQ(0, info.reserved0);
	EXPECT_EQ(0, info.reserved1);
}

TEST_F(extlb, unknown_calls_are_refused)
{
	__u64 nothing = 0;

	EXPECT_EQ(ENOTTY, call(self->fd, _IOWR(0xeb, 99, __u64), &nothing));
	EXPECT_EQ(ENOTTY, call(self->fd, _IOWR(0xea, 0, struct extlb_info), &nothing));
	EXPECT_EQ(EFAULT, call(self->fd, EXTLB_IOC_INFO, NULL));
}

TEST_F(extlb, reserved_fields_must_be_zero)
{
	struct extlb_info info = { .reserved1 = 1 };
	struct extlb_create create = {
		.ring = (uintptr_t)self->ring,
		.ring_log2 = RING_LOG2,
		.reserved1 = 1,
	};
	struct extlb_register reg = {
		.addr = (uintptr_t)map(NULL, PAGE),
		.len = PAGE,
		.reserved0 = 1,
	};
	struct extlb_unregister unreg = {
		.handle = self->data_handle,
		.reserved0 = 1,
	};
	struct extlb_stats stats = { .reserved = 1 };
	struct extlb_audit audit = { .reserved = { 1 } };

	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_INFO, &info));
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_CREATE, &create));
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_REGISTER, &reg));
	reg.reserved0 = 0;
	reg.flags = 1;
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_REGISTER, &reg));
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_UNREGISTER, &unreg));
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_STATS, &stats));
	EXPECT_EQ(EINVAL, call(self->fd, EXTLB_IOC_AUDIT, &audit));
}

TEST_F(extlb, a_file_without_a_context_does_nothing)
{
	int fd = open("/dev/extlb0", O_RDWR | O_CLOEXEC);
	struct pollfd pollfd = { .fd = fd, .events = POLLIN };
	__u64 count;

	ASSERT_GE(fd, 0);
	EXPECT_EQ(EINVAL, add(fd, self->data, PAGE, NULL));
	EXPECT_EQ(EINVAL, take_back(fd, 1));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd,
				   EXTLB_MMAP_SHADOW));
	EXPECT_EQ(-1, read(fd, &count, sizeof(count)));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(1, poll(&pollfd, 1, 0));
	EXPECT_EQ(POLLERR, pollfd.revents);
	EXPECT_EQ(0, close(fd));
}

TEST_F(extlb, create_checks_what_it_is_given)
{
	int fd = open("/dev/extlb0", O_RDWR | O_CLOEXEC);
	struct extlb_create good = {
		.ring = (uintptr_t)self->ring,
		.ring_log2 = RING_LOG2,
	};
	struct extlb_create create;

	ASSERT_GE(fd, 0);
	create = good;
	EXPECT_EQ(EBUSY, call(self->fd, EXTLB_IOC_CREATE, &create));
	create.ring += 64;
	EXPECT_EQ(EINVAL, call(fd, EXTLB_IOC_CREATE, &create));
	create = good;
	create.ring = 1ULL << 48;
	EXPECT_EQ(EINVAL, call(fd, EXTLB_IOC_CREATE, &create));
	create = good;
	create.ring_log2 = EXTLB_WORK_RING_LOG2_MAX + 1;
	EXPECT_EQ(EINVAL, call(fd, EXTLB_IOC_CREATE, &create));
	create = good;
	create.flags = 1U << 31;
	EXPECT_EQ(EINVAL, call(fd, EXTLB_IOC_CREATE, &create));
	/* None of that has left anything behind. */
	create = good;
	EXPECT_EQ(0, call(fd, EXTLB_IOC_CREATE, &create));
	EXPECT_NE(self->context, create.context);
	EXPECT_EQ(0, close(fd));
}

TEST_F(extlb, register_checks_what_it_is_given)
{
	__u8 *fresh = map(NULL, 3 * PAGE);

	ASSERT_NE(MAP_FAILED, fresh);
	EXPECT_EQ(EINVAL, add(self->fd, fresh + 1, PAGE, NULL));
	EXPECT_EQ(EINVAL, add(self->fd, fresh, PAGE - 1, NULL));
	EXPECT_EQ(EINVAL, add(self->fd, fresh, 0, NULL));
	EXPECT_EQ(EINVAL, add(self->fd, fresh, -PAGE, NULL));
	EXPECT_EQ(EINVAL, add(self->fd, (void *)-PAGE, PAGE, NULL));
	EXPECT_EQ(EEXIST, add(self->fd, self->data + PAGE, PAGE, NULL));

	/* Not with a hole; and what is refused leaves nothing behind. */
	ASSERT_EQ(0, munmap(fresh + PAGE, PAGE));
	EXPECT_NE(0, add(self->fd, fresh, 3 * PAGE, NULL));
	EXPECT_EQ(0, add(self->fd, fresh, PAGE, NULL));
	EXPECT_EQ(0, add(self->fd, fresh + 2 * PAGE, PAGE, NULL));
}

TEST_F(extlb, a_handle_is_good_once)
{
	EXPECT_EQ(ENOENT, take_back(self->fd, 0));
	EXPECT_EQ(ENOENT, take_back(self->fd, self->data_handle + 1));
	EXPECT_EQ(0, take_back(self->fd, self->data_handle));
	EXPECT_EQ(ENOENT, take_back(self->fd, self->data_handle));
	EXPECT_EQ(0, add(self->fd, self->data, DATA_SIZE, NULL));
}

TEST_F(extlb, mmap_checks_what_it_is_given)
{
	int both = PROT_READ | PROT_WRITE;

	EXPECT_EQ(MAP_FAILED, mmap(NULL, 2 * PAGE, both, MAP_SHARED, self->fd, 0));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, both, MAP_PRIVATE, self->fd, 0));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, both, MAP_SHARED, self->fd, 2 * PAGE));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, PAGE, both | PROT_EXEC, MAP_SHARED,
				   self->fd, 0));
}

/* Operations. */

TEST_F(extlb, pages_come_when_the_device_asks)
{
	__u64 before = page_requests(self->fd);

	/* Nobody has touched them yet: neither side is there. */
	ASSERT_EQ(EXTLB_STATUS_SUCCESS,
		  copy(self, self->data + 8 * PAGE, self->data, 8 * PAGE));
	EXPECT_EQ(8 * PAGE, self->record->bytes);
	EXPECT_GT(page_requests(self->fd), before);
	EXPECT_TRUE(all(self->data, 0, DATA_SIZE));
}

TEST_F(extlb, fill_and_copy_any_bytes)
{
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data + 100, 0x5a, 5000));
	EXPECT_TRUE(all(self->data, 0, 100));
	EXPECT_TRUE(all(self->data + 100, 0x5a, 5000));
	EXPECT_TRUE(all(self->data + 5100, 0, 1000));

	ASSERT_EQ(EXTLB_STATUS_SUCCESS,
		  copy(self, self->data + 5 * PAGE + 1, self->data + 99, 5002));
	EXPECT_EQ(5002, self->record->bytes);
	EXPECT_EQ(0, memcmp(self->data + 5 * PAGE + 1, self->data + 99, 5002));
	EXPECT_EQ(0, self->data[5 * PAGE]);
	EXPECT_EQ(0, self->data[5 * PAGE + 1 + 5002]);
}

TEST_F(extlb, bad_descriptors_complete_with_an_error)
{
	submit(self, (struct extlb_descriptor) { .opcode = 0xee });
	EXPECT_EQ(EXTLB_STATUS_BAD_DESCRIPTOR, finish(self));
	submit(self, (struct extlb_descriptor) {
		.opcode = EXTLB_OPCODE_NOP,
		.reserved1 = 1,
	});
	EXPECT_EQ(EXTLB_STATUS_BAD_DESCRIPTOR, finish(self));
	submit(self, (struct extlb_descriptor) {
		.opcode = EXTLB_OPCODE_FILL,
		.dst = 1ULL << 48,
		.len = 1,
	});
	EXPECT_EQ(EXTLB_STATUS_BAD_ADDRESS, finish(self));
	submit(self, (struct extlb_descriptor) { .opcode = EXTLB_OPCODE_NOP });
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, finish(self));
}

TEST_F(extlb, what_is_not_registered_faults)
{
	__u8 *other = map(NULL, PAGE);

	ASSERT_NE(MAP_FAILED, other);
	memset(other, 7, PAGE);
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, other + 16, 9, 32));
	EXPECT_EQ((uintptr_t)other + 16, self->record->fault_addr);
	EXPECT_EQ(EXTLB_FAULT_WRITE, self->record->fault);
	EXPECT_EQ(0, self->record->bytes);
	EXPECT_TRUE(all(other, 7, PAGE));

	/* An operation that runs out of what is registered has done the rest. */
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT,
		  copy(self, self->data, self->data + DATA_SIZE - PAGE, 2 * PAGE));
	EXPECT_EQ(PAGE, self->record->bytes);
	EXPECT_EQ((uintptr_t)self->data + DATA_SIZE, self->record->fault_addr);
}

TEST_F(extlb, unregistering_takes_the_pages_from_the_device)
{
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	ASSERT_EQ(0, take_back(self->fd, self->data_handle));
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, self->data, 2, DATA_SIZE));
	EXPECT_TRUE(all(self->data, 1, DATA_SIZE));
}

TEST_F(extlb, completions_wake_pollers)
{
	struct pollfd pollfd = { .fd = self->fd, .events = POLLIN };
	__u64 count = 0;
	int i;

	ASSERT_EQ(0, fcntl(self->fd, F_SETFL, O_RDWR | O_NONBLOCK));
	EXPECT_EQ(0, poll(&pollfd, 1, 0));
	EXPECT_EQ(-1, read(self->fd, &count, sizeof(count)));
	EXPECT_EQ(EAGAIN, errno);
	EXPECT_EQ(-1, read(self->fd, &count, sizeof(count) - 1));
	EXPECT_EQ(EINVAL, errno);

	for (i = 0; i < 2; i++) {
		submit(self, (struct extlb_descriptor) {
			.opcode = EXTLB_OPCODE_NOP,
			.flags = EXTLB_WORK_INTERRUPT,
		});
		ASSERT_EQ(1, poll(&pollfd, 1, PATIENCE_S * 1000));
		EXPECT_EQ(POLLIN, pollfd.revents);
		ASSERT_EQ(EXTLB_STATUS_SUCCESS, finish(self));
	}
	/* The device counts after it has written the record. */
	ASSERT_EQ(0, fcntl(self->fd, F_SETFL, O_RDWR));
	while (count < 2) {
		__u64 more = 0;

		ASSERT_EQ(sizeof(more), read(self->fd, &more, sizeof(more)));
		ASSERT_NE(0, more);
		count += more;
	}
	EXPECT_EQ(2, count);
}

/* Following the process. */

TEST_F(extlb, munmap_ends_the_registration_of_a_part)
{
	__u8 *part = self->data + 4 * PAGE;

	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	ASSERT_EQ(0, munmap(part, PAGE));
	ASSERT_EQ(part, map(part, PAGE));
	memset(part, 2, PAGE);

	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, self->data, 3, DATA_SIZE));
	EXPECT_EQ((uintptr_t)part, self->record->fault_addr);
	EXPECT_EQ(4 * PAGE, self->record->bytes);
	EXPECT_TRUE(all(part, 2, PAGE));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, fill(self, part + PAGE, 4, PAGE));

	ASSERT_EQ(0, add(self->fd, part, PAGE, NULL));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 5, DATA_SIZE));
	EXPECT_TRUE(all(self->data, 5, DATA_SIZE));
}

TEST_F(extlb, dontneed_gives_the_device_a_new_page)
{
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, 2 * PAGE));
	ASSERT_EQ(0, madvise(self->data, PAGE, MADV_DONTNEED));
	ASSERT_EQ(EXTLB_STATUS_SUCCESS,
		  copy(self, self->data + 2 * PAGE, self->data, 2 * PAGE));
	EXPECT_TRUE(all(self->data + 2 * PAGE, 0, PAGE));
	EXPECT_TRUE(all(self->data + 3 * PAGE, 1, PAGE));

	/* And both see it: not each its own. */
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 2, PAGE));
	EXPECT_TRUE(all(self->data, 2, PAGE));
}

TEST_F(extlb, mprotect_binds_the_device)
{
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, PAGE));
	ASSERT_EQ(0, mprotect(self->data, PAGE, PROT_READ));
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, self->data, 2, PAGE));
	EXPECT_EQ(EXTLB_FAULT_WRITE, self->record->fault);
	EXPECT_TRUE(all(self->data, 1, PAGE));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS,
		  copy(self, self->data + PAGE, self->data, PAGE));

	ASSERT_EQ(0, mprotect(self->data, PAGE, PROT_NONE));
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT,
		  copy(self, self->data + PAGE, self->data, PAGE));
	EXPECT_EQ(0, self->record->fault);

	ASSERT_EQ(0, mprotect(self->data, PAGE, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 3, PAGE));
	EXPECT_TRUE(all(self->data, 3, PAGE));
}

TEST_F(extlb, mremap_leaves_nothing_at_the_old_address)
{
	__u8 *room = map(NULL, DATA_SIZE), *moved;

	ASSERT_NE(MAP_FAILED, room);
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	moved = mremap(self->data, DATA_SIZE, DATA_SIZE,
		       MREMAP_MAYMOVE | MREMAP_FIXED, room);
	ASSERT_EQ(room, moved);
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, self->data, 2, PAGE));
	EXPECT_TRUE(all(moved, 1, DATA_SIZE));
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, moved, 3, PAGE));
	ASSERT_EQ(0, add(self->fd, moved, DATA_SIZE, NULL));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, fill(self, moved, 4, DATA_SIZE));
	EXPECT_TRUE(all(moved, 4, DATA_SIZE));
}

/* Runs the rest of the test in a child up to its _exit(); true there. */
static bool in_child(struct __test_metadata *_metadata, bool *held)
{
	pid_t pid = fork();
	int status;

	ASSERT_GE(pid, 0);
	if (!pid)
		return true;
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	*held = WIFEXITED(status) && !WEXITSTATUS(status);
	return false;
}

TEST_F(extlb, a_child_keeps_what_was_there_when_it_was_forked)
{
	int written[2], status;
	pid_t pid;
	char c = 0;

	ASSERT_EQ(0, pipe(written));
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		/* After the device has written in the parent. */
		if (read(written[0], &c, 1) != 1)
			_exit(1);
		if (!all(self->data, 1, DATA_SIZE))
			_exit(2);
		memset(self->data, 3, DATA_SIZE);
		_exit(0);
	}
	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 2, DATA_SIZE));
	ASSERT_EQ(1, write(written[1], &c, 1));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_EQ(0, status);
	EXPECT_TRUE(all(self->data, 2, DATA_SIZE));
	ASSERT_EQ(EXTLB_STATUS_SUCCESS,
		  copy(self, self->data + PAGE, self->data, PAGE));
	EXPECT_TRUE(all(self->data + PAGE, 2, PAGE));
}

TEST_F(extlb, a_child_has_no_part_in_the_context)
{
	struct extlb_info info = {};
	unsigned char there;
	bool held = false;

	if (in_child(_metadata, &held)) {
		if (call(self->fd, EXTLB_IOC_INFO, &info) != EPERM ||
		    add(self->fd, self->data, PAGE, NULL) != EPERM ||
		    take_back(self->fd, self->data_handle) != EPERM)
			_exit(1);
		if (mmap(NULL, PAGE, PROT_READ, MAP_SHARED, self->fd,
			 EXTLB_MMAP_SHADOW) != MAP_FAILED || errno != EPERM)
			_exit(2);
		/* The mappings were not inherited. */
		if (!mincore(self->doorbell, PAGE, &there) ||
		    !mincore(self->shadow, PAGE, &there))
			_exit(3);
		_exit(0);
	}
	EXPECT_TRUE(held);
	EXPECT_EQ(0, call(self->fd, EXTLB_IOC_INFO, &info));
	EXPECT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, PAGE));
}

TEST_F(extlb, every_translation_is_the_processs)
{
	struct extlb_audit audit = {};
	int ret;

	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	ASSERT_EQ(0, madvise(self->data + PAGE, PAGE, MADV_DONTNEED));
	ret = call(self->fd, EXTLB_IOC_AUDIT, &audit);
	if (ret == EOPNOTSUPP)
		SKIP(return, "the device has no oracle");
	ASSERT_EQ(0, ret);
	EXPECT_GE(audit.checked, DATA_PAGES - 1);
	EXPECT_EQ(0, audit.mismatches);
}

TEST_F(extlb, statistics_count)
{
	struct extlb_stats before = {}, after = {};

	ASSERT_EQ(EXTLB_STATUS_SUCCESS, fill(self, self->data, 1, DATA_SIZE));
	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_STATS, &before));
	EXPECT_GE(before.mapped_pages, DATA_PAGES);
	EXPECT_GE(before.filled_pages, before.mapped_pages);
	EXPECT_EQ(0, before.oracle_stale);
	ASSERT_EQ(0, munmap(self->data, DATA_SIZE));
	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_STATS, &after));
	EXPECT_GT(after.shootdowns, before.shootdowns);
	EXPECT_GE(after.shot_pages - before.shot_pages, DATA_PAGES);
	EXPECT_LE(after.mapped_pages, before.mapped_pages - DATA_PAGES);
	EXPECT_EQ(EXTLB_STATUS_PAGE_FAULT, fill(self, self->data, 1, PAGE));
	ASSERT_EQ(0, call(self->fd, EXTLB_IOC_STATS, &after));
	EXPECT_GT(after.refused_requests, before.refused_requests);
}

TEST_HARNESS_MAIN
