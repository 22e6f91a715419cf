"""Where every neuron of a streamed layer lies in its file: the paper's row-column bundles (§3.2), cut into blocks.

Row *i* of a layer is `[gate_i | up_i | down_:,i]` (no gate where the FFN has none), each part `hidden_size` elements.
Rows are padded to `ROW_ALIGN_BYTES`; `block_rows` rows make a block, which starts on `BLOCK_ALIGN_BYTES`. The block is
the unit of streaming, pinning, computing and checksums, so none of these depends on the memory budget. In a
mixture-of-experts layer a block is an expert. Pure arithmetic: this module knows neither files nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashlm.errors import ConfigError

ROW_ALIGN_BYTES = 512  # the smallest logical block of common devices
BLOCK_ALIGN_BYTES = 4096  # the largest one, so that any device can read a block directly
ROWS_PER_STEP = 16  # blocks hold a multiple of this, so that vector loops have no ragged ends
MAX_BLOCK_BYTES = 4 << 20  # a large sequential read; larger ones gained nothing
RUN_BYTES = 1 << 20  # of blocks in one call at most: by then calls cost next to nothing
MIN_BLOCK_BYTES = 64 << 10
BLOCKS_PER_LAYER = 16  # small layers are cut at least this finely, so that a budget can split them

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
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


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The geometry of one streamed layer file.

    Attributes:
        hidden_size: Elements of each part of a row (d_model).
        num_rows: Neurons of the layer (d_ffn).
        has_gate: Whether a row starts with a gate part.
        dtype: Element type of the rows, a key of `DTYPE_BYTES`.
        block_rows: Rows per block (the last block may hold fewer).
    """

    hidden_size: int
    num_rows: int
    has_gate: bool
    dtype: str
    block_rows: int

    @property
    def num_parts(self) -> int:
        """Parts of a row: 3 with a gate, else 2."""
        return 3 if self.has_gate else 2

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that carry weights."""
        return self.num_parts * self.hidden_size * DTYPE_BYTES[self.dtype]

    @property
    def row_stride_bytes(self) -> int:
        """Bytes from one row to the next."""
        return round_up(self.row_bytes, ROW_ALIGN_BYTES)

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


def choose_block_rows(*, hidden_size: int, num_rows: int, has_gate: bool, dtype: str) -> int:
    """Return the rows per block: about 4 MiB for large layers, finer for small ones, a multiple of `ROWS_PER_STEP`."""
    parts = 3 if has_gate else 2
    row_stride_bytes = round_up(parts * hidden_size * DTYPE_BYTES[dtype], ROW_ALIGN_BYTES)
    target_bytes = num_rows * row_stride_bytes // BLOCKS_PER_LAYER
    target_bytes = min(max(target_bytes, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    rows = max(target_bytes // row_stride_bytes, 1)
    rows = max(rows // ROWS_PER_STEP, 1) * ROWS_PER_STEP
    return min(rows, round_up(num_rows, ROWS_PER_STEP))
