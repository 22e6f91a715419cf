// The gate kernels on neon: see simd/neon.inc.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "gate_kernels.h"

namespace flashlm {
namespace {

#include "../simd/neon.inc"
#include "../simd/elements.inc"
#include "gate_kernels.inc"

}  // namespace

const GateKernels neon_gate_kernels = gate_kernels();

}  // namespace flashlm
#endif
