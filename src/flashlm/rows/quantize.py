"""Writing rows in encodings that are not plain: the bytes that GGUF's reference quantiser writes, natively.

q8_0: a group's scale is its largest magnitude over 127; an element becomes the nearest multiple of it, halves away from
zero. As in the reference, elements are divided by the scale in fp32, before it is rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashlm import _native

# By encoding. Each takes fp32 (num_rows, width), contiguous, and writes uint8 (num_rows, bytes of a part) with any row
# stride. ConfigError: an element is infinite, NaN, or larger than the encoding can say.
QUANTIZERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {"q8_0": _native.quantize_q8_0}
