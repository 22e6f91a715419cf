"""Where every weight of a streamed unit lies in its file, cut into blocks.

`block_rows` rows make a block, which starts on `BLOCK_ALIGN_BYTES`. The block is what is streamed, pinned, computed with
and has a checksum, so none of these depends on the memory budget. In a layer of experts a block is an expert. Each part has
an encoding of its own (`rows/encodings.py`). A block is arranged in one of two ways:

* `row`: the paper's row-column bundles (§3.2). Row *i* of a feed-forward layer is `[gate_i | up_i | down_:,i]` (no gate
  where it has none), each part `hidden_size` elements; row *i* of a linear layer is row *i* of its matrix. So rows can be
  read one by one.
* `block`: `[gate of R neurons | up of R neurons | down of R neurons]`, each part contiguous: `gate` and `up` are R rows of
  hidden_size elements, `down` is hidden_size rows of R elements, as a checkpoint has it. The groups of a quantised `down`
  go across neurons, so that only whole blocks can be kept as they are.

Pure arithmetic: this module knows neither files nor tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from flashlm._native import RowFormat
from flashlm.errors import ConfigError
from flashlm.rows.encodings import ENCODINGS, Encoding

ROW_ALIGN_BYTES = 512  # the smallest logical block of common devices
BLOCK_ALIGN_BYTES = 4096  # the largest one, so that any device can read a block directly
PART_ALIGN_BYTES = 64  # where parts of a block begin: a line of any processor's cache, and the widest vector
ROWS_PER_STEP = 16  # blocks hold a multiple of this, so that vector loops have no ragged ends
MAX_BLOCK_BYTES = 4 << 20  # a large sequential read; larger ones gained nothing
RUN_BYTES = 16 << 20  # of blocks in one call at most: by then calls cost next to nothing
MIN_BLOCK_BYTES = 64 << 10
BLOCKS_PER_LAYER = 16  # small layers are cut at least this finely, so that a budget can split them

DTYPE_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
}


def canonical_dtype(dtype: str) -> str:
    """Return the full name of an element type: `bf16` and `bfloat16` are both accepted.

    Raises:
        ConfigError: Another one.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype is {dtype!r}: one of {', '.join(DTYPE_NAMES)} expected")
    return DTYPE_NAMES[dtype]


Part = Literal["gate", "up", "down", "weight"]
GATED: tuple[Part, ...] = ("gate", "up", "down")
UNGATED: tuple[Part, ...] = ("up", "down")
MATRIX: tuple[Part, ...] = ("weight",)
Arrangement = Literal["row", "block"]


def ffn_parts(*, has_gate: bool) -> tuple[Part, ...]:
    """Return the parts of a feed-forward layer's rows."""
    return GATED if has_gate else UNGATED


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PartLayout:
    """Where a part lies within a row, and how its elements are written."""

    encoding: Encoding
    offset_bytes: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class BlockPart:
    """Where a part lies within a block of the arrangement `block`, or a piece of one: rows of a matrix.

    Attributes:
        part: Which.
        encoding: How its elements are written.
        offset_bytes: From the beginning of the block to its first row.
        num_rows: Its rows: neurons, or of `down` hidden_size.
        width: Elements of a row: hidden_size, or of `down` neurons.
        row_stride_bytes: From one row to the next: those of the whole part follow each other without padding.
    """

    part: Part
    encoding: Encoding
    offset_bytes: int
    num_rows: int
    width: int
    row_stride_bytes: int

    @property
    def num_bytes(self) -> int:
        """From its first byte to the end of its last row."""
        return (self.num_rows - 1) * self.row_stride_bytes + self.encoding.bytes_of(self.width)

    @cached_property
    def format(self) -> RowFormat:
        """Its rows, as row kernels take them."""
        return RowFormat(self.row_stride_bytes, self.width, [(self.encoding.code, 0)])

    def piece(self, neurons: range) -> BlockPart:
        """Return some of its neurons, where they lie.

        Raises:
            ConfigError: They do not begin and end with groups of `down`.
        """
        if self.part == "down":
            offset = self.offset_bytes + self.encoding.bytes_of(neurons.start)
            self.encoding.bytes_of(len(neurons))
            return replace(self, offset_bytes=offset, width=len(neurons))
        offset = self.offset_bytes + neurons.start * self.row_stride_bytes
        return replace(self, offset_bytes=offset, num_rows=len(neurons))


def same_encoding(encoding: str, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the encodings of parts that all have one."""
    return (encoding,) * len(parts)


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The geometry of one streamed file.

    Attributes:
        hidden_size: Elements of each part of a row: d_model, or a linear layer's inputs.
        num_rows: Neurons of a feed-forward layer (d_ffn), or a linear layer's outputs.
        parts: What a row is made of: `GATED`, `UNGATED` or `MATRIX`.
        encodings: Of each part, a key of `ENCODINGS`.
        block_rows: Rows per block (the last block may hold fewer).
        arrangement: How a block is arranged; a matrix is of rows.
    """

    hidden_size: int
    num_rows: int
    parts: tuple[Part, ...]
    encodings: tuple[str, ...]
    block_rows: int
    arrangement: Arrangement = "row"

    def __post_init__(self) -> None:
        """Refuse what no row can be.

        Raises:
            ConfigError: Not as many encodings as parts, an unknown one, parts that are not whole groups, or a matrix
                that is not of rows.
        """
        if len(self.encodings) != len(self.parts):
            raise ConfigError(f"{len(self.parts)} parts need as many encodings, got {', '.join(self.encodings)}")
        unknown = [name for name in self.encodings if name not in ENCODINGS]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is no encoding: {', '.join(ENCODINGS)} are")
        if self.is_by_block and self.parts == MATRIX:
            raise ConfigError("a matrix has no other arrangement than row")
        for name in self.encodings[: -1 if self.is_by_block else None]:
            ENCODINGS[name].bytes_of(self.hidden_size)
        if self.is_by_block:
            down = ENCODINGS[self.encodings[-1]]
            down.bytes_of(self.block_rows)
            down.bytes_of(self.num_rows)

    @property
    def is_by_block(self) -> bool:
        """Whether the parts of a block lie whole, so that no row lies by itself."""
        return self.arrangement == "block"

    @property
    def down_group(self) -> int:
        """What cuts between neurons are multiples of: the groups of a `down` that lies whole."""
        return ENCODINGS[self.encodings[-1]].group_elements if self.is_by_block else 1

    @cached_property
    def whole_block(self) -> tuple[BlockPart, ...]:
        """Where the parts of a block of `block_rows` lie; arrangement `block`."""
        return self._block_parts(self.block_rows)

    @cached_property
    def last_block(self) -> tuple[BlockPart, ...]:
        """The same of the last block, which may be shorter."""
        return self._block_parts(len(self.rows_of(self.num_blocks - 1)))

    def block_parts(self, num_rows: int) -> tuple[BlockPart, ...]:
        """Return where the parts of a block lie that holds so many rows: all, or those of the last one.

        Raises:
            ConfigError: No block holds so many, or the arrangement is another one than `block`.
        """
        if num_rows == self.block_rows:
            return self.whole_block
        if num_rows != len(self.rows_of(self.num_blocks - 1)):
            raise ConfigError(f"no block holds {num_rows} rows")
        return self.last_block

    def _block_parts(self, num_rows: int) -> tuple[BlockPart, ...]:
        if not self.is_by_block:
            raise ConfigError("the parts of a block of rows don't lie whole")
        parts: list[BlockPart] = []
        offset = 0
        for part, name in zip(self.parts, self.encodings, strict=True):
            shape = (self.hidden_size, num_rows) if part == "down" else (num_rows, self.hidden_size)
            encoding = ENCODINGS[name]
            stride = encoding.bytes_of(shape[1])
            parts.append(
                BlockPart(
                    part=part,
                    encoding=encoding,
                    offset_bytes=offset,
                    num_rows=shape[0],
                    width=shape[1],
                    row_stride_bytes=stride,
                )
            )
            offset = round_up(offset + parts[-1].num_bytes, PART_ALIGN_BYTES)
        return tuple(parts)

    def _block_bytes(self, num_rows: int) -> int:
        """Return the bytes of a block of so many rows, padded."""
        if not self.is_by_block:
            return round_up(num_rows * self.row_stride_bytes, BLOCK_ALIGN_BYTES)
        last = self.block_parts(num_rows)[-1]
        return round_up(last.offset_bytes + last.num_bytes, BLOCK_ALIGN_BYTES)

    def part_bytes(self, index: int) -> int:
        """Return the bytes of part `index` of the whole layer, without padding."""
        encoding = ENCODINGS[self.encodings[index]]
        if self.is_by_block and self.parts[index] == "down":
            return self.hidden_size * encoding.bytes_of(self.num_rows)
        return self.num_rows * encoding.bytes_of(self.hidden_size)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, without padding."""
        return sum(self.part_bytes(index) for index in range(self.num_parts))

    @cached_property
    def placed(self) -> tuple[PartLayout, ...]:
        """Each part's place within a row; they follow each other without padding. Of the arrangement `row`, as all of rows.

        Raises:
            ConfigError: No row lies by itself.
        """
        if self.is_by_block:
            raise ConfigError("no row of this unit lies by itself: its blocks have the arrangement block")
        placed, offset = [], 0
        for name in self.encodings:
            encoding = ENCODINGS[name]
            placed.append(PartLayout(encoding, offset, encoding.bytes_of(self.hidden_size)))
            offset += placed[-1].num_bytes
        return tuple(placed)

    def part(self, index: int) -> PartLayout:
        """Return where part `index` lies within a row."""
        return self.placed[index]

    @cached_property
    def format(self) -> RowFormat:
        """The same, as row kernels take it."""
        parts = [(each.encoding.code, each.offset_bytes) for each in self.placed]
        return RowFormat(self.row_stride_bytes, self.hidden_size, parts)

    @property
    def encoding(self) -> str:
        """Name of the encodings, for people: one where all parts have it, else all."""
        return self.encodings[0] if len(set(self.encodings)) == 1 else "+".join(self.encodings)

    @property
    def plain(self) -> Encoding | None:
        """The encoding of all parts, where it is one and plain, and rows lie by themselves: as rows of a tensor."""
        first = ENCODINGS[self.encodings[0]]
        return first if first.is_plain and len(set(self.encodings)) == 1 and not self.is_by_block else None

    @property
    def num_weights(self) -> int:
        """Elements of the whole layer."""
        return self.num_rows * self.num_parts * self.hidden_size

    @property
    def num_parts(self) -> int:
        """Parts of a row."""
        return len(self.parts)

    @property
    def has_gate(self) -> bool:
        """Whether a row starts with a gate part."""
        return self.parts == GATED

    @property
    def row_align_bytes(self) -> int:
        """What rows are padded to: those of a matrix to nothing, so that it lies in memory as others expect it."""
        return 1 if self.parts == MATRIX else ROW_ALIGN_BYTES

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a row that carry weights."""
        return sum(each.num_bytes for each in self.placed)

    @property
    def row_stride_bytes(self) -> int:
        """Bytes from one row to the next."""
        return round_up(self.row_bytes, self.row_align_bytes)

    @property
    def block_stride_bytes(self) -> int:
        """Bytes from one block to the next."""
        return self._block_bytes(self.block_rows)

    @property
    def num_blocks(self) -> int:
        """Blocks of the layer."""
        return -(-self.num_rows // self.block_rows)

    def rows_of(self, block: int) -> range:
        """Return the rows that `block` holds."""
        start = block * self.block_rows
        return range(start, min(start + self.block_rows, self.num_rows))

    def offset_of(self, block: int) -> int:
        """Return the file offset of `block` in bytes."""
        return block * self.block_stride_bytes

    def read_bytes(self, block: int) -> int:
        """Return the bytes to read for `block`: its rows, padded to `BLOCK_ALIGN_BYTES`."""
        return self._block_bytes(len(self.rows_of(block)))

    @property
    def joins(self) -> bool:
        """Whether rows follow each other from block to block, without padding between."""
        return not self.is_by_block and self.block_stride_bytes == self.block_rows * self.row_stride_bytes

    @property
    def run_blocks(self) -> int:
        """How many blocks one behind the other are worth one call: their rows must join, or lie in parts of their own."""
        if not (self.joins or self.is_by_block):
            return 1
        return max(RUN_BYTES // self.block_stride_bytes, 1)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole layer file."""
        last = self.num_blocks - 1
        return self.offset_of(last) + self.read_bytes(last)


def choose_block_rows(*, num_rows: int, num_bytes: int, step: int = ROWS_PER_STEP) -> int:
    """Return the rows per block: about 4 MiB for large layers, finer for small ones.

    Args:
        num_rows: Rows of the layer.
        num_bytes: Bytes of all of them, as they lie.
        step: What the result is a multiple of.
    """
    target_bytes = min(max(num_bytes // BLOCKS_PER_LAYER, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    rows = max(target_bytes * num_rows // num_bytes // step, 1) * step
    return min(rows, round_up(num_rows, step))


def bytes_of_row(encodings: Sequence[str], hidden_size: int) -> int:
    """Return the bytes of a row of parts of so many elements each."""
    return sum(ENCODINGS[name].bytes_of(hidden_size) for name in encodings)


def matrix_row_step(row_bytes: int) -> int:
    """Return what the rows per block of a matrix are a multiple of, so that its blocks join in memory without padding."""
    return math.lcm(ROWS_PER_STEP, BLOCK_ALIGN_BYTES // math.gcd(row_bytes, BLOCK_ALIGN_BYTES))


def choose_matrix_rows(*, num_rows: int, row_bytes: int, block_bytes: int) -> int:
    """Return the rows per block of a matrix; they join without padding where blocks of a usual size can.

    Args:
        num_rows: Its rows.
        row_bytes: Bytes of one.
        block_bytes: What a block may take: staging slots are of one size, that of the largest block.
    """
    step = matrix_row_step(row_bytes)
    if step * row_bytes > MAX_BLOCK_BYTES:  # no block is that large: these are padded each, and come one by one
        step = ROWS_PER_STEP
    return min(max(block_bytes // row_bytes // step, 1) * step, round_up(num_rows, step))
