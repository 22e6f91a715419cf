"""The grouped linear transform F_G: R^M → R^M (paper figure 2): contiguous groups, each with its own matrix."""

from __future__ import annotations

import torch
from torch import nn

from flashlm.errors import ConfigError
from flashlm.pru.pyramid import orthogonalise
from flashlm.pru.shapes import Init, check_choice, check_positive, group_size


class GroupedLinear(nn.Module):
    """y = concat_j(x_j W_j + b_j) over contiguous groups of features; groups are not shuffled and never mix.

    Args:
        input_size: Divisible by `groups`.
        output_size: Divisible by `groups`.
        groups: g; 1 is a full matrix.
        num_gates: Transforms of the same shape computed together.
        bias: Whether there is b_j.
        init: `code` orthogonalises the groups' matrices as the rows of one (g, d * num_gates * d), as the authors' code
            does by passing a 3-D tensor: each matrix gets norm 1, std 1 / (2d) for four gates. `per_group`
            orthogonalises each, which starts the recurrence some 20 times larger.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: A size is not divisible by `groups`, or `init` is unknown.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        groups: int = 4,
        *,
        num_gates: int = 1,
        bias: bool = True,
        init: Init = "code",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("init", init, Init)
        check_positive(num_gates=num_gates)
        self.input_size, self.output_size, self.groups, self.num_gates = input_size, output_size, groups, num_gates
        self.init = init
        inputs = group_size(input_size, groups, "input_size")
        outputs = num_gates * group_size(output_size, groups, "output_size")
        self.weight = nn.Parameter(torch.empty(groups, inputs, outputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(groups, outputs, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `init` says; zero biases."""
        if not self.weight.is_meta:
            if self.init == "code":
                orthogonalise(self.weight.detach())  # flattened to (groups, rest)
            else:
                for matrix in self.weight.detach():
                    orthogonalise(matrix)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform the last axis: (..., input_size) → (..., num_gates * output_size), gate after gate.

        Raises:
            ConfigError: The last axis has another size.
        """
        if x.shape[-1] != self.input_size:
            raise ConfigError(f"input must have {self.input_size} features, got {tuple(x.shape)}")
        rows = x.reshape(x.shape[:-1].numel(), self.groups, self.input_size // self.groups).transpose(0, 1)
        y = torch.bmm(rows, self.weight)  # (groups, rows, num_gates * d)
        if self.bias is not None:
            y = y + self.bias.unsqueeze(1)
        by_gate = y.view(self.groups, y.shape[1], self.num_gates, self.output_size // self.groups).permute(1, 2, 0, 3)
        return by_gate.reshape(*x.shape[:-1], self.num_gates * self.output_size)

    def folded_weight(self) -> torch.Tensor:
        """Return the block-diagonal matrix (num_gates * output_size, input_size) that does the same; differentiable."""
        by_gate = self.weight.view(self.groups, self.weight.shape[1], self.num_gates, -1)  # (g, d_in, gates, d_out)
        dense = by_gate.new_zeros(self.num_gates, self.groups, by_gate.shape[3], self.groups, by_gate.shape[1])
        for group in range(self.groups):
            dense[:, group, :, group, :] = by_gate[group].permute(1, 2, 0)
        return dense.reshape(self.num_gates * self.output_size, self.input_size)

    def folded_bias(self) -> torch.Tensor | None:
        """Return the bias (num_gates * output_size,), gate after gate, or None without one; differentiable."""
        if self.bias is None:
            return None
        return self.bias.view(self.groups, self.num_gates, -1).transpose(0, 1).flatten()

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.input_size}, {self.output_size}, groups={self.groups}, num_gates={self.num_gates}"
