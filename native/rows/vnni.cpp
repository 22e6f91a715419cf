// Products in int8 by AVX-512 VNNI, in registers of 256 bits: see simd/int8_vnni.inc.
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
#include "../simd/int8_vnni.inc"
#include "../simd/int8_sums_avx2.inc"
#include "int8_kernels.inc"

}  // namespace

const Int8Kernels vnni_int8_kernels = int8_kernels();

}  // namespace flashlm
#endif
