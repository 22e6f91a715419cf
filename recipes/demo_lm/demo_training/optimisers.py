"""Muon for the matrices inside the layers, AdamW for everything else.

`torch.optim.Muon` orthogonalises in bfloat16, which CPUs without AVX-512-BF16 emulate (a sixth of fp32's rate on AVX2),
and one matrix after the other. This one works in float32, on a matrix per thread. Source: K. Jordan et al., "Muon: an
optimizer for hidden layers in neural networks", 2024; the coefficients are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of a float matrix near 1 (0.7 to 1.2) by a quintic Newton-Schulz iteration."""
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    x = iterate_on_gram(x) if x.size(1) > 2 * x.size(0) else iterate(x)
    return x.T if is_tall else x


def iterate(x: torch.Tensor) -> torch.Tensor:
    """Return x times a polynomial in x xᵀ, five times over."""
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_on_gram(x: torch.Tensor) -> torch.Tensor:
    """Do as `iterate`, on the small matrix x xᵀ, with which its polynomials commute: 0.6 of the time at 256 x 1536."""
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    product = torch.eye(x.size(0))
    for _ in range(NUM_ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised: every direction of a matrix is learned at the same rate."""

    def __init__(self, params: list[nn.Parameter], lr: float, threads: Executor, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._threads = threads

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every matrix, each on one thread; all have a gradient."""
        jobs = [
            self._threads.submit(self._update, param, group["lr"], group["momentum"])
            for group in self.param_groups
            for param in group["params"]
        ]
        for job in jobs:
            job.result()

    @torch.no_grad()
    def _update(self, param: nn.Parameter, lr: float, momentum: float) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        nesterov = param.grad.lerp(buffer, momentum)
        rows, columns = param.shape
        param.add_(orthogonalise(nesterov), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def make_optimisers(
    model: nn.Module, muon_lr: float, adam_lr: float, threads: Executor
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the optimisers with their peak learning rates: Muon for the layers' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, param in model.named_parameters():
        (matrices if param.ndim == 2 and ".layers." in name else rest).append(param)
    muon = Muon(matrices, lr=muon_lr, threads=threads)
    adamw = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    return [(muon, muon_lr), (adamw, adam_lr)]
