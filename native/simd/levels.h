// Which kernels run: the best level that the processor supports, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "../gates/gate_kernels.h"
#include "../rows/row_kernels.h"

namespace flashlm {

// One instruction set, and what is compiled for it.
struct Level {
    const char* name;
    const RowKernels& rows;
    const Int8Kernels& int8;
    const Int8Matrices& matrices;
    const GateKernels& gates;
};

// The levels that this machine supports, best first.
std::vector<std::string> simd_levels();

// The level in use. On the first call: that of FLASHLM_SIMD where it is set, else the best.
// Throws std::invalid_argument where FLASHLM_SIMD names a level that is unknown or not supported.
const Level& level();

// Chooses a level by name, or the default one again with an empty name. Throws std::invalid_argument as above.
void set_simd_level(const std::string& name);

}  // namespace flashlm
