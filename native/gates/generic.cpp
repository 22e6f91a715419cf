// The gate kernels on generic: see simd/generic.inc.
#include "gate_kernels.h"

namespace flashlm {
namespace {

#include "../simd/generic.inc"
#include "../simd/elements.inc"
#include "gate_kernels.inc"

}  // namespace

const GateKernels generic_gate_kernels = gate_kernels();

}  // namespace flashlm
