// What the kernel says of direct reads on a file. In a file of its own: <linux/stat.h> and <sys/stat.h> do not mix.
#pragma once

#include <cstdint>

namespace flashlm {

struct DirectAlignment {
    std::uint32_t memory = 0;
    std::uint32_t offset = 0;  // 0: the file does not support direct reads
};

// Returns whether the kernel tells (Linux 6.1 on, most file systems).
bool ask_direct_alignment(int fd, DirectAlignment& alignment);

}  // namespace flashlm
