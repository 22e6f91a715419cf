// An open file, read past the page cache where its file system allows it.
#pragma once

#include <cstdint>
#include <string>

namespace flashlm {

struct File {
    int fd = -1;
    std::string path;
    std::uint64_t num_bytes = 0;      // when it was opened
    bool is_direct = false;
    std::uint32_t alignment = 1;      // of offsets and lengths; 1 where reads are buffered
    std::uint32_t memory_alignment = 1;
};

// Opens `path` for reading. Returns 0 or an errno.
int open_file(const std::string& path, bool want_direct, File& file);
void close_file(File& file);

}  // namespace flashlm
