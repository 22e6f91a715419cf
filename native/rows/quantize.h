// Writing what is not plain: rows as GGUF's reference quantiser writes them, and tokens in 8 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashlm {

// fp32 rows to q8_0, one thread. Returns false where an element is infinite, NaN, or too large for a scale.
struct QuantizeArgs {
    const float* source;          // [num_rows, width] contiguous, whole groups
    std::size_t num_rows, width;
    unsigned char* target;
    std::size_t target_stride_bytes;
};
bool quantize_q8_0(const QuantizeArgs& args);

// fp32 elements to 8 bits, each 32 with a scale of their own: their largest magnitude over 127; to nearest, ties to even.
// Where one is infinite or NaN the scale is NaN; where the scale would be subnormal, it is 0.
struct QuantizeTokensArgs {
    const float* source;          // [num_parts * 32]
    std::size_t num_parts;
    std::int8_t* quants;          // [num_parts * 32]
    float* scales;                // [num_parts]
    float* sums;                  // [num_parts]: scale * sum of the quants
};
void quantize_tokens(const QuantizeTokensArgs& args);

// Of tokens in 8 bits: their scales, eight times each, and the sum of each four quants, negative; both [num_parts * 8].
void spread_tokens(const QuantizeTokensArgs& tokens, float* wide_scales, std::int32_t* fours);

}  // namespace flashlm
