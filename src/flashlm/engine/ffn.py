"""The streamed feed-forward layer: y = act(x·Upᵀ [, gate])·Down over blocks of row-column bundles.

It takes the place of a transformers MLP and gives the same function on any placement of its rows. Two ways through a
block, each with a fixed order of summation, so that the placement changes no bit:

* up to `MAX_KERNEL_TOKENS` tokens (decode, small batches): our row kernels, which sum in fp32;
* more (prefill): matrix products, block by block, so that each block is read once for all tokens.

In mode `sparse` few tokens take a third way: only the rows that a predictor asks for, from the neuron cache or from
flash (`SparseRows`). Several tokens take the union of their rows, but each counts only those predicted for itself, and
sums run over ascending rows: a token gets the same bits alone and in a batch, whatever the cache holds.

The weights themselves are not parameters of this module: only the biases are, and they stay in DRAM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flashlm import kernels
from flashlm.engine.adapters import AdapterPass, AdapterShare
from flashlm.engine.gemm import BlockGemm
from flashlm.engine.guards import StreamedModule, check_hidden_states
from flashlm.engine.seat import Linears, Seat
from flashlm.engine.sparse import SparseRows
from flashlm.engine.standin import StreamedWeight, Unhookable, refuse
from flashlm.engine.stream import BlockRun, BlockStream
from flashlm.errors import ConfigError
from flashlm.pack.layout import LayerLayout, round_up

MAX_KERNEL_TOKENS = 16
ACTIVATION_STEP = 64  # a multiple of what torch takes at a time with any instruction set

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
    sparse: SparseRows | None
    predict: Selection | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows in slots: int64 `(num_rows,)` numbers, int32 `(num_rows,)` slots from `address` on."""

    address: int
    rows: torch.Tensor
    slots: torch.Tensor


class FlashFFN(StreamedModule):
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
        linears: The linear layers that it stands for; None where they are unknown.
        seat: Where adapters attach, once bound; None where the layer has no known linear layers.
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
        self.linears: Linears | None = None
        self.seat: Seat | None = None
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

    def bind(
        self,
        stream: BlockStream,
        gemm: BlockGemm,
        *,
        sparse: SparseRows | None = None,
        predict: Selection | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """Connect the layer to its rows, after the biases have been loaded.

        Args:
            stream: Gives whole blocks.
            gemm: Products for many tokens.
            sparse: Gives scattered rows; None outside mode `sparse`.
            predict: The rows that tokens need; goes with `sparse`.
            order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
        """
        up_bias, gate_bias = _widened(self.up_bias, order), _widened(self.gate_bias, order)
        self._bound = _Bound(stream, gemm, up_bias, gate_bias, sparse, predict)

    def use_rows(self, sparse: SparseRows | None, predict: Selection | None) -> None:
        """Change where a bound layer gets scattered rows from, and which it asks for; both None: whole blocks again.

        Raises:
            ConfigError: The layer is not bound.
        """
        self._bound = replace(self.bound, sparse=sparse, predict=predict)

    @property
    def bound(self) -> _Bound:
        """What the layer runs on.

        Raises:
            ConfigError: The layer is not connected to a pack.
        """
        if self._bound is None:
            raise ConfigError(
                "this streamed layer has no weights yet: load the pack with flashlm.load or from_pretrained"
            )
        return self._bound

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output.

        Args:
            hidden_states: (..., hidden_size), any floating dtype.

        Returns:
            (..., hidden_size) in the dtype of `hidden_states`.

        Raises:
            ConfigError: The layer is not connected to a pack, a gradient is asked for, the input is on another device or of
                a dtype that rows don't have, or an adapter on the layer is of another kind than plain LoRA.
            StorageError: A block can't be read.
        """
        bound = self.bound
        check_hidden_states(self, hidden_states)
        adapters = None if self.seat is None else self.seat.begin(hidden_states)
        if adapters is not None and bound.sparse is not None:
            raise ConfigError(
                "mode sparse predicts rows without knowing of adapters: load the pack with mode='hybrid' to use one on its"
                " feed-forward layers"
            )
        tokens = hidden_states.reshape(-1, self.layout.hidden_size)
        output = torch.zeros(tokens.shape, dtype=torch.float32)
        if len(tokens) > MAX_KERNEL_TOKENS:
            self._run_gemm(bound, tokens, output, adapters)
        elif bound.sparse is not None and bound.predict is not None:
            self._run_sparse(bound, bound.sparse, bound.predict, tokens.to(torch.float32).contiguous(), output)
        else:
            self._run_rows(bound, tokens.to(torch.float32).contiguous(), output, adapters)
        if self.down_bias is not None:
            output += self.down_bias
        return output.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _run_rows(
        self, bound: _Bound, tokens: torch.Tensor, output: torch.Tensor, adapters: AdapterPass | None = None
    ) -> None:
        """Add every row's share for a few tokens: fp32 `(num_tokens, hidden_size)` in and out."""
        layout = self.layout
        allowed = None if self.selection is None else self.selection(tokens)
        share = None if adapters is None else adapters.share(tokens, layout.num_rows, by_rows=True)
        with bound.stream.layer(self.layer) as runs:
            for run in runs if self.observer is None else _single_blocks(runs, layout):
                span = range(layout.rows_of(run.blocks[0]).start, layout.rows_of(run.blocks[-1]).stop)
                rows = kernels.RowBlock(
                    run.address, len(span), layout.row_stride_bytes, layout.hidden_size, self._dtype, layout.num_parts
                )
                hidden = torch.empty(len(tokens), len(span), dtype=torch.float32)
                kernels.project(tokens, rows, layout.num_parts - 2, hidden, _part(bound.up_bias, span))
                gate = None
                if layout.has_gate:
                    gate = torch.empty(len(tokens), len(span), dtype=torch.float32)
                    kernels.project(tokens, rows, 0, gate, _part(bound.gate_bias, span))
                hidden = self._activate(hidden, gate, span, tokens, allowed, share)
                kernels.accumulate(hidden, rows, output)
        if share is not None:
            share.finish(output)

    def _run_sparse(
        self,
        bound: _Bound,
        sparse: SparseRows,
        predict: Selection,
        tokens: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Add the share of the predicted rows for a few tokens: fp32 `(num_tokens, hidden_size)` in and out."""
        started_s = time.perf_counter()
        predicted = predict(tokens)
        rows = union(predicted)
        sparse.counters.predict_s += time.perf_counter() - started_s
        for index, some in enumerate(sparse.chunks(self.layer, rows)):
            with sparse.fetch(self.layer, some, is_same_step=index > 0) as fetch:
                # Held rows first; the others once they have landed.
                order = fetch.lookup.order.long()
                grouped = _Rows(fetch.address, some[order].long(), fetch.lookup.slots[order])
                allowed = None if len(tokens) == 1 else predicted[:, grouped.rows]
                hidden = torch.empty(len(tokens), len(some), dtype=torch.float32)
                self._project_rows(bound, grouped, allowed, tokens, slice(0, fetch.lookup.num_held), hidden)
                sparse.wait(fetch)
                self._project_rows(bound, grouped, allowed, tokens, slice(fetch.lookup.num_held, len(some)), hidden)
                ascending = torch.empty_like(hidden)
                ascending[:, order] = hidden
                kernels.accumulate(ascending, self._row_block(fetch.address, fetch.lookup.slots), output)

    def _project_rows(
        self,
        bound: _Bound,
        grouped: _Rows,
        allowed: torch.Tensor | None,
        tokens: torch.Tensor,
        part: slice,
        hidden: torch.Tensor,
    ) -> None:
        """Write the hidden activations of `grouped[part]` to `hidden[:, part]`; an inactive row stops at its trigger."""
        rows, slots = grouped.rows[part], grouped.slots[part]
        if not len(rows):
            return
        has_gate = self.layout.has_gate
        trigger = torch.empty(len(tokens), len(rows), dtype=torch.float32)
        trigger_bias = bound.gate_bias if has_gate else bound.up_bias
        bias = None if trigger_bias is None else trigger_bias[rows]
        kernels.project(tokens, self._row_block(grouped.address, slots), 0, trigger, bias)
        activated = _evenly(self.activation, trigger)
        if self.activation_threshold > 0.0:
            activated = activated.masked_fill(activated.abs() <= self.activation_threshold, 0.0)
        if allowed is not None:
            activated = activated.masked_fill(~allowed[:, part], 0.0)
        if not has_gate:
            hidden[:, part] = activated
            return
        firing = activated.any(dim=0).nonzero().squeeze(1)
        up = torch.empty(len(tokens), len(firing), dtype=torch.float32)
        up_bias = None if bound.up_bias is None else bound.up_bias[rows[firing]]
        kernels.project(tokens, self._row_block(grouped.address, slots[firing]), 1, up, up_bias)
        target = hidden[:, part]
        target.zero_()
        target[:, firing] = up * activated[:, firing]

    def _row_block(self, address: int, slots: torch.Tensor) -> kernels.RowBlock:
        layout = self.layout
        return kernels.RowBlock(
            address, len(slots), layout.row_stride_bytes, layout.hidden_size, self._dtype, layout.num_parts, slots
        )

    def _run_gemm(
        self, bound: _Bound, tokens: torch.Tensor, output: torch.Tensor, adapters: AdapterPass | None = None
    ) -> None:
        """Add every row's share for many tokens."""
        layout = self.layout
        prepared = bound.gemm.prepare(tokens)
        is_watched = self.observer is not None or self.selection is not None
        plain = tokens.to(torch.float32).contiguous() if is_watched else tokens
        allowed = None if self.selection is None else self.selection(plain)
        share = None if adapters is None else adapters.share(tokens, layout.num_rows, by_rows=False)
        with bound.stream.layer(self.layer) as runs:
            for run in _single_blocks(runs, layout):  # the cut of a matrix product changes its bits
                span = layout.rows_of(run.blocks[0])
                gate_part, up_part, down_part = bound.gemm.parts(layout, run.address, len(span))
                hidden = bound.gemm.project(prepared, up_part, _part(bound.up_bias, span))
                gate = None
                if gate_part is not None:
                    gate = bound.gemm.project(prepared, gate_part, _part(bound.gate_bias, span))
                hidden = self._activate(hidden, gate, span, plain, allowed, share)
                bound.gemm.accumulate(hidden, down_part, output)
        if share is not None:
            share.finish(output)

    def _activate(
        self,
        up: torch.Tensor,
        gate: torch.Tensor | None,
        span: range,
        tokens: torch.Tensor,
        allowed: torch.Tensor | None,
        share: AdapterShare | None = None,
    ) -> torch.Tensor:
        """Return the hidden activations of a block, fp32 (num_tokens, rows of the block); may overwrite `up` and `gate`."""
        if share is not None:
            share.shift(up, gate, span)
        activated = _evenly(self.activation, up if gate is None else gate)
        if self.observer is not None:
            self.observer(self.layer, span, tokens, activated)
        if self.activation_threshold > 0.0:
            activated = activated.masked_fill(activated.abs() <= self.activation_threshold, 0.0)
        if allowed is not None:
            activated = activated.masked_fill(~allowed[:, span.start : span.stop], 0.0)
        hidden = activated if gate is None else up.mul_(activated)
        if share is not None:
            share.collect(hidden, span)
        return hidden

    def __setattr__(self, name: str, value: Any) -> None:
        seat = self.__dict__.get("seat")
        if seat is not None and isinstance(value, nn.Module) and name != "activation":
            seat.check_child(name, value)
        super().__setattr__(name, value)

    def become_linear(self, weight: StreamedWeight) -> None:
        """Pass for the up-projection, in whose place the layer lies where a decoder layer holds the parts itself."""
        self.__class__ = _LinearFFN
        self.flash_name = weight.flash_name.removesuffix(".weight")
        self.in_features, self.out_features = self.layout.hidden_size, self.layout.num_rows
        self.register_parameter("weight", weight)  # type: ignore[arg-type]  # it counts as one

    def extra_repr(self) -> str:
        """Show shapes in `print(model)`."""
        layout = self.layout
        return f"hidden_size={layout.hidden_size}, num_rows={layout.num_rows}, gated={layout.has_gate}, {layout.dtype}"


class _LinearFFN(FlashFFN, Unhookable, nn.Linear):
    """A `FlashFFN` that adapters find as the up-projection which it replaces."""

    weight: StreamedWeight
    bias: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            refuse(f"{self.flash_name}.{name}", "can't be replaced")
        super().__setattr__(name, value)


def _single_blocks(runs: Iterator[BlockRun], layout: LayerLayout) -> Iterator[BlockRun]:
    """Yield the blocks of runs one by one."""
    for run in runs:
        for index, block in enumerate(run.blocks):
            yield BlockRun(range(block, block + 1), run.address + index * layout.block_stride_bytes)


def union(predicted: torch.Tensor) -> torch.Tensor:
    """Return the rows that any token needs, int32 ascending, of bool (num_tokens, num_rows)."""
    wanted = predicted[0] if len(predicted) == 1 else predicted.any(dim=0)
    return wanted.nonzero().squeeze(1).to(torch.int32)


def _evenly(activation: Activation, values: torch.Tensor) -> torch.Tensor:
    """Return `activation` of `values`, with the same bits for a value wherever it stands.

    torch works through whole vectors in one way and through what is left in another, which differs in the last bit.
    """
    count = values.numel()
    if count % ACTIVATION_STEP == 0:
        return activation(values)
    padded = torch.zeros(round_up(count, ACTIVATION_STEP), dtype=torch.float32)
    padded[:count] = values.reshape(-1)
    return activation(padded)[:count].view(values.shape)


def _widened(bias: torch.Tensor | None, order: torch.Tensor | None) -> torch.Tensor | None:
    if bias is None:
        return None
    widened = bias.detach().to(torch.float32).contiguous()
    return widened if order is None else widened[order]


def _part(bias: torch.Tensor | None, span: range) -> torch.Tensor | None:
    return None if bias is None else bias[span.start : span.stop]
