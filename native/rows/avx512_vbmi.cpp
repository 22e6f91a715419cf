// Products of nibbles with a few tokens in int8 by AVX-512 VNNI and VBMI: see int8_pairs.inc.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>

#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/avx512.inc"
#include "../simd/bytes_avx2.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "streams.inc"
#include "int8_pairs.inc"

}  // namespace

const Int8Kernels vbmi_int8_kernels = pair_kernels();

}  // namespace flashlm
#endif
