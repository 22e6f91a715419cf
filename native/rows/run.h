// The kernels over a whole block: cut into tasks for the threads. The cut never changes a result (see kernels.h).
#pragma once

#include "quantize.h"
#include "row_kernels.h"

namespace flashlm {

void run_project(EncodingCode code, const ProjectArgs& args);
// Several products with as many tokens as one job, so that small ones need not wait for each other.
void run_projects(EncodingCode code, const ProjectArgs* products, std::size_t num_products);
// Whether tokens in int8 can be multiplied with rows of an encoding.
bool has_int8(EncodingCode code);
void run_project_int8(EncodingCode code, const Int8ProjectArgs& args);
void run_projects_int8(EncodingCode code, const Int8ProjectArgs* products, std::size_t num_products);
// Whether more than MAX_TOKENS of them can.
bool has_int8_matrix(EncodingCode code);
void run_multiply_int8(EncodingCode code, const Int8ProjectArgs& args);
void run_quantize_tokens(const QuantizeTokensArgs& args);
void run_accumulate(EncodingCode code, const AccumulateArgs& args);
// Several, as `run_projects`.
void run_accumulates(EncodingCode code, const AccumulateArgs* products, std::size_t num_products);
void run_widen(EncodingCode code, const WidenArgs& args);

}  // namespace flashlm
