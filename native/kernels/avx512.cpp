// AVX-512 F/BW/VL. bf16 is widened by a shift: vdpbf16ps rounds and flushes differently, and no other level could match it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace flashlm {
namespace {

using std::size_t;
using Vec = __m512;
constexpr size_t LANES = 16;
constexpr size_t TILE_ROWS = 6;  // 4 tokens x 6 rows of sums, 6 rows, 1 token: 31 of 32 registers

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec load_fp32(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }

inline __m256i load_halves(const std::uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Vec load_bf16(const std::uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p)), 16));
}
inline Vec load_fp16(const std::uint16_t* p) { return _mm512_cvtph_ps(load_halves(p)); }

inline float sum(Vec v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

using std::uint16_t;
#include "row_kernels.inc"
#include "gate_kernels.inc"

}  // namespace

const KernelTable avx512_kernels = table("avx512");

}  // namespace flashlm
#endif
