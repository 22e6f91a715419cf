// Reads of scattered rows of one layer file: neighbours become one read, and small gaps are read through.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "reader.h"

namespace flashlm {

// Where row i lies: at (i / block_rows) * block_stride + (i % block_rows) * row_stride.
struct RowFile {
    std::uint64_t file_id;
    std::uint64_t row_stride;
    std::uint64_t block_rows;
    std::uint64_t block_stride;
};

struct RowReads {
    std::vector<ScatterRequest> requests;
    std::uint64_t num_bytes = 0;  // gaps included
};

// Plans reads of `rows` (ascending) to slab + slots[i] * row_stride. Up to `max_gap` rows between two wanted ones are read
// to `scratch` (row_stride bytes; all gaps share it) instead of beginning a new read. Reads end at `max_bytes`.
RowReads plan_row_reads(const RowFile& file, const std::int32_t* rows, const std::int32_t* slots, std::size_t num_rows,
                        unsigned char* slab, unsigned char* scratch, std::size_t max_gap, std::size_t max_bytes);

}  // namespace flashlm
