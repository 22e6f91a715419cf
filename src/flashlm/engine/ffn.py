"""The streamed feed-forward layer: y = act(x·Upᵀ [, gate])·Down over blocks of row-column bundles.

It takes the place of a transformers MLP and gives the same function on any placement of its rows. Two ways through a
block, each with a fixed order of summation, so that the placement changes no bit:

* up to `MAX_KERNEL_TOKENS` tokens (decode, small batches): our row kernels, which sum in fp32;
* more (prefill): matrix products, block by block, so that each block is read once for all tokens.

The weights themselves are not parameters of this module: only the biases are, and they stay in DRAM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from flashlm import kernels
from flashlm.engine.gemm import BlockGemm
from flashlm.engine.stream import BlockStream
from flashlm.errors import ConfigError
from flashlm.pack.layout import LayerLayout

MAX_KERNEL_TOKENS = 16

Activation = Callable[[torch.Tensor], torch.Tensor]
# fp32 tokens (num_tokens, hidden_size) to the rows that each may use, bool (num_tokens, num_rows).
Selection = Callable[[torch.Tensor], torch.Tensor]
# Layer, rows of a block, the layer's fp32 input (num_tokens, hidden_size), and act(trigger) of these rows, fp32
# (num_tokens, rows of the block). The trigger is the gate's output, or the up-projection's where there is no gate.
Observer = Callable[[int, range, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a layer needs to run, known once the weights are placed. Biases are fp32 `(num_rows,)`."""

    stream: BlockStream
    gemm: BlockGemm
    up_bias: torch.Tensor | None
    gate_bias: torch.Tensor | None


class FlashFFN(nn.Module):
    """A feed-forward layer whose rows come from a `BlockStream`. Inference only.

    Args:
        layer: Index of the layer in the stream.
        layout: Geometry of its rows.
        activation: Elementwise function of fp32 tensors.
        dtype: Element type of the biases.
        has_up_bias, has_gate_bias, has_down_bias: Which biases the checkpoint holds.

    Attributes:
        observer: Called for every block of a dense pass; None in normal use.
        selection: Rows that a dense pass may use, the others count as zero; None is all. For calibration and evaluation.
        activation_threshold: Neurons with |act(trigger)| not above this count as zero (CATS, FATReLU); 0 changes nothing.
    """

    def __init__(
        self,
        *,
        layer: int,
        layout: LayerLayout,
        activation: Activation,
        dtype: torch.dtype,
        has_up_bias: bool,
        has_gate_bias: bool,
        has_down_bias: bool,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.layout = layout
        self.activation = activation
        self.observer: Observer | None = None
        self.selection: Selection | None = None
        self.activation_threshold = 0.0
        self.up_bias: nn.Parameter | None
        self.gate_bias: nn.Parameter | None
        self.down_bias: nn.Parameter | None
        self._dtype = getattr(torch, layout.dtype)
        self._bound: _Bound | None = None
        for name, is_present, size in (
            ("up_bias", has_up_bias, layout.num_rows),
            ("gate_bias", has_gate_bias, layout.num_rows),
            ("down_bias", has_down_bias, layout.hidden_size),
        ):
            bias = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False) if is_present else None
            self.register_parameter(name, bias)

    def bind(self, stream: BlockStream, gemm: BlockGemm) -> None:
        """Connect the layer to its rows, after the biases have been loaded."""
        self._bound = _Bound(stream, gemm, _widened(self.up_bias), _widened(self.gate_bias))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output.

        Args:
            hidden_states: (..., hidden_size), any floating dtype.

        Returns:
            (..., hidden_size) in the dtype of `hidden_states`.

        Raises:
            ConfigError: The layer is not connected to a pack, or a gradient is asked for.
            StorageError: A block can't be read.
        """
        bound = self._bound
        if bound is None:
            raise ConfigError(
                "this streamed layer has no weights yet: load the pack with flashlm.load or from_pretrained"
            )
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ConfigError("streamed weights are for inference: run the model under torch.no_grad()")
        tokens = hidden_states.reshape(-1, self.layout.hidden_size)
        output = torch.zeros(tokens.shape, dtype=torch.float32)
        if len(tokens) <= MAX_KERNEL_TOKENS:
            self._run_rows(bound, tokens.to(torch.float32).contiguous(), output)
        else:
            self._run_gemm(bound, tokens, output)
        if self.down_bias is not None:
            output += self.down_bias
        return output.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _run_rows(self, bound: _Bound, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add every row's share for a few tokens: fp32 `(num_tokens, hidden_size)` in and out."""
        layout = self.layout
        allowed = None if self.selection is None else self.selection(tokens)
        with bound.stream.layer(self.layer) as blocks:
            for block, address in enumerate(blocks):
                span = layout.rows_of(block)
                rows = kernels.RowBlock(
                    address, len(span), layout.row_stride_bytes, layout.hidden_size, self._dtype, layout.num_parts
                )
                hidden = torch.empty(len(tokens), len(span))
                kernels.project(tokens, rows, layout.num_parts - 2, hidden, _part(bound.up_bias, span))
                gate = None
                if layout.has_gate:
                    gate = torch.empty(len(tokens), len(span))
                    kernels.project(tokens, rows, 0, gate, _part(bound.gate_bias, span))
                hidden = self._activate(hidden, gate, span, tokens, allowed)
                kernels.accumulate(hidden, rows, output)

    def _run_gemm(self, bound: _Bound, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add every row's share for many tokens."""
        layout = self.layout
        prepared = bound.gemm.prepare(tokens)
        is_watched = self.observer is not None or self.selection is not None
        plain = tokens.to(torch.float32).contiguous() if is_watched else tokens
        allowed = None if self.selection is None else self.selection(plain)
        with bound.stream.layer(self.layer) as blocks:
            for block, address in enumerate(blocks):
                span = layout.rows_of(block)
                gate_part, up_part, down_part = bound.gemm.parts(layout, address, len(span))
                hidden = bound.gemm.project(prepared, up_part, _part(bound.up_bias, span))
                gate = None
                if gate_part is not None:
                    gate = bound.gemm.project(prepared, gate_part, _part(bound.gate_bias, span))
                hidden = self._activate(hidden, gate, span, plain, allowed)
                bound.gemm.accumulate(hidden, down_part, output)

    def _activate(
        self,
        up: torch.Tensor,
        gate: torch.Tensor | None,
        span: range,
        tokens: torch.Tensor,
        allowed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the hidden activations of a block, fp32 (num_tokens, rows of the block); may overwrite `up`."""
        activated = self.activation(up if gate is None else gate)
        if self.observer is not None:
            self.observer(self.layer, span, tokens, activated)
        if self.activation_threshold > 0.0:
            activated = activated.masked_fill(activated.abs() <= self.activation_threshold, 0.0)
        if allowed is not None:
            activated = activated.masked_fill(~allowed[:, span.start : span.stop], 0.0)
        return activated if gate is None else up.mul_(activated)

    def extra_repr(self) -> str:
        """Show shapes in `print(model)`."""
        layout = self.layout
        return f"hidden_size={layout.hidden_size}, num_rows={layout.num_rows}, gated={layout.has_gate}, {layout.dtype}"


def _widened(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def _part(bias: torch.Tensor | None, span: range) -> torch.Tensor | None:
    return None if bias is None else bias[span.start : span.stop]
