// The row kernels on neon: see simd/neon.inc.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/neon.inc"
#include "../simd/bytes_pair.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "streams.inc"
#include "row_kernels.inc"
#include "../simd/int8_pair.inc"
#include "int8_kernels.inc"

}  // namespace

const RowKernels neon_row_kernels = row_kernels();
const Int8Kernels neon_int8_kernels = int8_kernels();

}  // namespace flashlm
#endif
