// The gates of an LSTM step, for the recurrent unit: plain data and a table, as in rows/row_kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashlm {

// What the products around the gates compute in.
enum GateType : unsigned { GATE_BF16 = 0, GATE_FP32 = 1 };
constexpr unsigned NUM_GATE_TYPES = 2;

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

// The gates of one instruction set, by GateType. Each works on a range of rows of the batch.
struct GateKernels {
    void (*forward[NUM_GATE_TYPES])(const GatesForwardArgs&, std::size_t row_begin, std::size_t row_end);
    void (*backward[NUM_GATE_TYPES])(const GatesBackwardArgs&, std::size_t row_begin, std::size_t row_end);
};

extern const GateKernels generic_gate_kernels;
#if defined(__x86_64__)
extern const GateKernels avx2_gate_kernels;
extern const GateKernels avx512_gate_kernels;
#elif defined(__aarch64__)
extern const GateKernels neon_gate_kernels;
#endif

}  // namespace flashlm
