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

// One step of an LSTM: gates are the sum of two [batch, 4 * size] arrays in order i, f, g, o; c and h are [batch, size].
struct GatesArgs {
    const float* gates[2];
    const float* c;
    float* h_next;
    float* c_next;
    std::size_t batch, size;
};
void run_gates(const GatesArgs& args);

}  // namespace flashlm
