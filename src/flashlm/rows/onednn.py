"""Products in fp32 by oneDNN, which torch carries beside MKL, where that is the faster one.

torch multiplies fp32 with MKL, which leaves half of the rate of AMD's processors with AVX-512 unused: two cores of Zen 5,
128 tokens by 4096 x 4096: 184 against 430 GFLOP/s (docs/experiments.md). The choice is by processor, never by timing, so
that the same run multiplies in the same way again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor of the kind on which oneDNN was measured to be twice as fast as MKL."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return vendor and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))


def onednn_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b.T (+ bias) in fp32, outside autograd.

    Args:
        a: (n, k), any strides.
        b: (m, k), any strides.
        bias: (m,).
    """
    # rows with gaps between them send oneDNN to its reference code, a hundred times slower
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
