"""Resident weights: `model.safetensors` read once, sequentially, into anonymous memory.

transformers maps the file and hands out views of the mapping, whose pages the kernel may drop under pressure and read back
one by one. So after it has built the model (without touching those pages) every weight is pointed at our own copy of the
file's data section, read directly at the device's full rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flashlm.pack.checkpoint import TensorEntry, read_safetensors_header
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest

_READ_BYTES = 16 << 20
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ResidentLoad:
    """What loading the resident part took: bytes read and seconds."""

    num_bytes: int
    elapsed_s: float
