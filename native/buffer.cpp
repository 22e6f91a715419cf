#include "buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace flashlm {

namespace {
constexpr std::size_t HUGE_PAGE_BYTES = std::size_t{2} << 20;
}

AlignedBuffer::AlignedBuffer(std::size_t num_bytes, bool huge_pages, const Account* account) : num_bytes_(num_bytes) {
    const auto held = account ? account->held_ : nullptr;
    if (num_bytes > PTRDIFF_MAX) throw std::bad_alloc();  // the sum below must not wrap around
    const bool wants_huge = huge_pages && num_bytes >= HUGE_PAGE_BYTES;
    const std::size_t mapped_bytes = (num_bytes ? num_bytes : 1) + (wants_huge ? HUGE_PAGE_BYTES : 0);
    void* mapping = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mapping_ = std::shared_ptr<void>(mapping, [mapped_bytes, num_bytes, held](void* start) {
        munmap(start, mapped_bytes);
        if (held) *held -= num_bytes;
    });
    if (held) *held += num_bytes;
    data_ = mapping;
    if (wants_huge) {
        const auto start = reinterpret_cast<std::uintptr_t>(mapping);
        const auto aligned = (start + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        data_ = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
        // Whole huge pages only: rounding the tail up would charge memory that nobody asked for.
        madvise(data_, num_bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_HUGEPAGE);  // advice: may fail
#endif
    }
}

}  // namespace flashlm
