#include "row_reads.h"

#include <stdexcept>

namespace flashlm {

namespace {

constexpr std::size_t MAX_ROW_PARTS = 512;  // of one read, below what any system takes

}  // namespace

RowReads plan_row_reads(const RowFile& file, const std::int32_t* rows, const std::int32_t* slots, std::size_t num_rows,
                        unsigned char* slab, unsigned char* scratch, std::size_t max_gap, std::size_t max_bytes) {
    RowReads reads;
    const std::uint64_t stride = file.row_stride;
    std::uint64_t end = 0;  // of the read under construction
    std::int64_t last = -1;
    for (std::size_t i = 0; i < num_rows; ++i) {
        const std::int64_t row = rows[i];
        if (row <= last) throw std::invalid_argument("rows must ascend from 0");
        last = row;
        const auto at = static_cast<std::uint64_t>(row);
        const std::uint64_t offset = at / file.block_rows * file.block_stride + at % file.block_rows * stride;
        unsigned char* target = slab + static_cast<std::uint64_t>(slots[i]) * stride;
        bool is_joined = false;
        if (!reads.requests.empty() && offset >= end && (offset - end) % stride == 0) {
            ScatterRequest& open = reads.requests.back();
            const std::uint64_t gap = (offset - end) / stride;
            const bool has_room = offset + stride - open.offset <= max_bytes && open.parts.size() + gap < MAX_ROW_PARTS;
            if (gap <= max_gap && has_room) {
                for (std::uint64_t skipped = 0; skipped < gap; ++skipped) open.parts.push_back({scratch, stride});
                iovec& before = open.parts.back();
                // Neighbours in the file that are neighbours in memory, too, are one part.
                if (gap == 0 && static_cast<unsigned char*>(before.iov_base) + before.iov_len == target) {
                    before.iov_len += stride;
                } else {
                    open.parts.push_back({target, stride});
                }
                reads.num_bytes += (gap + 1) * stride;
                is_joined = true;
            }
        }
        if (!is_joined) {
            reads.requests.push_back({file.file_id, offset, {{target, stride}}});
            reads.num_bytes += stride;
        }
        end = offset + stride;
    }
    return reads;
}

}  // namespace flashlm
