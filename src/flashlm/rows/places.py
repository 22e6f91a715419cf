"""Where a tensor's memory is: to notice that a parameter was replaced. Native calls take tensors, never this."""

from __future__ import annotations

import torch

Place = tuple[int, torch.dtype, torch.Size]


def place_of(tensor: torch.Tensor) -> Place:
    """Return what tells a contiguous tensor in memory from another one, as long as it is kept."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape
