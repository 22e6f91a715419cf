// Preloaded by tests: makes reads of files named *.faulty, io_uring and threads fail as FAULT says.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
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
    if (fault_is("sleep")) sleep_ms(number("FAULT_MS"));
    if (fault_is("eintr") && call % 3 != 2) return errno = EINTR, -1;
    if (fault_is("eio") && offset + (off_t)count > number("FAULT_OFFSET")) return errno = EIO, -1;
    return real(fd, memory, count, offset);
}

ssize_t pread(int fd, void* memory, size_t count, off_t offset) { return read_faultily(fd, memory, count, offset); }
ssize_t pread64(int fd, void* memory, size_t count, off_t offset) { return read_faultily(fd, memory, count, offset); }

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
    return real(what, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
    int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = dlsym(RTLD_NEXT, "pthread_create");
    if (fault_is("no_thread") && atomic_fetch_add(&num_calls, 1) >= 3) return EAGAIN;
    return real(thread, attributes, run, argument);
}
