"""The neurons of a block in memory, however it is arranged: its two products with tokens, a few at a time.

Of rows (arrangement `row`) a token's output adds up neuron after neuron; of whole parts (arrangement `block`) each output
is one dot product over the block's neurons, which is added to what other blocks gave. Either way the order of a sum depends
on the layout alone. Dot products may be made with tokens in 8 bits. The work is done by `rows.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import LayerLayout

# Tokens, or hidden activations, in fp32 or rounded to 8 bits.
Operand = torch.Tensor | kernels.QuantizedTokens


def operand(x: torch.Tensor, encodings: Iterable[str], *, int8: bool) -> Operand:
    """Return tokens as products with parts of some encodings take them: in 8 bits where that is asked for and any can.

    Args:
        x: fp32 (num_tokens, width), contiguous; at most `kernels.MAX_TOKENS` tokens.
        encodings: Of the parts.
        int8: Whether it is asked for.
    """
    if int8 and not all(ENCODINGS[name].is_plain for name in encodings):
        return kernels.quantize_tokens(x)
    return x


class Neurons(Protocol):
    """The neurons of a block, or of several."""

    def project(self, x: Operand, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Write out[t, n] = x[t] · neuron[n].part (+ bias[n]) of gate or up.

        Args:
            x: (num_tokens, hidden_size), at most `kernels.MAX_TOKENS` tokens: fp32, contiguous, or in 8 bits.
            part: Index of the part.
            out: fp32 (num_tokens, neurons), any token stride.
            bias: fp32 (neurons,), contiguous.
        """

    def accumulate(self, h: torch.Tensor, y: torch.Tensor) -> None:
        """Add y[t] += sum over n of h[t, n] · neuron[n].down.

        Args:
            h: fp32 (num_tokens, neurons), any token stride.
            y: fp32 (num_tokens, hidden_size), contiguous; at most `kernels.MAX_TOKENS` tokens.
        """


class Block(Neurons, Protocol):
    """The neurons of one block."""

    def part(self, index: int) -> tuple[kernels.RowBlock, int]:
        """Return rows and which part of them holds part `index` of the neurons."""


class _Rows:
    """Neurons that lie row by row."""

    def __init__(self, rows: kernels.RowBlock) -> None:
        self.rows = rows

    def part(self, index: int) -> tuple[kernels.RowBlock, int]:
        return self.rows, index

    def project(self, x: Operand, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        kernels.project(x, self.rows, part, out, bias)

    def accumulate(self, h: torch.Tensor, y: torch.Tensor) -> None:
        kernels.accumulate(h, self.rows, y)


class _Parts:
    """Neurons whose parts lie whole."""

    def __init__(self, layout: LayerLayout, parts: list[kernels.RowBlock], *, int8: bool) -> None:
        self.parts = parts
        self.rounds = int8 and not ENCODINGS[layout.encodings[-1]].is_plain  # hidden activations

    def part(self, index: int) -> tuple[kernels.RowBlock, int]:
        return self.parts[index], 0

    def project(self, x: Operand, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        kernels.project(x, self.parts[part], 0, out, bias)

    def accumulate(self, h: torch.Tensor, y: torch.Tensor) -> None:
        product = torch.empty_like(y)
        h = h.contiguous()
        kernels.project(kernels.quantize_tokens(h) if self.rounds else h, self.parts[-1], 0, product)
        y += product


class _Run:
    """Neurons of several blocks whose parts lie whole, as many in each but the last; a token meets them in one job."""

    def __init__(self, blocks: list[_Parts], block_rows: int, last_rows: int) -> None:
        self.blocks = blocks
        stops = [block_rows * (index + 1) for index in range(len(blocks) - 1)]
        stops.append(block_rows * (len(blocks) - 1) + last_rows)
        self.spans = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        self.num_alike = len(blocks) if last_rows == block_rows else len(blocks) - 1
        self.block_rows = block_rows

    def project(self, x: Operand, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        num_alike = self.num_alike if len(out) == 1 else 0
        if num_alike:
            alike = self.blocks[:num_alike]
            biases = [] if bias is None else [bias[span] for span in self.spans[:num_alike]]
            project_blocks(x, alike, part, out[:, : num_alike * self.block_rows].view(num_alike, -1), biases)
        for block, span in list(zip(self.blocks, self.spans, strict=True))[num_alike:]:
            block.project(x, part, out[:, span], None if bias is None else bias[span])

    def accumulate(self, h: torch.Tensor, y: torch.Tensor) -> None:
        num_alike = self.num_alike if len(h) == 1 else 0
        if num_alike:
            product = torch.zeros(num_alike, y.shape[1], dtype=torch.float32)
            accumulate_blocks(
                h[:, : num_alike * self.block_rows].reshape(num_alike, -1), self.blocks[:num_alike], product
            )
            for each in product:
                y += each
        for block, span in list(zip(self.blocks, self.spans, strict=True))[num_alike:]:
            block.accumulate(h[:, span], y)


def neurons_at(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, *, int8: bool = False) -> Neurons:
    """Return the neurons of a block that lies in a slab, or of a run of blocks.

    Args:
        layout: The layer's geometry.
        place: Where the first block begins; the others lie behind it as in the file.
        num_rows: Their rows.
        int8: As `block_at`.

    Raises:
        ConfigError: A row ends beyond the memory.
    """
    if not layout.is_by_block or num_rows <= layout.block_rows:
        return block_at(layout, place, num_rows, int8=int8)
    blocks, last = [], 0
    for start in range(0, num_rows, layout.block_rows):
        last = min(layout.block_rows, num_rows - start)
        block = place.at(start // layout.block_rows * layout.block_stride_bytes)
        blocks.append(_parts_at(layout, block, last, int8=int8))
    return _Run(blocks, layout.block_rows, last)


def block_at(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, *, int8: bool = False) -> Block:
    """Return the neurons of a block that lies in a slab, or of a run of blocks where these join.

    Args:
        layout: The layer's geometry.
        place: Where the block begins.
        num_rows: Its rows.
        int8: Round hidden activations to 8 bits for their product with an encoded `down` that lies whole.

    Raises:
        ConfigError: A row ends beyond the memory.
    """
    if not layout.is_by_block:
        return _Rows(kernels.rows_at(layout, place, num_rows))
    return _parts_at(layout, place, num_rows, int8=int8)


def _parts_at(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, *, int8: bool) -> _Parts:
    return _Parts(layout, [kernels.part_at(part, place) for part in layout.block_parts(num_rows)], int8=int8)


def project_blocks(
    x: Operand, blocks: Sequence[Block], part: int, out: torch.Tensor, biases: Sequence[torch.Tensor] = ()
) -> None:
    """Write out[b, n] = x · neuron[n].part (+ bias[n]) for several blocks in one job, with the bits that `project` gives.

    Args:
        x: (1, hidden_size): fp32, contiguous, or in 8 bits.
        blocks: Of one layout, and whole.
        part: Index of the part.
        out: fp32 (number of blocks, neurons), contiguous.
        biases: Of each block, fp32 (neurons,), contiguous; none: no biases.
    """
    found = [block.part(part) for block in blocks]
    kernels.project_blocks(x, [rows for rows, _ in found], found[0][1], out, biases)


def accumulate_blocks(h: torch.Tensor, blocks: Sequence[Block], y: torch.Tensor) -> None:
    """Add y[b] += sum over n of h[b, n] · neuron[n].down for several blocks in one job, with the bits of `accumulate`.

    Args:
        h: fp32 (number of blocks, neurons), contiguous.
        blocks: Of one layout, and whole.
        y: fp32 (number of blocks, hidden_size), contiguous.
    """
    if not isinstance(blocks[0], _Parts):
        kernels.accumulate_blocks(h, [block.part(0)[0] for block in blocks], y)
    else:
        product = torch.empty_like(y)
        x = kernels.quantize_tokens(h) if blocks[0].rounds else h
        kernels.project_blocks(x, [block.part(-1)[0] for block in blocks], 0, product)
        y += product
