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
#include "streams.inc"
#include "row_kernels.inc"
#include "../simd/int8_avx2.inc"
#include "../simd/int8_sums_avx2.inc"
#include "int8_kernels.inc"
#include "../simd/int8_panels_avx2.inc"
#include "int8_matrix.inc"

}  // namespace

const RowKernels avx2_row_kernels = row_kernels();
const Int8Kernels avx2_int8_kernels = int8_kernels();
const Int8Matrices avx2_int8_matrices = int8_matrices();

}  // namespace flashlm
#endif
