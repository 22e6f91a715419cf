// Anonymous, page-aligned memory that direct reads may land in.
#pragma once

#include <cstddef>

namespace flashlm {

class AlignedBuffer {
  public:
    // Maps `num_bytes` of zeroed memory; from 2 MiB on with huge-page advice if asked. Throws std::bad_alloc.
    AlignedBuffer(std::size_t num_bytes, bool huge_pages);
    ~AlignedBuffer();
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    void* data() const { return data_; }
    std::size_t num_bytes() const { return num_bytes_; }

  private:
    void* mapping_;
    std::size_t mapped_bytes_;
    void* data_;
    std::size_t num_bytes_;
};

}  // namespace flashlm
