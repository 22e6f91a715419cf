// The row kernels on avx2: see simd/avx2.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx2.inc"
#include "../simd/bytes_avx2.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "row_kernels.inc"

}  // namespace

const RowKernels avx2_row_kernels = row_kernels();

}  // namespace flashlm
#endif
