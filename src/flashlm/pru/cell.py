"""One layer in one direction: the pyramidal transform of the input, the grouped one of the context, LSTM gates."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.errors import ConfigError
from flashlm.pru.grouped import GroupedLinear
from flashlm.pru.pyramid import PyramidalTransform
from flashlm.pru.shapes import NUM_GATES, Init, Split, Subsampling, group_size

State = tuple[torch.Tensor, torch.Tensor]


class PRUCell(nn.Module):
    """One step: (i, f, g, o) = F_P(x) + F_G(h); c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(c') (paper figure 2).

    Gates lie in the order i, f, g, o of `torch.nn.LSTM`; the authors' code has f, g, i, o.

    Args:
        input_size: N, divisible by 2^(levels - 1).
        hidden_size: M, divisible by `groups`.
        bias: Whether both transforms have one, as in `torch.nn.LSTMCell`.
        device: Of the parameters.
        dtype: Of the parameters.
        groups: g of the grouped transform.
        levels: K of the pyramid.
        split: See `PyramidalTransform`.
        subsampling: See `PyramidalTransform`.
        residual: See `PyramidalTransform`.
        init: See `GroupedLinear`.

    Raises:
        ConfigError: A size or an option does not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 4,
        levels: int = 2,
        split: Split = "code",
        subsampling: Subsampling = "average",
        residual: bool = True,
        init: Init = "code",
    ) -> None:
        super().__init__()
        group_size(hidden_size, groups)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.input_transform = PyramidalTransform(
            input_size,
            hidden_size,
            levels,
            num_gates=NUM_GATES,
            bias=bias,
            split=split,
            subsampling=subsampling,
            residual=residual,
            device=device,
            dtype=dtype,
        )
        self.context_transform = GroupedLinear(
            hidden_size, hidden_size, groups, num_gates=NUM_GATES, bias=bias, init=init, device=device, dtype=dtype
        )

    def forward(self, x: torch.Tensor, hx: State | None = None) -> State:
        """Take one step.

        Args:
            x: (B, input_size) or (input_size,).
            hx: h and c, each (B, hidden_size) or (hidden_size,); None: zeros.

        Returns:
            The new h and c, shaped like `hx`.

        Raises:
            ConfigError: A shape does not fit.
        """
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            raise ConfigError(f"input must be (B, {self.input_size}) or ({self.input_size},), got {tuple(x.shape)}")
        if hx is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            hx = zeros, zeros
        h, c = two_parts(hx)
        expected = (*x.shape[:-1], self.hidden_size)
        if h.shape != expected or c.shape != expected:
            raise ConfigError(f"hx must be two tensors of shape {expected}, got {tuple(h.shape)} and {tuple(c.shape)}")
        return step(self.input_transform(x) + self.context_transform(h), c)

    def reset_parameters(self) -> None:
        """Initialise both transforms anew."""
        self.input_transform.reset_parameters()
        self.context_transform.reset_parameters()

    def input_gates(self, x: torch.Tensor) -> torch.Tensor:
        """Return all that does not depend on the context: (..., input_size) → (..., 4 * hidden_size), both biases in."""
        gates: torch.Tensor = self.input_transform(x)
        bias = self.context_transform.folded_bias()
        return gates if bias is None else gates + bias.to(gates.dtype)

    def context_weight(self, weight_dropout: float = 0.0) -> torch.Tensor:
        """Return the grouped matrices (groups, d, 4d), with weights dropped afresh while training."""
        return F.dropout(self.context_transform.weight, weight_dropout, self.training)

    def folded_weights(self, weight_dropout: float = 0.0) -> list[torch.Tensor]:
        """Return weight_ih, weight_hh and, with bias, bias_ih and bias_hh of the equal `torch.nn.LSTMCell`; differentiable.

        Raises:
            ConfigError: Sub-sampling is `max`.
        """
        weights = [self.input_transform.folded_weight()]
        context = self.context_transform.folded_weight()
        weights.append(F.dropout(context, weight_dropout, self.training))
        biases = [self.input_transform.folded_bias(), self.context_transform.folded_bias()]
        return weights + [bias for bias in biases if bias is not None]

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{self.input_size}, {self.hidden_size}"


def step(gates: torch.Tensor, c: torch.Tensor) -> State:
    """Return h' and c' from gates (..., 4M) in order i, f, g, o and c (..., M); c' keeps c's dtype."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c_next = (f.sigmoid() * c + i.sigmoid() * g.tanh()).to(c.dtype)
    return (o.sigmoid() * c_next.tanh()).to(c.dtype), c_next


def two_parts(hx: object) -> State:
    """Return h and c of a state as it was given.

    Raises:
        ConfigError: It is not a pair of tensors; one tensor would be taken apart by its rows.
    """
    is_pair = isinstance(hx, tuple | list) and len(hx) == 2 and all(isinstance(part, torch.Tensor) for part in hx)
    if not is_pair:
        got = f"one tensor {tuple(hx.shape)}" if isinstance(hx, torch.Tensor) else type(hx).__name__
        raise ConfigError(f"hx must be two tensors, (h, c), got {got}: pass what the call before returned")
    h, c = cast(State, hx)
    return h, c
