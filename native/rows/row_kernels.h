// Row kernels: the FFN of a streamed model on rows as they lie in the pack, `[gate | up | down]`, any subset, any order.
//
// Plain data and tables only. The files compiled for one instruction set include this header and nothing with inline
// functions, so that no code built with their flags can be merged into the baseline by the linker.
//
// What holds for every kernel here, and what the tests hold them to:
// - fp32 accumulation, no allocation, no alignment assumed, never a byte read outside the stated parts;
// - `project`: every output is one dot product in one order, which depends on hidden_size and the instruction set only;
// - `accumulate`: every y[t, k] takes its rows in ascending order, one multiply-add each, from the y that is stored.
// - with tokens in 8 bits: 32 products are added up in integers, exactly, then scaled in fp32, parts in ascending order.
// So neither the cutting into calls, nor the number of threads, nor the number of tokens changes a bit of a result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encodings.h"

namespace flashlm {

constexpr std::size_t MAX_TOKENS = 16;

// One part (gate, up or down) of the rows of a block.
struct Rows {
    const unsigned char* base;    // the part of row 0
    std::size_t stride_bytes;     // from one row to the next
    const std::uint32_t* slots;   // row i is at slots[i]; null: at i
    std::size_t num_rows;
    std::size_t hidden_size;      // elements of the part, whole groups
};

// out[t, r] = sum_k x[t, k] * row[r][k] (+ bias[r]); x is [num_tokens, hidden_size] contiguous.
struct ProjectArgs {
    Rows rows;
    const float* x;
    std::size_t num_tokens;
    float* out;
    std::size_t out_stride;       // elements from token to token
    const float* bias;            // may be null
};

// y[t, k] += sum_r h[t, r] * row[r][k]; y is [num_tokens, hidden_size] contiguous. Rows whose h is 0 for all tokens are
// not touched, unless `takes_zeros`: then infinite and NaN weights show, as in any other product.
struct AccumulateArgs {
    Rows rows;
    const float* h;
    std::size_t h_stride;         // elements from token to token
    std::size_t num_tokens;
    float* y;
    bool takes_zeros = false;
};

// dst[r, k] = row[r][k] in fp32; dst is [num_rows, hidden_size] contiguous.
struct WidenArgs {
    Rows rows;
    float* dst;
};

// One encoding's kernels. Each works on a range: of rows (project, widen) or of columns (accumulate), whose bounds are
// multiples of every group.
struct EncodingKernels {
    void (*project)(const ProjectArgs&, std::size_t row_begin, std::size_t row_end);
    void (*accumulate)(const AccumulateArgs&, std::size_t col_begin, std::size_t col_end);
    void (*widen)(const WidenArgs&, std::size_t row_begin, std::size_t row_end);
};

// The kernels of one instruction set, by `EncodingCode`.
struct RowKernels {
    EncodingKernels of[NUM_ENCODINGS];
};

// Tokens in 8 bits: an element is scale * quant, 32 have one scale.
struct Int8Tokens {
    const std::int8_t* quants;    // [num_tokens, width], -127 to 127
    const float* scales;          // [num_tokens, width / 32]
    const float* sums;            // [num_tokens, width / 32]: of the elements, which offsets of rows are multiplied by
    const float* wide_scales;     // [num_tokens, width / 4]: the scales, eight times each; null for matrices
    const std::int32_t* fours;    // [num_tokens, width / 4]: of each four quants the sum, negative; null for matrices
    std::size_t num_tokens;
};

// As ProjectArgs, for at most MAX_TOKENS of these.
struct Int8ProjectArgs {
    Rows rows;
    Int8Tokens x;
    float* out;
    std::size_t out_stride;
    const float* bias;
};

// By `EncodingCode`; null where elements are no small integers.
struct Int8Kernels {
    void (*of[NUM_ENCODINGS])(const Int8ProjectArgs&, std::size_t row_begin, std::size_t row_end);
};

// The same for more tokens, with what their sums in integers start at: what a row's quants are lifted by is taken off again.
struct Int8MatrixArgs {
    Rows rows;                    // without slots or with
    Int8Tokens x;
    float* out;
    std::size_t out_stride;
    const float* bias;
    const std::int32_t* starts;   // [num_tokens, width / scaled_elements]: -lift * sum of the quants
};

// A matrix product in int8; `multiply` is null where there is none.
struct Int8Matrix {
    void (*multiply)(const Int8MatrixArgs&, std::size_t row_begin, std::size_t row_end);
    std::size_t scaled_elements;  // that have one scale
    int lift;                     // is added to quants so that they are not negative
};

// By `EncodingCode`. A range of rows begins at a multiple of `unit`.
struct Int8Matrices {
    Int8Matrix of[NUM_ENCODINGS];
    std::size_t unit;
};

extern const RowKernels generic_row_kernels;
extern const Int8Kernels generic_int8_kernels;
extern const Int8Matrices no_int8_matrices;
#if defined(__x86_64__)
extern const RowKernels avx2_row_kernels, avx512_row_kernels;
extern const Int8Kernels avx2_int8_kernels, vnni_int8_kernels;
extern const Int8Kernels vbmi_int8_kernels;  // of some encodings only
extern const Int8Matrices avx2_int8_matrices, vnni_int8_matrices;
#elif defined(__aarch64__)
extern const RowKernels neon_row_kernels;
extern const Int8Kernels neon_int8_kernels;
#endif

}  // namespace flashlm
