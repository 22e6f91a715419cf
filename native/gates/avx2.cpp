// The gate kernels on avx2: see simd/avx2.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "gate_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx2.inc"
#include "../simd/elements.inc"
#include "gate_kernels.inc"

}  // namespace

const GateKernels avx2_gate_kernels = gate_kernels();

}  // namespace flashlm
#endif
