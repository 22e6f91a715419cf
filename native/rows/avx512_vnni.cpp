// Products of matrices in int8 by AVX-512 VNNI, in registers of 512 bits: see simd/int8_panels_vnni.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx512.inc"
#include "../simd/bytes_avx2.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "streams.inc"
#include "../simd/int8_panels_vnni.inc"
#include "int8_matrix.inc"

}  // namespace

const Int8Matrices vnni_int8_matrices = int8_matrices();

}  // namespace flashlm
#endif
