#include "levels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace flashlm {
namespace {

struct Built {
    Level level;
    bool is_supported;
};

// Every level built for this architecture, best first; probed once.
const std::vector<Built>& levels() {
    static const std::vector<Built> all = [] {
        std::vector<Built> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl");
        const bool has_vnni = __builtin_cpu_supports("avx512vnni");
        static Int8Kernels int8 = has_vnni ? vnni_int8_kernels : avx2_int8_kernels;  // of both the same bits
        if (has_vnni && __builtin_cpu_supports("avx512vbmi")) {
            for (std::size_t code = 0; code < NUM_ENCODINGS; ++code) {
                if (vbmi_int8_kernels.of[code]) int8.of[code] = vbmi_int8_kernels.of[code];
            }
        }
        const Int8Matrices& matrices = has_vnni ? vnni_int8_matrices : avx2_int8_matrices;
        found.push_back({{"avx512", avx512_row_kernels, int8, matrices, avx512_gate_kernels}, has_avx512});
        found.push_back({{"avx2", avx2_row_kernels, avx2_int8_kernels, avx2_int8_matrices, avx2_gate_kernels}, has_avx2});
#elif defined(__aarch64__)
        found.push_back({{"neon", neon_row_kernels, neon_int8_kernels, no_int8_matrices, neon_gate_kernels}, true});
#endif
        found.push_back({{"generic", generic_row_kernels, generic_int8_kernels, no_int8_matrices, generic_gate_kernels}, true});
        return found;
    }();
    return all;
}

const Level* find_level(const std::string& name) {
    for (const Built& each : levels()) {
        if (each.is_supported && name == each.level.name) return &each.level;
    }
    std::string supported;
    for (const std::string& each : simd_levels()) supported += (supported.empty() ? "" : ", ") + each;
    throw std::invalid_argument("SIMD level '" + name + "' is not supported here; choose one of: " + supported);
}

const Level* default_level() {
    const char* asked = std::getenv("FLASHLM_SIMD");
    return find_level(asked && *asked ? asked : simd_levels().front());
}

std::atomic<const Level*> current{nullptr};

}  // namespace

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const Built& each : levels()) {
        if (each.is_supported) names.emplace_back(each.level.name);
    }
    return names;
}

const Level& level() {
    const Level* chosen = current.load(std::memory_order_relaxed);
    if (!chosen) {
        chosen = default_level();
        current.store(chosen, std::memory_order_relaxed);
    }
    return *chosen;
}

void set_simd_level(const std::string& name) {
    current.store(name.empty() ? default_level() : find_level(name), std::memory_order_relaxed);
}

}  // namespace flashlm
