"""Linear layers (attention, output): how their products are made, whether the matrix is in memory or streamed.

A matrix goes the same two ways as streamed rows. Tokens that are decoded or verified take our row kernels: passes of so few
tokens keep torch to one thread, which reads 12 GB/s where ours read 21 to 24 (AVX-512, bf16, 4096 x 4096). Prompts, and
batches of more tokens than row kernels take at once, take torch's product, whose sums of a batch are ordered otherwise.

Where torch's product is slow (16 bits on processors without bf16 products: 128 tokens at 21 GFLOP/s against 80 in fp32; four
tokens reach 5 GB/s) or not to be had (encodings that torch does not know), weights are widened for prompts to fp32 piece by
piece and multiplied there, or, where that is asked for, meet tokens in 8 bits as they lie; short prompts and batches of any
size take row kernels, in tiles. Sums of ours are fp32, rounded once.

The rows of a matrix are multiplied apart without changing a bit of the result, as long as they are cut at multiples of
`ROWS_PER_STEP`: `tests/engine/test_linear.py` holds torch's products and ours to that. So a matrix that is streamed in
blocks of rows gives what it gives in one piece.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from flashlm.engine.forward_pass import running_pass, tiles
from flashlm.engine.guards import COMPUTE_DTYPES
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from flashlm.rows.layout import ROWS_PER_STEP, LayerLayout
from flashlm.rows.neurons import Operand
from flashlm.rows.products import fp32_linear

# torch's own product; our row kernels, in the weights' dtype, in fp32 or with tokens in 8 bits; widened pieces; our product
# of many tokens in 8 bits.
Way = Literal["torch", "rows", "fp32 rows", "int8 rows", "widened", "int8 matrix"]


class EncodedMatrix:
    """Rows of a matrix in memory whose elements torch does not know, in the place of a weight.

    Args:
        layout: Geometry of the rows.
        place: Where the first one is.
        num_rows: How many.
    """

    def __init__(self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int) -> None:
        self._layout = layout
        self._place = place
        self.shape = (num_rows, layout.hidden_size)

    def rows(self, start: int, stop: int) -> kernels.RowBlock:
        """Return some of its rows, for row kernels."""
        return kernels.rows_at(self._layout, self._place.at(start * self._layout.row_stride_bytes), stop - start)


def choose_way(
    input: torch.Tensor, dtype: torch.dtype | None, *, widens: bool, int8: bool = False, int8_matrix: bool = False
) -> Way:
    """Return how a matrix multiplies `input` (..., in_features).

    Args:
        input: The tokens.
        dtype: Of the matrix; None where torch does not know its elements.
        widens: Whether torch is slow at prompts, or can't.
        int8: Whether tokens are to be rounded to 8 bits; of encoded matrices.
        int8_matrix: Whether many are, too.
    """
    is_small = input.numel() <= kernels.MAX_TOKENS * input.shape[-1]
    by_rows = _is_by_rows(input.shape)
    if not widens and not (by_rows and is_small):
        return "torch"
    if not is_small and not by_rows:
        return "int8 matrix" if int8_matrix else "widened"
    if int8:
        return "int8 rows"
    return "rows" if input.dtype == dtype else "fp32 rows"


def prepare(way: Way, tokens: torch.Tensor) -> torch.Tensor | list[Operand]:
    """Return `tokens` (num_tokens, in_features) as `multiply` wants them."""
    if way in ("torch", "rows"):
        return tokens
    wide = tokens.detach().to(torch.float32).contiguous()
    if way == "widened":
        return wide
    if way == "int8 matrix":
        return [kernels.quantize_tokens(wide)]
    some = [wide[tile] for tile in tiles(len(wide))]
    return [kernels.quantize_tokens(each) for each in some] if way == "int8 rows" else list(some)


def multiply(
    way: Way,
    tokens: torch.Tensor | list[Operand],
    weight: torch.Tensor | EncodedMatrix,
    bias: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Write tokens·weightᵀ + bias into `output`.

    Args:
        way: As `choose_way` said.
        tokens: (num_tokens, in_features), prepared.
        weight: Some rows of a matrix, (rows, in_features), contiguous. Encoded ones take no way of the weights' dtype.
        bias: Of these rows, or None.
        output: (num_tokens, rows) in the dtype of the input, rows side by side.
    """
    if isinstance(tokens, list):
        num_rows = weight.shape[0]
        rows = _some_rows(weight, 0, num_rows)
        spans = [slice(len(output))] if way == "int8 matrix" else tiles(len(output))
        is_direct = output.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
        product = output if is_direct else torch.empty(len(output), num_rows, dtype=torch.float32)
        for x, tile in zip(tokens, spans, strict=True):
            kernels.project(x, rows, 0, product[tile], bias if is_direct else None)
        if not is_direct:
            output.copy_(product if bias is None else product.add_(bias))
    elif way in ("torch", "rows") and not isinstance(weight, EncodedMatrix):
        if way == "torch":
            output.copy_(fp32_linear(tokens, weight, bias))
            return
        for tile in tiles(len(tokens)):
            output[tile] = kernels.linear(tokens[tile], weight, bias)
    else:
        _multiply_widened(tokens, weight, bias, output)


def _some_rows(weight: torch.Tensor | EncodedMatrix, start: int, stop: int) -> kernels.RowBlock:
    return weight.rows(start, stop) if isinstance(weight, EncodedMatrix) else kernels.matrix_rows(weight[start:stop])


def _multiply_widened(
    tokens: torch.Tensor, weight: torch.Tensor | EncodedMatrix, bias: torch.Tensor | None, output: torch.Tensor
) -> None:
    """Multiply piece by piece in fp32, and round each: all in fp32 are twice as large."""
    num_rows, in_features = weight.shape
    step = kernels.WIDEN_PIECE_BYTES // (4 * max(in_features, len(tokens))) // ROWS_PER_STEP * ROWS_PER_STEP
    step = max(step, ROWS_PER_STEP)
    scratch = torch.empty(min(step, num_rows), in_features, dtype=torch.float32)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        kernels.widen(_some_rows(weight, start, stop), 0, scratch[: stop - start])
        piece = fp32_linear(tokens, scratch[: stop - start])
        if bias is not None:
            piece += bias[start:stop]
        output[:, start:stop] = piece


class RowLinear(nn.Linear):
    """An `nn.Linear` in memory that goes the ways of this module. Inference only."""

    flash_widens: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input·weightᵀ + bias; (..., in_features) to (..., out_features), in the dtype of `input`.

        Raises:
            ConfigError: The input or the weight is on another device than the CPU.
        """
        if not (input.is_cpu and self.weight.is_cpu):
            raise ConfigError(
                f"a pack computes on the CPU, but an input is on {input.device}, a weight on {self.weight.device}"
            )
        way = choose_way(input, self.weight.dtype, widens=self.flash_widens)
        if (
            way == "torch"
        ):  # as one matrix: for sequences that do not lie side by side torch copies the weights for each
            output = fp32_linear(input.reshape(-1, self.in_features), self.weight, self.bias)
            return output.view(*input.shape[:-1], self.out_features)
        if way == "rows" and input.numel() <= kernels.MAX_TOKENS * self.in_features:
            return kernels.linear(input, self.weight, self.bias)
        tokens = prepare(way, input.detach().reshape(-1, self.in_features))
        output = torch.empty(input.shape[:-1].numel(), self.out_features, dtype=input.dtype)
        multiply(way, tokens, self.weight, self.bias, output)
        return output.view(*input.shape[:-1], self.out_features)


def _is_by_rows(shape: torch.Size) -> bool:
    """Return whether an input (..., num_tokens, in_features) takes row kernels whatever its size.

    So do one token per sequence, as prompts end with for their logits, and passes that are not prompts.
    """
    running = running_pass()
    return shape[-2] == 1 or (running is not None and running.phase != "prompt")


def adapt_linears(model: nn.Module) -> None:
    """Make every plain `nn.Linear` of `model` a `RowLinear`, in place.

    The modules and their weights stay the same objects, so tied weights stay tied.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in COMPUTE_DTYPES and module.weight.is_contiguous():
            module.__class__ = RowLinear
            vars(module)["flash_widens"] = kernels.choose_plain_strategy(module.weight.dtype) == "widen"
