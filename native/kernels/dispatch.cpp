#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace flashlm {
namespace {

struct Level {
    const KernelTable* table;
    bool is_supported;
};

// Every level built for this architecture, best first; probed once.
const std::vector<Level>& levels() {
    static const std::vector<Level> all = [] {
        std::vector<Level> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool has_avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl");
        found.push_back({&avx512_kernels, has_avx512});
        found.push_back({&avx2_kernels, has_avx2});
#elif defined(__aarch64__)
        found.push_back({&neon_kernels, true});
#endif
        found.push_back({&generic_kernels, true});
        return found;
    }();
    return all;
}

const KernelTable* find_level(const std::string& name) {
    for (const Level& level : levels()) {
        if (level.is_supported && name == level.table->name) return level.table;
    }
    std::string supported;
    for (const std::string& level : simd_levels()) supported += (supported.empty() ? "" : ", ") + level;
    throw std::invalid_argument("SIMD level '" + name + "' is not supported here; choose one of: " + supported);
}

const KernelTable* default_level() {
    const char* asked = std::getenv("FLASHLM_SIMD");
    return find_level(asked && *asked ? asked : simd_levels().front());
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) {
        if (level.is_supported) names.emplace_back(level.table->name);
    }
    return names;
}

const KernelTable& kernels() {
    const KernelTable* table = current.load(std::memory_order_relaxed);
    if (!table) {
        table = default_level();
        current.store(table, std::memory_order_relaxed);
    }
    return *table;
}

void set_simd_level(const std::string& name) {
    current.store(name.empty() ? default_level() : find_level(name), std::memory_order_relaxed);
}

}  // namespace flashlm
