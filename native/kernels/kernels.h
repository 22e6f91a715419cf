// Row kernels: the FFN of a streamed model on rows as they lie in the pack, `[gate | up | down]`, any subset, any order.
//
// Plain data and tables only. The files compiled for one instruction set include this header and nothing with inline
// functions, so that no code built with their flags can be merged into the baseline by the linker.
//
// What holds for every kernel here, and what the tests hold them to:
// - fp32 accumulation, no allocation, no alignment assumed, never a byte read outside the stated parts;
// - `project`: every output is one dot product in one order, which depends on hidden_size and the instruction set only;
// - `accumulate`: every y[t, k] takes its rows in ascending order, one multiply-add each, from the y that is stored.
// So neither the cutting into calls, nor the number of threads, nor the number of tokens changes a bit of a result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashlm {

enum DType : unsigned { BF16 = 0, FP16 = 1, FP32 = 2 };
constexpr unsigned NUM_DTYPES = 3;
constexpr std::size_t MAX_TOKENS = 16;

// One part (gate, up or down) of the rows of a block.
struct Rows {
    const unsigned char* base;    // the part of row 0
    std::size_t stride_bytes;     // from one row to the next
    const std::uint32_t* slots;   // row i is at slots[i]; null: at i
    std::size_t num_rows;
    std::size_t hidden_size;      // elements of the part
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

// One step of an LSTM over `[batch, 4 * size]` gates in order i, f, g, o; c and h are [batch, size]. All contiguous; no output
// is an input. "low" arrays are in the kernel's dtype, the others fp32.
struct GatesForwardArgs {
    const void* gates;            // low: before the activations
    const float* context;         // added to them; may be null
    const float* c;
    float* activations;           // what backward needs, as the gates lie; may be null
    float* h_next;
    float* c_next;
    void* h_low;                  // h_next again, low; may be null
    std::size_t batch, size;
};

struct GatesBackwardArgs {
    const float* activations;
    const float* c;               // before the step
    const float* c_next;
    const float* grad_h;          // of this step's output
    const void* grad_h_next;      // low: what the next step's product gave
    const float* grad_c;
    void* grad_gates;             // low
    float* grad_c_before;
    std::size_t batch, size;
};

// The kernels of one instruction set, by DType. Each works on a range: of rows (project, widen, gates) or columns (accumulate).
// There are no gates in fp16.
struct KernelTable {
    const char* name;
    std::size_t lanes;
    void (*project[NUM_DTYPES])(const ProjectArgs&, std::size_t row_begin, std::size_t row_end);
    void (*accumulate[NUM_DTYPES])(const AccumulateArgs&, std::size_t col_begin, std::size_t col_end);
    void (*widen[NUM_DTYPES])(const WidenArgs&, std::size_t row_begin, std::size_t row_end);
    void (*gates_forward[NUM_DTYPES])(const GatesForwardArgs&, std::size_t row_begin, std::size_t row_end);
    void (*gates_backward[NUM_DTYPES])(const GatesBackwardArgs&, std::size_t row_begin, std::size_t row_end);
};

extern const KernelTable generic_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
#endif

}  // namespace flashlm
