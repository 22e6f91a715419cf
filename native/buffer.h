// Anonymous, page-aligned memory that direct reads may land in.
#pragma once

#include <cstddef>
#include <memory>

namespace flashlm {

class AlignedBuffer {
  public:
    // Maps `num_bytes` of zeroed memory; from 2 MiB on with huge-page advice if asked. Throws std::bad_alloc.
    AlignedBuffer(std::size_t num_bytes, bool huge_pages);
    AlignedBuffer(const AlignedBuffer&) = delete;
    AlignedBuffer& operator=(const AlignedBuffer&) = delete;

    void* data() const { return data_; }
    std::size_t num_bytes() const { return num_bytes_; }
    // A share of the memory: it stays mapped as long as anybody holds one. Reads in flight do.
    std::shared_ptr<const void> share() const { return mapping_; }

  private:
    std::shared_ptr<void> mapping_;
    void* data_;
    std::size_t num_bytes_;
};

}  // namespace flashlm
