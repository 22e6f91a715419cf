// Built without contraction (CMakeLists.txt): a fused multiply-add would round other elements than the reference does.
// Baseline instructions throughout; loops are written so that compilers make vectors of them.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "encodings.h"

namespace flashlm {
namespace {

constexpr std::size_t GROUP = ENCODINGS[Q8_0].group_elements, GROUP_BYTES = ENCODINGS[Q8_0].group_bytes;
constexpr std::uint32_t INFINITE = 0x7f800000, FP16_OVERFLOWS = 0x477ff000;  // 65520: rounds to infinity

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Of a value that is not negative and does not overflow; to nearest, ties to even.
std::uint16_t to_fp16(float value) {
    const std::uint32_t bits = bits_of(value);
    if (bits < 0x38800000) return static_cast<std::uint16_t>(bits_of(value + 0.5f) - 0x3f000000);  // subnormal there
    return static_cast<std::uint16_t>((bits + 0xc8000fff + ((bits >> 13) & 1)) >> 13);
}

}  // namespace

bool quantize_q8_0(const QuantizeArgs& args) {
    const std::size_t num_groups = args.width / GROUP;
    for (std::size_t row = 0; row < args.num_rows; ++row) {
        const float* from = args.source + row * args.width;
        unsigned char* to = args.target + row * args.target_stride_bytes;
        for (std::size_t group = 0; group < num_groups; ++group, from += GROUP, to += GROUP_BYTES) {
            std::int32_t largest_bits = 0;  // magnitudes compare as their bits do, NaN as the largest of all
            for (std::size_t i = 0; i < GROUP; ++i) {
                largest_bits = std::max(largest_bits, static_cast<std::int32_t>(bits_of(from[i]) & 0x7fffffff));
            }
            if (static_cast<std::uint32_t>(largest_bits) >= INFINITE) return false;
            const float scale = from_bits(static_cast<std::uint32_t>(largest_bits)) / 127.0f;
            if (bits_of(scale) >= FP16_OVERFLOWS) return false;
            const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
            const std::uint16_t narrow = to_fp16(scale);
            std::memcpy(to, &narrow, sizeof narrow);
            // A scale of fewer bits than fp32 has makes an infinite inverse, and the reference's bytes depend on how its
            // machine casts such numbers; fp16 holds no such scale, so that the elements are zero whatever they are.
            if (!std::isfinite(inverse)) {
                std::memset(to + sizeof narrow, 0, GROUP);
                continue;
            }
            std::int8_t rounded[GROUP];
            for (std::size_t i = 0; i < GROUP; ++i) {
                const float scaled = from[i] * inverse;
                const std::int32_t whole = static_cast<std::int32_t>(scaled);
                const float rest = scaled - static_cast<float>(whole);  // halves go away from zero
                rounded[i] = static_cast<std::int8_t>(whole + static_cast<std::int32_t>(rest + rest));
            }
            std::memcpy(to + sizeof narrow, rounded, GROUP);
        }
    }
    return true;
}

void quantize_tokens(const QuantizeTokensArgs& args) {
    constexpr std::size_t PART = 32;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    for (std::size_t part = 0; part < args.num_parts; ++part) {
        const float* from = args.source + part * PART;
        std::int8_t* to = args.quants + part * PART;
        std::int32_t largest_bits = 0;  // magnitudes compare as their bits do, NaN as the largest of all
        for (std::size_t i = 0; i < PART; ++i) {
            largest_bits = std::max(largest_bits, static_cast<std::int32_t>(bits_of(from[i]) & 0x7fffffff));
        }
        float scale = from_bits(static_cast<std::uint32_t>(largest_bits)) / 127.0f;
        float inverse = 1.0f / scale;
        const bool is_finite = static_cast<std::uint32_t>(largest_bits) < INFINITE;
        if (!is_finite || scale < std::numeric_limits<float>::min()) {  // a subnormal one has no exact inverse: as zeros
            scale = is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
            inverse = 0.0f;
        }
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < PART; ++i) {
            const float finite = is_finite ? from[i] : 0.0f;
            const auto quant = static_cast<std::int32_t>(bits_of(finite * inverse + ROUND) - bits_of(ROUND));
            to[i] = static_cast<std::int8_t>(quant);
            sum += quant;
        }
        args.scales[part] = scale;
        args.sums[part] = scale * static_cast<float>(sum);
    }
}

void spread_tokens(const QuantizeTokensArgs& tokens, float* wide_scales, std::int32_t* fours) {
    for (std::size_t i = 0; i < tokens.num_parts * 8; ++i) {
        const std::int8_t* four = tokens.quants + 4 * i;
        wide_scales[i] = tokens.scales[i / 8];
        fours[i] = -(four[0] + four[1] + four[2] + four[3]);
    }
}

}  // namespace flashlm
