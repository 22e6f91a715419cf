// Anonymous, page-aligned memory that direct reads may land in.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

namespace flashlm {

// Counts the bytes of buffers that are charged to it and not yet unmapped. Copies count together.
class Account {
  public:
    std::size_t held_bytes() const { return held_->load(); }

  private:
    friend class AlignedBuffer;
    std::shared_ptr<std::atomic<std::size_t>> held_ = std::make_shared<std::atomic<std::size_t>>(0);
};

// A share of mapped memory: it stays mapped as long as anybody holds one. Copies share, and so do reads in flight.
class AlignedBuffer {
  public:
    // Maps `num_bytes` of zeroed memory; from 2 MiB on with huge-page advice if asked. Throws std::bad_alloc.
    AlignedBuffer(std::size_t num_bytes, bool huge_pages, const Account* account = nullptr);

    void* data() const { return data_; }
    std::size_t num_bytes() const { return num_bytes_; }
    std::shared_ptr<const void> share() const { return mapping_; }

  private:
    std::shared_ptr<void> mapping_;
    void* data_;
    std::size_t num_bytes_;
};

}  // namespace flashlm
