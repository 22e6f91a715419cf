// What the bytes of a row's part mean: the one table of encodings. `flashlm.rows.encodings` is made from it.
#pragma once

#include <cstddef>

namespace flashlm {

// Stands for an encoding in kernel tables and calls; in files encodings go by name.
enum EncodingCode : unsigned { BF16 = 0, FP16 = 1, FP32 = 2, Q8_0 = 3 };
constexpr unsigned NUM_ENCODINGS = 4;

struct Encoding {
    const char* name;
    std::size_t group_elements;  // a part is whole groups
    std::size_t group_bytes;
};

constexpr Encoding ENCODINGS[NUM_ENCODINGS] = {
    {"bf16", 1, 2},
    {"fp16", 1, 2},
    {"fp32", 1, 4},
    {"q8_0", 32, 34},
};

// Bytes of a part of so many elements, which must be whole groups.
constexpr std::size_t part_bytes(EncodingCode code, std::size_t num_elements) {
    return num_elements / ENCODINGS[code].group_elements * ENCODINGS[code].group_bytes;
}

}  // namespace flashlm
