#include "direct_alignment.h"

#ifdef __linux__
#include <linux/fcntl.h>
#include <linux/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashlm {

bool ask_direct_alignment([[maybe_unused]] int fd, [[maybe_unused]] DirectAlignment& alignment) {
#if defined(__linux__) && defined(STATX_DIOALIGN)
    struct statx status = {};
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0) return false;
    if (!(status.stx_mask & STATX_DIOALIGN)) return false;
    alignment.memory = status.stx_dio_mem_align;
    alignment.offset = status.stx_dio_offset_align;
    return true;
#else
    return false;
#endif
}

}  // namespace flashlm
