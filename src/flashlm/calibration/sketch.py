"""The low-rank sketch of a layer's trigger weights that is best for the inputs that the layer really gets; no training.

With inputs of mean m and covariance C, the rank-R matrix W' that makes E|W'(x - m) - W(x - m)|² least is W projected on the
R strongest left singular vectors of W·C^½: W' = U Uᵀ W. So reduce = Uᵀ W, expand = U, and what the mean loses is put into
the bias. C^½ comes from an eigendecomposition, d × d, which is the whole cost; all ranks share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

RIDGE = 1e-4  # of the mean variance: directions that the text never took still count a little


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A low-rank map d → R → d_ff, all fp32.

    Attributes:
        reduce: (rank, d_model).
        expand: (d_ff, rank).
        bias: (d_ff,).
    """

    reduce: torch.Tensor
    expand: torch.Tensor
    bias: torch.Tensor

    @property
    def rank(self) -> int:
        """R."""
        return len(self.reduce)

    def to(self, device: str) -> Factors:
        """Return the same on another device."""
        return Factors(reduce=self.reduce.to(device), expand=self.expand.to(device), bias=self.bias.to(device))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return fp32 (num_tokens, d_ff) for fp32 (num_tokens, d_model)."""
        return torch.addmm(self.bias, inputs @ self.reduce.T, self.expand.T)


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """Mean (d_model,) and covariance (d_model, d_model) of a layer's inputs, fp32."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, inputs: Iterable[torch.Tensor]) -> InputMoments:
        """Measure them over pieces fp32 (num_tokens, d_model), summed in fp64."""
        count, total, squares = 0, None, None
        for piece in inputs:
            wide = piece.double()
            count += len(wide)
            total = wide.sum(dim=0) if total is None else total + wide.sum(dim=0)
            squares = wide.T @ wide if squares is None else squares.addmm_(wide.T, wide)
        assert total is not None
        assert squares is not None
        mean = total / count
        covariance = squares / count - torch.outer(mean, mean)
        return cls(mean=mean.float(), covariance=covariance.float())


class TriggerSketch:
    """Low-rank sketches of every rank of one layer.

    Args:
        weight: fp32 (d_ff, d_model), the trigger's.
        bias: fp32 (d_ff,).
        moments: Of the layer's inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, moments: InputMoments) -> None:
        self._weight, self._bias, self._mean = weight, bias, moments.mean
        covariance = moments.covariance.double()
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp(min=1e-12))
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
        whitened = weight @ root.float()  # (d_ff, d_model)
        energies, right = torch.linalg.eigh((whitened.T @ whitened).double())
        singular = energies.flip(0).clamp(min=0.0).sqrt()
        projected = whitened @ right.flip(1).float()  # (d_ff, d_model): column j is singular_j · u_j
        self._num_useful = int((singular > singular[0] * 1e-7).sum())
        self._left = projected[:, : self._num_useful] / singular[: self._num_useful].float()
        self._scaled = projected
        self.max_rank = len(singular)

    def factors(self, rank: int) -> Factors:
        """Return the sketch of `rank`, balanced so that the reduced values have about the size of one."""
        left = self._left[:, : min(rank, self._num_useful)]
        size = self._scaled[:, : left.shape[1]].norm(dim=0).clamp(min=1e-12)
        reduce = left.T @ self._weight / size[:, None]
        expand = left * size
        if left.shape[1] < rank:  # a weight of lower rank than asked for: the rest is zeros
            missing = rank - left.shape[1]
            reduce = torch.cat([reduce, reduce.new_zeros(missing, reduce.shape[1])])
            expand = torch.cat([expand, expand.new_zeros(len(expand), missing)], dim=1)
        bias = self._bias + self._weight @ self._mean - expand @ (reduce @ self._mean)
        return Factors(reduce=reduce.contiguous(), expand=expand.contiguous(), bias=bias)

    def error_std(self, rank: int) -> torch.Tensor:
        """Return how far the sketch of `rank` is off for each row, as a standard deviation, fp32 (d_ff,)."""
        spread: torch.Tensor = self._scaled[:, rank:].square().sum(dim=1).sqrt()
        return spread
