// The row kernels on generic: see simd/generic.inc.
#include "row_kernels.h"

namespace flashlm {
namespace {

#include "../simd/generic.inc"
#include "../simd/bytes_pair.inc"
#include "../simd/elements.inc"
#include "codecs.inc"
#include "row_kernels.inc"

}  // namespace

const RowKernels generic_row_kernels = row_kernels();

}  // namespace flashlm
