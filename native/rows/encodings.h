// What the bytes of a row's part mean: the one table of encodings. `flashlm.rows.encodings` is made from it.
#pragma once

#include <cstddef>

namespace flashlm {

// Stands for an encoding in kernel tables and calls; in files encodings go by name. Packs hold no codes, so that their order
// is free.
enum EncodingCode : unsigned {
    BF16,
    FP16,
    FP32,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    FP8_BLOCK,
    NUM_ENCODINGS,
};

struct Encoding {
    const char* name;
    std::size_t group_elements;  // a part is whole groups
    std::size_t group_bytes;
};

// From q8_0 to mxfp4 a group's bytes are those of GGUF's block of that name. fp8_block: the fp32 scale of 128 elements, then
// these as e4m3 (finite ones and NaN).
constexpr Encoding ENCODINGS[NUM_ENCODINGS] = {
    {"bf16", 1, 2},      {"fp16", 1, 2},      {"fp32", 1, 4},      {"q8_0", 32, 34},    {"q4_0", 32, 18},
    {"q4_1", 32, 20},    {"q5_0", 32, 22},    {"q5_1", 32, 24},    {"q4_k", 256, 144},  {"q5_k", 256, 176},
    {"q6_k", 256, 210},  {"iq4_nl", 32, 18},  {"iq4_xs", 256, 136}, {"mxfp4", 32, 17},   {"fp8_block", 128, 132},
};

// Bytes of a part of so many elements, which must be whole groups.
constexpr std::size_t part_bytes(EncodingCode code, std::size_t num_elements) {
    return num_elements / ENCODINGS[code].group_elements * ENCODINGS[code].group_bytes;
}

}  // namespace flashlm
