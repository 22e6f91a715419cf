// The gate kernels on avx512: see simd/avx512.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gate_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx512.inc"
#include "../simd/elements.inc"
#include "gate_kernels.inc"

}  // namespace

const GateKernels avx512_gate_kernels = gate_kernels();

}  // namespace flashlm
#endif
