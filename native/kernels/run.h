// The kernels over a whole block: cut into tasks for the threads. The cut never changes a result (see kernels.h).
#pragma once

#include "kernels.h"

namespace flashlm {

void run_project(DType dtype, const ProjectArgs& args);
void run_accumulate(DType dtype, const AccumulateArgs& args);
void run_widen(DType dtype, const WidenArgs& args);

}  // namespace flashlm
