// The row kernels on avx512: see simd/avx512.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx512.inc"
#include "../simd/bytes_avx2.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "codecs_avx512.inc"
#include "streams.inc"
#include "row_kernels.inc"

}  // namespace

const RowKernels avx512_row_kernels = row_kernels();

}  // namespace flashlm
#endif
