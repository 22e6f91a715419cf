"""The streamed linear layer: y = x·Wᵀ + b over blocks of rows of W, each of which gives some of the outputs.

It is the model's own `nn.Linear`, without its weight: names, hooks and adapters find it where it was. A matrix of plain
elements that is pinned as a whole is an ordinary weight in memory, and its layer an ordinary one; any other placement gives
the same bits (`engine/linear.py`). One of another encoding is no weight that torch knows: its layer stays as it is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashlm.engine.guards import StreamedModule, check_hidden_states
from flashlm.engine.linear import EncodedMatrix, choose_way, multiply, prepare
from flashlm.engine.standin import StreamedWeight, refuse
from flashlm.engine.stream import BlockRun, BlockStream
from flashlm.errors import ConfigError, PackError
from flashlm.rows.kernels import choose_plain_strategy
from flashlm.rows.layout import LayerLayout
from flashlm.rows.products import multiplies_int8
from flashlm.transformers_seam import forget_tie, keep_from_initialising

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashlm.pack.manifest import UnitEntry


@dataclass(frozen=True, slots=True)
class _BoundMatrix:
    """What a streamed linear layer runs on."""

    stream: BlockStream
    unit: int
    layout: LayerLayout
    dtype: torch.dtype | None
    widens: bool
    int8: bool


class FlashLinear(StreamedModule, nn.Linear):
    """An `nn.Linear` whose weight comes from a `BlockStream`. Inference only; `bind_linear` makes one."""

    seat = None
    weight: Any
    flash_bound: _BoundMatrix

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads and native kernels: nothing to trace
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input·weightᵀ + bias; (..., in_features) to (..., out_features), in the dtype of `input`.

        Raises:
            ConfigError: A gradient is asked for, or the input is on another device or of a dtype that weights don't have.
            StorageError: A block can't be read.
        """
        bound = self.flash_bound
        check_hidden_states(self, input)
        if input.shape[-1] != self.in_features:
            raise ConfigError(f"(..., {self.in_features}) expected, got {tuple(input.shape)}")
        int8_matrix = bound.int8 and multiplies_int8(bound.layout.encodings[0])
        way = choose_way(input, bound.dtype, widens=bound.widens, int8=bound.int8, int8_matrix=int8_matrix)
        tokens = prepare(way, input.detach().reshape(-1, self.in_features))
        output = torch.empty(input.shape[:-1].numel(), self.out_features, dtype=input.dtype)
        with bound.stream.unit(bound.unit) as runs:
            for run in runs:
                span, rows = _rows(bound, run)
                bias = None if self.bias is None else self.bias[span]
                multiply(way, tokens, rows, bias, output[:, span])
        return output.view(*input.shape[:-1], self.out_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and value is not self._parameters.get(name):  # tying again changes nothing
            refuse(f"{self.weight.flash_name.removesuffix('.weight')}.{name}", "can't be replaced")
        super().__setattr__(name, value)


def _rows(bound: _BoundMatrix, run: BlockRun) -> tuple[slice, torch.Tensor | EncodedMatrix]:
    """Return which rows of the matrix a run of blocks is, and these."""
    layout = bound.layout
    span = slice(layout.rows_of(run.blocks[0]).start, layout.rows_of(run.blocks[-1]).stop)
    num_rows = span.stop - span.start
    if bound.dtype is None:
        return span, EncodedMatrix(layout, run.place, num_rows)
    content = torch.from_numpy(run.place.numpy(num_rows * layout.row_bytes))
    return span, content.view(bound.dtype).view(num_rows, layout.hidden_size)


def take_out_weight(model: PreTrainedModel, path: str) -> None:
    """Remove the weight of a streamed linear layer or table of embeddings before the others are loaded.

    Raises:
        PackError: The pack does not belong to the model.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise PackError(
            f"the pack streams {path}, which {type(model).__name__} does not have ({error}):"
            " convert the model again with this version of transformers"
        ) from error
    module.register_parameter("weight", None)
    forget_tie(model, f"{path}.weight")  # what shares it is taken out, too
    keep_from_initialising(module)  # transformers would fill what it takes for a missing weight with random numbers


def bind_linear(
    model: nn.Module, entry: UnitEntry, stream: BlockStream, unit: int, dtype: torch.dtype, *, int8: bool = False
) -> StreamedWeight | nn.Parameter:
    """Connect a linear layer to its matrix: an ordinary weight where it is plain and pinned as a whole, else the stream.

    Args:
        model: The model, its other weights loaded.
        entry: What the manifest says of the layer.
        stream: Gives its blocks.
        unit: The layer's number there.
        dtype: Element type of the model's weights.
        int8: Round tokens to 8 bits for their products with an encoded matrix.

    Returns:
        The layer's weight, or what stands for it.
    """
    module: Any = model.get_submodule(entry.module)
    layout = entry.layout
    # Elements of another dtype than the model's take no product of torch's, as those that torch does not know.
    plain = dtype if layout.plain is not None and layout.plain.dtype == dtype else None
    if not isinstance(module, nn.Linear):
        raise ConfigError(f"{entry.module} is {type(module).__name__}: a linear layer expected")
    shape = (layout.num_rows, layout.hidden_size)
    pinned = stream.pinned_bytes(unit)
    if pinned is not None and plain is not None and layout.joins:  # rows of padded blocks are no matrix
        weight = pinned[: layout.num_rows * layout.row_bytes].view(plain).view(shape)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module.weight
    stand_in = StreamedWeight(f"{entry.module}.weight", shape, dtype)
    module.register_parameter("weight", stand_in)  # type: ignore[arg-type]  # it counts as one
    module.__class__ = FlashLinear
    vars(module)["_dtype"] = dtype
    widens = plain is None or choose_plain_strategy(dtype) == "widen"
    int8 = int8 and not layout.placed[0].encoding.is_plain
    vars(module)["flash_bound"] = _BoundMatrix(stream, unit, layout, plain, widens=widens, int8=int8)
    return stand_in
