"""The streamed feed-forward layer: y = act(x·Upᵀ [, gate])·Down over blocks of row-column bundles.

It takes the place of a transformers MLP and gives the same function on any placement of its rows. Two ways through a
block, each with a fixed order of summation, so that the placement changes no bit:

* our row kernels, which sum in fp32, for tokens that are decoded or verified and for short prompts: in tiles of what they
  take at once, so that a token gets the same bits alone and in a batch of any size;
* matrix products, block by block, for longer prompts.

In mode `sparse` tokens that are decoded or verified take a third way: only the rows that a predictor asks for, from the
neuron cache or from flash (`SparseRows`). Several tokens take the union of their rows, but each counts only those predicted
for itself, and sums run over ascending rows: again the same bits alone and in a batch, whatever the cache holds.

The pass says which tokens go which way (`forward_pass.split_tokens`): by its phase, never by how many tokens share it.

The weights themselves are not parameters of this module: only the biases are, and they stay in DRAM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flashlm.engine.adapters import AdapterPass, AdapterShare
from flashlm.engine.forward_pass import Where, check_wanted, split_tokens, tiles
from flashlm.engine.guards import StreamedModule, check_hidden_states
from flashlm.engine.seat import Linears, Seat
from flashlm.engine.sparse import RowFetch, SparseRows
from flashlm.engine.standin import StreamedWeight, Unhookable, refuse
from flashlm.engine.stream import BlockRun, BlockStream
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from flashlm.rows.layout import LayerLayout, round_up
from flashlm.rows.neurons import Operand, neurons_at, operand
from flashlm.rows.products import BlockGemm, Tokens

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
    unit: int
    gemm: BlockGemm
    int8: bool
    up_bias: torch.Tensor | None
    gate_bias: torch.Tensor | None
    sparse: SparseRows | None
    predict: Selection | None


@dataclass(frozen=True, slots=True)
class _Share:
    """The tokens that go one way, and their output so far: views where that is all of them, else copies."""

    where: torch.Tensor | slice
    tokens: torch.Tensor
    output: torch.Tensor
    adapters: AdapterShare | None = None

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor,
        output: torch.Tensor,
        where: torch.Tensor | slice,
        adapters: AdapterShare | None = None,
    ) -> _Share:
        return cls(where, tokens[where], output[where], adapters)

    def give_back(self, output: torch.Tensor) -> None:
        if self.adapters is not None:
            self.adapters.finish(self.output)
        if not isinstance(self.where, slice):
            output[self.where] = self.output


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tokens that row kernels take at once, and those of the fetched rows that any of them needs.

    Attributes:
        place: Where slot 0 is.
        tokens: fp32 (num_tokens, hidden_size).
        rows, slots: int64 and int32 (num_rows,), ascending rows.
        order: int64 (num_rows,): positions in `rows`, the `num_held` that are in memory first.
        allowed: bool (num_tokens, all rows of the layer): which each token counts; None where it is all of `rows`.
        hidden: fp32 (num_tokens, num_rows), in `order`: hidden activations, once they are computed.
    """

    place: kernels.SlotRef
    tokens: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    order: torch.Tensor
    num_held: int
    allowed: torch.Tensor | None
    hidden: torch.Tensor

    @classmethod
    def of(cls, fetch: RowFetch, tokens: torch.Tensor, predicted: torch.Tensor, *, is_alone: bool) -> _Tile:
        """Make a tile of fetched rows; `is_alone` says that all of them are for these tokens."""
        order, rows, slots, num_held = fetch.lookup.order.long(), fetch.rows, fetch.lookup.slots, fetch.lookup.num_held
        if not is_alone:
            is_needed = predicted[:, rows.long()].any(dim=0)
            num_held = int(is_needed[order[:num_held]].sum())
            order = (is_needed.cumsum(0) - 1)[order[is_needed[order]]]
            rows, slots = rows[is_needed], slots[is_needed]
        return cls(
            place=fetch.place,
            tokens=tokens,
            rows=rows.long(),
            slots=slots,
            order=order,
            num_held=num_held,
            allowed=None if len(tokens) == 1 else predicted,
            hidden=torch.empty(len(tokens), len(rows), dtype=torch.float32),
        )


class FlashFFN(StreamedModule):
    """A feed-forward layer whose rows come from a `BlockStream`. Inference only.

    Args:
        layer: Its number among the streamed feed-forward layers.
        layout: Geometry of its rows.
        activation: Elementwise function of fp32 tensors.
        dtype: Element type of the biases, and of the model.
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
        self._dtype = dtype
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
        unit: int,
        gemm: BlockGemm,
        *,
        int8: bool = False,
        sparse: SparseRows | None = None,
        predict: Selection | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        """Connect the layer to its rows, after the biases have been loaded.

        Args:
            stream: Gives whole blocks.
            unit: The layer's number there.
            gemm: Products for many tokens.
            int8: Round tokens to 8 bits for their products with encoded weights.
            sparse: Gives scattered rows; None outside mode `sparse`.
            predict: The rows that tokens need; goes with `sparse`.
            order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
        """
        up_bias, gate_bias = _widened(self.up_bias, order), _widened(self.gate_bias, order)
        self._bound = _Bound(stream, unit, gemm, int8, up_bias, gate_bias, sparse, predict)

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads and native kernels: nothing to trace
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
        check_wanted()
        check_hidden_states(self, hidden_states)
        adapters = None if self.seat is None else self.seat.begin(hidden_states)
        if adapters is not None and bound.sparse is not None:
            raise ConfigError(
                "mode sparse predicts rows without knowing of adapters: load the pack with mode='hybrid' to use one on its"
                " feed-forward layers"
            )
        tokens = hidden_states.reshape(-1, self.layout.hidden_size)
        output = torch.zeros(tokens.shape, dtype=torch.float32)
        has_predictor = bound.sparse is not None and bound.predict is not None
        split = split_tokens(hidden_states.shape, has_predictor=has_predictor)
        if split.predicted is not None:
            share = _Share.of(tokens, output, split.predicted)
            self._run_sparse(bound, share.tokens.to(torch.float32).contiguous(), share.output)
            share.give_back(output)
        if split.few is not None or split.many is not None:
            self._run_exact(bound, tokens, output, split.few, split.many, adapters)
        if self.down_bias is not None:
            output += self.down_bias
        return output.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _run_exact(
        self,
        bound: _Bound,
        tokens: torch.Tensor,
        output: torch.Tensor,
        few: Where,
        many: Where,
        adapters: AdapterPass | None,
    ) -> None:
        """Add every row's share, by row kernels for `few` and by products for `many`: blocks come once for both."""
        by_rows = None if few is None else _Share.of(tokens, output, few, self._adapt(adapters, tokens, few, True))
        by_products = (
            None if many is None else _Share.of(tokens, output, many, self._adapt(adapters, tokens, many, False))
        )
        if by_rows is not None:
            rows_tokens = by_rows.tokens.to(torch.float32).contiguous()
            operands = [self._operand(bound, _cut(rows_tokens, part)) for part in tiles(len(rows_tokens))]
            rows_allowed = None if self.selection is None else self.selection(rows_tokens)
        if by_products is not None:
            prepared = bound.gemm.prepare(by_products.tokens, self.layout)
            is_watched = self.observer is not None or self.selection is not None
            plain = by_products.tokens.to(torch.float32).contiguous() if is_watched else by_products.tokens
            allowed = None if self.selection is None else self.selection(plain)
        with bound.stream.unit(bound.unit) as runs:
            for run in runs:
                if by_rows is not None:
                    for part in [run] if self.observer is None else _single_blocks(run, self.layout):
                        self._add_by_rows(bound, part, rows_tokens, operands, rows_allowed, by_rows)
                if by_products is not None:
                    for block in _single_blocks(run, self.layout):  # the cut of a matrix product changes its bits
                        self._add_by_products(bound, block, prepared, plain, allowed, by_products)
        for share in (by_rows, by_products):
            if share is not None:
                share.give_back(output)

    def _operand(self, bound: _Bound, tokens: torch.Tensor) -> Operand:
        """Return fp32 tokens, few enough for row kernels, as products with gate and up take them."""
        return operand(tokens, self.layout.encodings[:-1], int8=bound.int8)

    def _adapt(
        self, adapters: AdapterPass | None, tokens: torch.Tensor, where: torch.Tensor | slice, by_rows: bool
    ) -> AdapterShare | None:
        if adapters is None:
            return None
        return adapters.share(tokens[where], self.layout.num_rows, by_rows=by_rows, where=where)

    def _add_by_rows(
        self,
        bound: _Bound,
        run: BlockRun,
        tokens: torch.Tensor,
        operands: list[Operand],
        allowed: torch.Tensor | None,
        share: _Share,
    ) -> None:
        """Add what a run of blocks gives to `share.output` by row kernels; `tokens` are its own, `operands` their tiles."""
        layout = self.layout
        span = range(layout.rows_of(run.blocks[0]).start, layout.rows_of(run.blocks[-1]).stop)
        neurons = neurons_at(layout, run.place, len(span), int8=bound.int8)
        parts = tiles(len(tokens))
        hidden = torch.empty(len(tokens), len(span), dtype=torch.float32)
        for x, part in zip(operands, parts, strict=True):
            neurons.project(x, layout.num_parts - 2, _cut(hidden, part), _part(bound.up_bias, span))
        gate = None
        if layout.has_gate:
            gate = torch.empty(len(tokens), len(span), dtype=torch.float32)
            for x, part in zip(operands, parts, strict=True):
                neurons.project(x, 0, _cut(gate, part), _part(bound.gate_bias, span))
        with kernels.one_torch_thread():  # torch's threads cut a tensor in other places for every size
            hidden = self._activate(hidden, gate, span, tokens, allowed, share.adapters)
            for part in parts:
                neurons.accumulate(_cut(hidden, part), _cut(share.output, part))

    def _add_by_products(
        self,
        bound: _Bound,
        block: BlockRun,
        prepared: Tokens,
        plain: torch.Tensor,
        allowed: torch.Tensor | None,
        share: _Share,
    ) -> None:
        """Add what a block gives to `share.output` by matrix products; `prepared` and `plain` are its own tokens."""
        span = self.layout.rows_of(block.blocks[0])
        with bound.gemm.held(self.layout):
            gate_part, up_part, down_part = bound.gemm.parts(self.layout, block.place, len(span))
            hidden = bound.gemm.project(prepared, up_part, _part(bound.up_bias, span))
            gate = None
            if gate_part is not None:
                gate = bound.gemm.project(prepared, gate_part, _part(bound.gate_bias, span))
            hidden = self._activate(hidden, gate, span, plain, allowed, share.adapters)
            bound.gemm.accumulate(hidden, down_part, share.output)

    def _run_sparse(self, bound: _Bound, tokens: torch.Tensor, output: torch.Tensor) -> None:
        """Add the share of the predicted rows: fp32 `(num_tokens, hidden_size)` in and out."""
        sparse, predict = bound.sparse, bound.predict
        assert sparse is not None
        assert predict is not None
        started_s = time.perf_counter()
        predicted = predict(tokens)
        rows = union(predicted)
        sparse.counters.predict_s += time.perf_counter() - started_s
        parts = tiles(len(tokens))
        for index, some in enumerate(sparse.chunks(self.layer, rows)):
            with sparse.fetch(self.layer, some, is_same_step=index > 0) as fetch, kernels.one_torch_thread():
                begun = [_Tile.of(fetch, tokens[part], predicted[part], is_alone=len(parts) == 1) for part in parts]
                # Held rows first; the others once they have landed.
                for tile in begun:
                    self._project_rows(bound, tile, slice(0, tile.num_held))
                sparse.wait(fetch)
                for tile, part in zip(begun, parts, strict=True):
                    self._project_rows(bound, tile, slice(tile.num_held, len(tile.order)))
                    ascending = torch.empty_like(tile.hidden)
                    ascending[:, tile.order] = tile.hidden
                    kernels.accumulate(ascending, self._row_block(fetch.place, tile.slots), output[part])

    def _project_rows(self, bound: _Bound, tile: _Tile, part: slice) -> None:
        """Write hidden activations of `tile`, of its rows `order[part]`; an inactive row stops at its trigger."""
        order = tile.order[part]
        if not len(order):
            return
        rows, slots, tokens = tile.rows[order], tile.slots[order], tile.tokens
        has_gate = self.layout.has_gate
        trigger = torch.empty(len(tokens), len(rows), dtype=torch.float32)
        trigger_bias = bound.gate_bias if has_gate else bound.up_bias
        bias = None if trigger_bias is None else trigger_bias[rows]
        x = self._operand(bound, tokens)
        kernels.project(x, self._row_block(tile.place, slots), 0, trigger, bias)
        activated = _evenly(self.activation, trigger)
        if self.activation_threshold > 0.0:
            activated = activated.masked_fill(activated.abs() <= self.activation_threshold, 0.0)
        if tile.allowed is not None:
            activated = activated.masked_fill(~tile.allowed[:, rows], 0.0)
        if not has_gate:
            tile.hidden[:, part] = activated
            return
        firing = activated.any(dim=0).nonzero().squeeze(1)
        up = torch.empty(len(tokens), len(firing), dtype=torch.float32)
        up_bias = None if bound.up_bias is None else bound.up_bias[rows[firing]]
        kernels.project(x, self._row_block(tile.place, slots[firing]), 1, up, up_bias)
        target = tile.hidden[:, part]
        target.zero_()
        target[:, firing] = up * activated[:, firing]

    def _row_block(self, place: kernels.SlotRef, slots: torch.Tensor) -> kernels.RowBlock:
        return kernels.rows_at(self.layout, place, len(slots), slots)

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
        # In mode `sparse` whole blocks serve prompts, which are exact; elsewhere a threshold is a calibration's trial.
        if self.activation_threshold > 0.0 and self.bound.sparse is None:
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
        return (
            f"hidden_size={layout.hidden_size}, num_rows={layout.num_rows}, gated={layout.has_gate}, {layout.encoding}"
        )


class _LinearFFN(FlashFFN, Unhookable, nn.Linear):
    """A `FlashFFN` that adapters find as the up-projection which it replaces."""

    weight: StreamedWeight
    bias: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            refuse(f"{self.flash_name}.{name}", "can't be replaced")
        super().__setattr__(name, value)


def _single_blocks(run: BlockRun, layout: LayerLayout) -> Iterator[BlockRun]:
    """Yield the blocks of a run one by one."""
    for index, block in enumerate(run.blocks):
        yield BlockRun(range(block, block + 1), run.place.at(index * layout.block_stride_bytes))


def _cut(tensor: torch.Tensor, part: slice) -> torch.Tensor:
    """Return `tensor[part]`; all of it as it is, for small blocks are many and a view costs as much as a call of ours."""
    return tensor if part.start == 0 and part.stop == tensor.shape[0] else tensor[part]


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
