"""SGD that may turn into ASGD: plain steps, and from some step on the running mean of the weights beside them.

Written out because the whole state must go into a checkpoint: it is the weights, their mean and three numbers. Equal to
`torch.optim.SGD` and to `torch.optim.ASGD(t0=0, lambd=0)` to the bit, and like the latter it takes, once averaging, the
learning rate that was set for the step before (so the scaling by a window's length comes one step late; kept for parity).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class AveragingSGD:
    """Steps of SGD with weight decay; `start_averaging` makes it ASGD.

    Args:
        parameters: To update in place.
        weight_decay: Times the weights, added to the gradients.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.averages: list[torch.Tensor] | None = None
        self.num_averaged = 0
        self.lr_before: float | None = None

    @property
    def is_averaging(self) -> bool:
        """Whether there is a mean of the weights."""
        return self.averages is not None

    def start_averaging(self) -> None:
        """Begin ASGD: the mean counts from here."""
        self.averages = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.num_averaged = 0
        self.lr_before = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step along the gradients and drop them."""
        used = lr if self.lr_before is None else self.lr_before
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            gradient.add_(parameter, alpha=self.weight_decay)
            parameter.add_(gradient, alpha=-used)
            parameter.grad = None
        if self.averages is not None:
            self.num_averaged += 1
            self.lr_before = lr
            share = 1.0 / max(1, self.num_averaged - 1)
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                if share == 1.0:
                    average.copy_(parameter)
                else:
                    average.add_((parameter - average) * share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered the weights are their mean, where there is one with at least one step in it."""
        if self.averages is None or not self.num_averaged:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._set(self.averages)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
