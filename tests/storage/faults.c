// Preloaded by tests: makes reads of files named *.faulty, io_uring and threads fail as FAULT says.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { IO_URING_SETUP = 425, IO_URING_ENTER = 426 };

static atomic_long num_calls;

static int fault_is(const char* name) {
    const char* fault = getenv("FAULT");
    return fault && strcmp(fault, name) == 0;
}

static long number(const char* name) {
    const char* text = getenv(name);
    return text ? atol(text) : 0;
}

static void sleep_ms(long duration) {
    struct timespec left = {duration / 1000, duration % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
}

static int is_faulty(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, ".faulty") != NULL;
}

static ssize_t read_faultily(int fd, void* memory, size_t count, off_t offset) {
    ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    if (!is_faulty(fd)) return real(fd, memory, count, offset);
    const long call = atomic_fetch_add(&num_calls, 1);
    if (fault_is("partial") && count > 4096) count = (count / 2 + 4095) / 4096 * 4096;
    if (fault_is("odd") && count > 7) count = count / 3 + 1;
    if (fault_is("sleep") || fault_is("late")) sleep_ms(number("FAULT_MS"));
    if (fault_is("eagain") && call < number("FAULT_TIMES")) return errno = EAGAIN, -1;
    if (fault_is("eintr") && call % 3 != 2) return errno = EINTR, -1;
    if (fault_is("eio") && offset + (off_t)count > number("FAULT_OFFSET")) return errno = EIO, -1;
    return real(fd, memory, count, offset);
}

ssize_t pread(int fd, void* memory, size_t count, off_t offset) { return read_faultily(fd, memory, count, offset); }
ssize_t pread64(int fd, void* memory, size_t count, off_t offset) { return read_faultily(fd, memory, count, offset); }

static ssize_t read_parts_faultily(int fd, const struct iovec* parts, int count, off_t offset) {
    ssize_t (*real)(int, const struct iovec*, int, off_t) = dlsym(RTLD_NEXT, "preadv");
    if (fault_is("late") && is_faulty(fd)) sleep_ms(number("FAULT_MS"));
    return real(fd, parts, count, offset);
}

ssize_t preadv(int fd, const struct iovec* parts, int count, off_t offset) {
    return read_parts_faultily(fd, parts, count, offset);
}
ssize_t preadv64(int fd, const struct iovec* parts, int count, off_t offset) {
    return read_parts_faultily(fd, parts, count, offset);
}

// With FAULT=late io_uring takes no new entries before FAULT_MS have passed since they were first offered. Scripts change
// FAULT_MS as they go: 0 lets all through.
static int is_ring_late(long to_submit) {
    static _Atomic long long offered;
    if (number("FAULT_MS") <= 0) return atomic_store(&offered, 0), 0;
    if (to_submit == 0) return 0;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const long long ms = now.tv_sec * 1000LL + now.tv_nsec / 1000000;
    long long unset = 0;
    atomic_compare_exchange_strong(&offered, &unset, ms);
    if (ms - atomic_load(&offered) < number("FAULT_MS")) return 1;
    atomic_store(&offered, 0);
    return 0;
}

// With FAULT=eagain the first FAULT_TIMES reads are answered so. io_uring's are led to an empty pipe that does not block,
// which gives just that; for this the shared entries are watched as they are mapped.
static _Atomic(struct io_uring_sqe*) entries;
static size_t num_entries;

static void* map(void* address, size_t length, int protection, int flags, int fd, off_t offset) {
    void* (*real)(void*, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    void* mapped = real(address, length, protection, flags, fd, offset);
    if (offset == IORING_OFF_SQES && mapped != MAP_FAILED && fault_is("eagain")) {
        num_entries = length / sizeof *entries;
        entries = mapped;
    }
    return mapped;
}
void* mmap(void* a, size_t n, int p, int f, int fd, off_t o) { return map(a, n, p, f, fd, o); }
void* mmap64(void* a, size_t n, int p, int f, int fd, off_t o) { return map(a, n, p, f, fd, o); }

static void lead_astray(void) {
    static int empty[2] = {-1, -1};
    if (empty[0] < 0 && pipe2(empty, O_NONBLOCK) != 0) abort();
    for (size_t index = 0; entries && index < num_entries; ++index) {
        struct io_uring_sqe* entry = &entries[index];
        if (entry->opcode != IORING_OP_READ || !is_faulty(entry->fd)) continue;
        if (atomic_fetch_add(&num_calls, 1) >= number("FAULT_TIMES")) continue;
        entry->fd = empty[0];
        entry->rw_flags = RWF_NOWAIT;
    }
}

// With FAULT=sleep io_uring takes no entry before FAULT_MS have passed since the first attempt.
static int is_ring_asleep(void) {
    static _Atomic long long first;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const long long ms = now.tv_sec * 1000LL + now.tv_nsec / 1000000;
    long long unset = 0;
    atomic_compare_exchange_strong(&first, &unset, ms);
    return ms - first < number("FAULT_MS");
}

long syscall(long what, ...) {
    long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, what);
    long argument[6];
    for (int index = 0; index < 6; ++index) argument[index] = va_arg(list, long);
    va_end(list);
    if (what == IO_URING_SETUP && fault_is("no_uring")) return errno = ENOSYS, -1;
    if (what == IO_URING_ENTER && fault_is("sleep") && is_ring_asleep()) {
        if (argument[2] == 0) return errno = EAGAIN, -1;
        sleep_ms(50);
        return errno = ETIME, -1;
    }
    if (what == IO_URING_ENTER && fault_is("late") && is_ring_late(argument[1])) {
        if (argument[2] == 0) return errno = EAGAIN, -1;
        sleep_ms(1);
        return errno = ETIME, -1;
    }
    if (what == IO_URING_ENTER && fault_is("eagain") && argument[1] > 0) lead_astray();
    return real(what, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
    int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = dlsym(RTLD_NEXT, "pthread_create");
    if (fault_is("no_thread") && atomic_fetch_add(&num_calls, 1) >= 3) return EAGAIN;
    return real(thread, attributes, run, argument);
}
