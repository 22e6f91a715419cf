"""Activations that checkpoints name and transformers does not know: FATReLU (ProSparse; paper §3.1).

`register` makes them known to transformers, so that its own model classes can be built with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import activations as transformers_activations

from flashlm.errors import UnsupportedModelError

FATRELU_THRESHOLD = 0.01  # ProSparse's checkpoints


class FatReLU(nn.Module):
    """x where x is above `threshold`, else 0."""

    def __init__(self, threshold: float = FATRELU_THRESHOLD) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the thresholded values, same shape and dtype."""
        return torch.where(input > self.threshold, input, torch.zeros_like(input))


def register() -> None:
    """Add the activations to transformers' tables; calling it again does nothing."""
    for table in (transformers_activations.ACT2CLS, transformers_activations.ACT2FN):
        table.setdefault("fatrelu", FatReLU)


def check_parameters(config: Any) -> None:
    """Refuse a config whose activation has another parameter than the one that a pack stands for.

    Raises:
        UnsupportedModelError: FATReLU with another threshold.
    """
    if getattr(config, "hidden_act", None) != "fatrelu":
        return
    threshold = getattr(config, "hidden_act_param", FATRELU_THRESHOLD)
    if threshold != FATRELU_THRESHOLD:
        raise UnsupportedModelError(
            f"hidden_act_param={threshold} is not supported: fatrelu is taken with {FATRELU_THRESHOLD} only"
        )


register()
