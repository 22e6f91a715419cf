// Writing encodings that are not plain: the bytes that GGUF's reference quantiser writes.
#pragma once

#include <cstddef>

namespace flashlm {

// fp32 rows to q8_0, one thread. Returns false where an element is infinite, NaN, or too large for a scale.
struct QuantizeArgs {
    const float* source;          // [num_rows, width] contiguous, whole groups
    std::size_t num_rows, width;
    unsigned char* target;
    std::size_t target_stride_bytes;
};
bool quantize_q8_0(const QuantizeArgs& args);

}  // namespace flashlm
