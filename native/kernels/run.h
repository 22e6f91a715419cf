// The kernels over a whole block: cut into tasks for the threads. The cut never changes a result (see kernels.h).
#pragma once

#include "kernels.h"

namespace flashlm {

void run_project(DType dtype, const ProjectArgs& args);
// Several products with as many tokens as one job, so that small ones need not wait for each other.
void run_projects(DType dtype, const ProjectArgs* products, std::size_t num_products);
void run_accumulate(DType dtype, const AccumulateArgs& args);
// Several, as `run_projects`.
void run_accumulates(DType dtype, const AccumulateArgs* products, std::size_t num_products);
void run_widen(DType dtype, const WidenArgs& args);

// A row of the batch is a task. Only for fp32 and bf16.
void run_gates(DType dtype, const GatesForwardArgs& args);

}  // namespace flashlm
