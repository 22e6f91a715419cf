"""The pyramidal transform F_P: R^N → R^M (paper figure 2): the input at several resolutions, one matrix for each.

It depends on the input only, so a whole sequence goes through it in one product per level, outside the time loop.
Sub-sampling by average, skip or convolution is linear with a few shared taps, so the transform folds into one dense
matrix; by max it is not and does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.errors import ConfigError
from flashlm.pru.products import linear
from flashlm.pru.shapes import (
    Split,
    Subsampling,
    check_choice,
    check_positive,
    level_input_sizes,
    level_output_sizes,
)


class PyramidalTransform(nn.Module):
    """y = concat_k(W_k z_k + b_k) (+ x where sizes match), z_1 = x, z_k = z_{k-1} sub-sampled by two.

    Sub-sampling is over the feature axis. The kernel of the last level has 3 taps, each shallower one 2 more; the zeros
    beyond the edge count in the average, as in the authors' code, so the first feature of a level is biased low.

    Args:
        input_size: N, divisible by 2^(levels - 1).
        output_size: M.
        levels: K; 1 is a plain linear layer.
        num_gates: Transforms of the same shape computed together; each has its own weights and the residual.
        bias: Whether there is b_k.
        split: `code` gives level k > 1 ceil(M / 2^k) outputs, `equal` M / K.
        subsampling: `average` (the paper's), `max`, `skip` (every other feature) or `conv` (learned taps, at first 1/s).
        residual: Add x to every gate where N equals M; elsewhere it does nothing.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size can't be halved or shared out, or an option is unknown.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        levels: int = 2,
        *,
        num_gates: int = 1,
        bias: bool = True,
        split: Split = "code",
        subsampling: Subsampling = "average",
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("subsampling", subsampling, Subsampling)
        check_positive(num_gates=num_gates)
        self.input_size, self.output_size, self.levels, self.num_gates = input_size, output_size, levels, num_gates
        self.split, self.subsampling = split, subsampling
        self.has_residual = residual and input_size == output_size
        self.level_inputs = level_input_sizes(input_size, levels)
        self.level_outputs = level_output_sizes(output_size, levels, split)
        self.kernel_sizes = [3 + 2 * (levels - level) for level in range(2, levels + 1)]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        pairs = list(zip(self.level_inputs, self.level_outputs, strict=True))
        self.weights = nn.ParameterList([parameter(num_gates * outputs, inputs) for inputs, outputs in pairs])
        self.biases = nn.ParameterList([parameter(num_gates * outputs) for _, outputs in pairs] if bias else [])
        learned = self.kernel_sizes if subsampling == "conv" else []
        self.taps = nn.ParameterList([parameter(size) for size in learned])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Semi-orthogonal weights over all gates of a level, zero biases, averaging taps (the authors' code)."""
        for weight in self.weights:
            if not weight.is_meta:
                orthogonalise(weight.detach())
        for bias in self.biases:
            nn.init.zeros_(bias)
        for taps in self.taps:
            nn.init.constant_(taps, 1.0 / len(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform the last axis: (..., input_size) → (..., num_gates * output_size), gate after gate.

        Raises:
            ConfigError: The last axis has another size.
        """
        if x.shape[-1] != self.input_size:
            raise ConfigError(f"input must have {self.input_size} features, got {tuple(x.shape)}")
        parts, z = [], x
        for level, weight in enumerate(self.weights):
            if level:
                z = self._halved(z, level - 1)
            y = linear(z, weight, self.biases[level] if len(self.biases) else None)
            parts.append(y.view(*x.shape[:-1], self.num_gates, self.level_outputs[level]))
        joined = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if self.has_residual:
            joined = joined + x.unsqueeze(-2).to(joined.dtype)  # not wider than the products under autocast
        return joined.flatten(-2)

    def folded_weight(self) -> torch.Tensor:
        """Return the dense matrix (num_gates * output_size, input_size) that does the same; differentiable.

        Raises:
            ConfigError: Sub-sampling is `max`, which is not linear.
        """
        if self.subsampling == "max":
            raise ConfigError("subsampling='max' is not linear, so the transform can't be folded into one matrix")
        parts = []
        for level, weight in enumerate(self.weights):
            dense: torch.Tensor = weight
            for step in reversed(range(level)):
                dense = _spread(dense, self._kernel(step, dense))
            parts.append(dense.view(self.num_gates, self.level_outputs[level], self.input_size))
        joined = torch.cat(parts, dim=1)
        if self.has_residual:
            joined = joined + torch.eye(self.input_size, device=joined.device, dtype=joined.dtype)
        return joined.flatten(0, 1)

    def folded_bias(self) -> torch.Tensor | None:
        """Return the bias (num_gates * output_size,), gate after gate, or None without one; differentiable."""
        if not len(self.biases):
            return None
        parts = [b.view(self.num_gates, -1) for b in self.biases]
        return torch.cat(parts, dim=1).flatten()

    def level_inputs_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return z_1 ... z_K, each (..., input_size / 2^(k-1))."""
        levels = [x]
        for step in range(self.levels - 1):
            levels.append(self._halved(levels[-1], step))
        return levels

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return (
            f"{self.input_size}, {self.output_size}, levels={self.levels}, num_gates={self.num_gates},"
            f" split={self.split}, subsampling={self.subsampling}, residual={self.has_residual}"
        )

    def _kernel(self, step: int, like: torch.Tensor) -> torch.Tensor:
        if self.subsampling == "skip":
            return torch.ones(1, device=like.device, dtype=like.dtype)
        if self.subsampling == "conv":
            taps: torch.Tensor = self.taps[step]
            return taps
        size = self.kernel_sizes[step]
        return torch.full((size,), 1.0 / size, device=like.device, dtype=like.dtype)

    def _halved(self, z: torch.Tensor, step: int) -> torch.Tensor:
        if self.subsampling == "skip":
            return z[..., ::2]
        size = self.kernel_sizes[step]
        rows = z.reshape(z.shape[:-1].numel(), 1, z.shape[-1])
        if self.subsampling == "average":
            rows = F.avg_pool1d(
                rows, size, stride=2, padding=size // 2
            )  # counts the padding, as the authors' code does
        elif self.subsampling == "max":
            rows = F.max_pool1d(rows, size, stride=2, padding=size // 2)
        else:
            rows = F.conv1d(rows, self.taps[step].view(1, 1, -1), stride=2, padding=size // 2)
        return rows.reshape(*z.shape[:-1], rows.shape[-1])


def orthogonalise(weight: torch.Tensor) -> None:
    """Fill with a semi-orthogonal matrix, all axes but the first as one; drawn in fp32, since torch has no 16-bit QR."""
    wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(nn.init.orthogonal_(wide))


def _spread(rows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Return rows @ P for the sub-sampling matrix P of the kernel: (R, n) → (R, 2n), one strided add per tap."""
    num_taps, half = len(kernel), len(kernel) // 2
    width = 2 * rows.shape[1]
    wide = rows.new_zeros(rows.shape[0], width + num_taps)
    for tap in range(num_taps):
        wide[:, tap : tap + width : 2] += rows * kernel[tap]
    return wide[:, half : half + width]
