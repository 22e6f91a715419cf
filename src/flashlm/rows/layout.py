"""Where every row of a streamed unit lies in its file, cut into blocks: the paper's row-column bundles (§3.2), or a matrix.

Row *i* of a feed-forward layer is `[gate_i | up_i | down_:,i]` (no gate where it has none), each part `hidden_size`
elements; row *i* of a linear layer is row *i* of its matrix. `block_rows` rows make a block, which starts on
`BLOCK_ALIGN_BYTES`. The block is what is streamed, pinned, computed with and has a checksum, so none of these depends on
the memory budget. In a layer of experts a block is an expert. Each part has an encoding of its own (`rows/encodings.py`).
Pure arithmetic: this module knows neither files nor tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flashlm._native import RowFormat
from flashlm.errors import ConfigError
from flashlm.rows.encodings import ENCODINGS, Encoding

ROW_ALIGN_BYTES = 512  # the smallest logical block of common devices
BLOCK_ALIGN_BYTES = 4096  # the largest one, so that any device can read a block directly
ROWS_PER_STEP = 16  # blocks hold a multiple of this, so that vector loops have no ragged ends
MAX_BLOCK_BYTES = 4 << 20  # a large sequential read; larger ones gained nothing
RUN_BYTES = 1 << 20  # of blocks in one call at most: by then calls cost next to nothing
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
    """

    hidden_size: int
    num_rows: int
    parts: tuple[Part, ...]
    encodings: tuple[str, ...]
    block_rows: int

    def __post_init__(self) -> None:
        """Refuse what no row can be.

        Raises:
            ConfigError: Not as many encodings as parts, an unknown one, or parts that are not whole groups.
        """
        if len(self.encodings) != len(self.parts):
            raise ConfigError(f"{len(self.parts)} parts need as many encodings, got {', '.join(self.encodings)}")
        unknown = [name for name in self.encodings if name not in ENCODINGS]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is no encoding: {', '.join(ENCODINGS)} are")
        for name in self.encodings:
            ENCODINGS[name].bytes_of(self.hidden_size)

    @cached_property
    def placed(self) -> tuple[PartLayout, ...]:
        """Each part's place within a row; they follow each other without padding."""
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
        """The encoding of all parts, where it is one and plain: rows are then rows of a tensor."""
        first = self.placed[0].encoding
        return first if first.is_plain and len(set(self.encodings)) == 1 else None

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
        return round_up(self.block_rows * self.row_stride_bytes, BLOCK_ALIGN_BYTES)

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
        return round_up(len(self.rows_of(block)) * self.row_stride_bytes, BLOCK_ALIGN_BYTES)

    @property
    def run_blocks(self) -> int:
        """How many blocks one behind the other are worth one call: their rows must join, without padding between blocks."""
        if self.block_stride_bytes != self.block_rows * self.row_stride_bytes:
            return 1
        return max(RUN_BYTES // self.block_stride_bytes, 1)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole layer file."""
        last = self.num_blocks - 1
        return self.offset_of(last) + self.read_bytes(last)


def choose_block_rows(*, num_rows: int, row_bytes: int) -> int:
    """Return the rows per block: about 4 MiB for large layers, finer for small ones, a multiple of `ROWS_PER_STEP`."""
    row_stride_bytes = round_up(row_bytes, ROW_ALIGN_BYTES)
    target_bytes = num_rows * row_stride_bytes // BLOCKS_PER_LAYER
    target_bytes = min(max(target_bytes, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    rows = max(target_bytes // row_stride_bytes, 1)
    rows = max(rows // ROWS_PER_STEP, 1) * ROWS_PER_STEP
    return min(rows, round_up(num_rows, ROWS_PER_STEP))


def bytes_of_row(encodings: Sequence[str], hidden_size: int) -> int:
    """Return the bytes of a row of parts of so many elements each."""
    return sum(ENCODINGS[name].bytes_of(hidden_size) for name in encodings)


def matrix_row_step(row_bytes: int) -> int:
    """Return what the rows per block of a matrix are a multiple of, so that its blocks join in memory without padding."""
    return math.lcm(ROWS_PER_STEP, BLOCK_ALIGN_BYTES // math.gcd(row_bytes, BLOCK_ALIGN_BYTES))


def choose_matrix_rows(*, num_rows: int, row_bytes: int, block_bytes: int) -> int:
    """Return the rows per block of a matrix.

    Args:
        num_rows: Its rows.
        row_bytes: Bytes of one.
        block_bytes: What a block may take: staging slots are of one size, that of the largest block.
    """
    step = matrix_row_step(row_bytes)
    return min(max(block_bytes // row_bytes // step, 1) * step, round_up(num_rows, step))
