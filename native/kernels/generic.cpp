// Plain C++ for the ABI floor: the compiler's vector extension, no intrinsics. It multiplies and adds with two roundings
// (kernels are compiled with -ffp-contract=off), because a fused multiply-add without hardware is a slow library call.
#include "kernels.h"

namespace flashlm {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr size_t LANES = 4;
constexpr size_t TILE_ROWS = 2;

inline Vec broadcast(float v) { return Vec{v, v, v, v}; }
inline Vec zero() { return broadcast(0.0f); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec load_fp32(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

inline Bits load_halves(const uint16_t* p) { return Bits{p[0], p[1], p[2], p[3]}; }
inline Vec load_bf16(const uint16_t* p) { return (Vec)(load_halves(p) << 16); }

// The exponent is rebiased by adding; subnormals by a subtraction of normal numbers, so that it works where a process
// flushes subnormals to zero.
inline Vec load_fp16(const uint16_t* p) {
    constexpr uint32_t bias = 112u << 23;
    const Bits half = load_halves(p), magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
    const Vec normal = (Vec)(magnitude + bias);
    const Vec subnormal = (Vec)(magnitude + (113u << 23)) - (Vec)(Bits{} + (113u << 23));
    const Vec special = (Vec)(magnitude + 2 * bias);
    const Bits is_subnormal = (Bits)(magnitude < (0x0400u << 13)), is_special = (Bits)(magnitude >= (0x7c00u << 13));
    const Bits finite = (is_subnormal & (Bits)subnormal) | (~is_subnormal & (Bits)normal);
    return (Vec)((is_special & (Bits)special) | (~is_special & finite) | sign);
}

inline float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#include "row_kernels.inc"
#include "gate_kernels.inc"

}  // namespace

const KernelTable generic_kernels = table("generic");

}  // namespace flashlm
