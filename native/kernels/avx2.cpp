// AVX2 + FMA + F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

namespace flashlm {
namespace {

using std::size_t;
using Vec = __m256;
constexpr size_t LANES = 8;
constexpr size_t TILE_ROWS = 3;  // 4 tokens x 3 rows of sums, 3 rows, 1 token: all 16 registers

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float v) { return _mm256_set1_ps(v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec load_fp32(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }

inline __m128i load_halves(const std::uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Vec load_bf16(const std::uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
inline Vec load_fp16(const std::uint16_t* p) { return _mm256_cvtph_ps(load_halves(p)); }

inline float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

using std::uint16_t;
#include "row_kernels.inc"
#include "gate_kernels.inc"

}  // namespace

const KernelTable avx2_kernels = table("avx2");

}  // namespace flashlm
#endif
