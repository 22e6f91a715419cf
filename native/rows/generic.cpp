// The row kernels on generic: see simd/generic.inc.
#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/generic.inc"
#include "../simd/bytes_pair.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "streams.inc"
#include "row_kernels.inc"
#include "../simd/int8_pair.inc"
#include "int8_kernels.inc"

}  // namespace

const RowKernels generic_row_kernels = row_kernels();
const Int8Kernels generic_int8_kernels = int8_kernels();
const Int8Matrices no_int8_matrices{};

}  // namespace flashlm
