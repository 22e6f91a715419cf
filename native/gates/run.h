// The gates over a whole batch.
#pragma once

#include "gate_kernels.h"

namespace flashlm {

// On our threads, a row of the batch a task: for inference, whose products run there, too.
void run_gates(GateType type, const GatesForwardArgs& args);

}  // namespace flashlm
