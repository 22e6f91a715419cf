// NEON (ARMv8-A). Written for, checked only through an emulation of its intrinsics (SIMDe), never on the hardware.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"

namespace flashlm {
namespace {

using std::size_t;
using Vec = float32x4_t;
constexpr size_t LANES = 4;
constexpr size_t TILE_ROWS = 6;  // 4 tokens x 6 rows of sums, 6 rows, 1 token: 31 of 32 registers

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec broadcast(float v) { return vdupq_n_f32(v); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec load_fp32(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }

inline Vec load_bf16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Vec load_fp16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

inline float sum(Vec v) {
    const float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}

using std::uint16_t;
#include "row_kernels.inc"
#include "gate_kernels.inc"

}  // namespace

const KernelTable neon_kernels = table("neon");

}  // namespace flashlm
#endif
