"""Tensors of a checkpoint whose rows are whole groups of an encoding, and how their rows are read.

A row is given by byte ranges, which may lie in one place (GGUF), in two (scales beside elements) or in another order than
the model's. What is read is put together as the pack will hold it, without a change of value, or decoded to fp32 where
something else is to be made of it. Rows are asked for in ranges, so that no tensor need ever be in memory whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS
from flashlm.storage.ranges import FileRange, RangeRead, RangeReader, room_bytes
from flashlm.storage.reader import AlignedBuffer

# Where groups of GGUF's encodings have scales, by byte; in mxfp4 one is a power of two, of which 255 is no number.
_FP16_SCALES = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
_FP16_SPECIAL = 0x7C  # in the upper byte: infinity, or no number
_MX_NAN = 255
_MAX_SPAN = 4  # times the rows that are wanted: of rows in another order, what lies between is read too

Value = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTensor(TensorEntry):
    """A tensor by its rows.

    Attributes:
        dtype: What its elements are, of an encoding that is not plain once they are decoded.
        encoding: How its rows are written: a key of `ENCODINGS`, or a ggml type that only the `gguf` package decodes. Empty:
            plain elements.
        num_rows, width: As the checkpoint holds it: all axes but the last are one.
        is_transposed: Whether the model has its last two axes the other way round.
        change: What the model has instead of decoded rows, fp32 (rows, width); None: the same.
    """

    encoding: str
    num_rows: int
    width: int
    is_transposed: bool = False
    change: Value | None = None

    @property
    def is_plain(self) -> bool:
        """Whether an element of it stands for itself."""
        return not self.encoding

    @property
    def is_as_stored(self) -> bool:
        """Whether the model has its rows, in whichever order, as they are."""
        return self.change is None and not self.is_transposed

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, put together."""
        return self.width * self.dtype.itemsize if self.is_plain else ENCODINGS[self.encoding].bytes_of(self.width)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, put together."""
        return self.num_rows * self.row_bytes

    def ranges(self, rows: range) -> tuple[FileRange, ...]:
        """Return what has to be read for `rows`, whose step may be larger than one."""
        raise NotImplementedError

    def join(self, rows: range, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return `rows`, uint8 (len(rows), row_bytes), from the bytes of their `ranges`; may be a view of them.

        Raises:
            PackError: They can't be what they should be.
        """
        raise NotImplementedError

    def check(self, encoded: torch.Tensor) -> None:
        """Refuse what `join` gave where a scale is no finite number.

        Raises:
            PackError: It is so.
        """
        if not encoded.numel() or not (self.encoding in _FP16_SCALES or self.encoding == "mxfp4"):
            return
        groups = encoded.reshape(-1, ENCODINGS[self.encoding].group_bytes)
        if self.encoding == "mxfp4":
            is_finite = int(groups[:, 0].max()) < _MX_NAN
        else:
            highest = (int((groups[:, place + 1] & _FP16_SPECIAL).max()) for place in _FP16_SCALES[self.encoding])
            is_finite = max(highest) < _FP16_SPECIAL
        if not is_finite:
            raise PackError(f"{self.path} is damaged: {self.name} holds a scale that is no finite number")

    def values(self, encoded: torch.Tensor) -> torch.Tensor:
        """Return what `join` gave as the model's values (rows, width): plain ones in their dtype, others in fp32."""
        found = _typed(encoded, self.dtype) if self.is_plain else self._decode(encoded)
        return found if self.change is None else self.change(found.float())

    def _decode(self, encoded: torch.Tensor) -> torch.Tensor:
        encoding = ENCODINGS[self.encoding]
        rows = encoded if encoded.stride(-1) == 1 else encoded.contiguous()
        stride = rows.stride(0) if len(rows) > 1 else self.row_bytes
        wide = torch.empty(len(rows), self.width)
        row_format = kernels.RowFormat.alike(stride, self.width, encoding.code, 1)
        kernels.widen(kernels.RowBlock(rows, len(rows), row_format), 0, wide)
        return wide


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredTensor(EncodedTensor):
    """A tensor that lies in one piece, row after row.

    Attributes:
        order: int64 (num_rows,): which of its rows each of the model's is; None: the same.
        stored_row_bytes: Bytes of a row in the file.
    """

    stored_row_bytes: int
    order: torch.Tensor | None = field(default=None, repr=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.stored_row_bytes

    def ranges(self, rows: range) -> tuple[FileRange, ...]:
        """Return one range, or in another order as many as there are runs of rows that lie together."""
        return tuple(
            FileRange(self.path, self.offset + first * self.stored_row_bytes, count * self.stored_row_bytes)
            for first, count in self._runs(rows)
        )

    def _runs(self, rows: range) -> list[tuple[int, int]]:
        """Return (first row, rows) of what is read."""
        if not rows:
            return []
        if self.order is None:
            return [(rows[0], rows[-1] - rows[0] + 1)]
        wanted = self.order[rows.start : rows.stop : rows.step]
        low, high = int(wanted.min()), int(wanted.max())
        if high - low < _MAX_SPAN * len(rows):
            return [(low, high - low + 1)]
        breaks = (torch.nonzero(wanted.diff() != 1).flatten() + 1).tolist()
        starts = [0, *breaks]
        return [(int(wanted[at]), end - at) for at, end in zip(starts, [*breaks, len(wanted)], strict=True)]

    def join(self, rows: range, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        if not rows:
            return torch.empty(0, self.stored_row_bytes, dtype=torch.uint8)
        if len(raw) > 1:
            return torch.cat([each.view(-1, self.stored_row_bytes) for each in raw])
        found = raw[0].view(-1, self.stored_row_bytes)
        if self.order is None:
            return found[:: rows.step]
        wanted = self.order[rows.start : rows.stop : rows.step]
        return found[wanted - wanted.min()]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignTensor(StoredTensor):
    """One in a type that only the `gguf` package decodes: it can't be kept as it is.

    Attributes:
        ggml_type: Its name there.
    """

    ggml_type: str

    def _decode(self, encoded: torch.Tensor) -> torch.Tensor:
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize

            with np.errstate(all="ignore"):  # what is infinite is looked for in the result
                found = dequantize(encoded.numpy(), GGMLQuantizationType[self.ggml_type])
        except (ImportError, NotImplementedError, ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"{self.path} holds {self.name} in {self.encoding.upper()}, which the installed gguf can't decode: take a"
                f" file in another type, or `pip install --upgrade gguf` ({error})"
            ) from error
        if not np.isfinite(found).all():
            raise PackError(f"{self.path} is damaged: {self.name} holds a scale that is no finite number")
        return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


@dataclass(frozen=True, kw_only=True, eq=False)
class InterleavedTensor(EncodedTensor):
    """Plain rows that are made of two tensors, their elements by turns.

    Attributes:
        even, odd: The tensors, plain and of one shape and type.
    """

    even: EncodedTensor
    odd: EncodedTensor

    def ranges(self, rows: range) -> tuple[FileRange, ...]:
        """Return the ranges of both."""
        return self.even.ranges(rows) + self.odd.ranges(rows)

    def join(self, rows: range, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the rows."""
        num_even = len(self.even.ranges(rows))
        itemsize = self.dtype.itemsize
        halves = [
            each.join(rows, part).reshape(len(rows), -1, itemsize)
            for each, part in ((self.even, raw[:num_even]), (self.odd, raw[num_even:]))
        ]
        return torch.stack(halves, dim=2).flatten(1)


def by_rows(entry: TensorEntry) -> EncodedTensor:
    """Return a tensor by its rows; a plain one lies in one piece. An axis alone is of rows of one element."""
    if isinstance(entry, EncodedTensor):
        return entry
    width = entry.shape[-1] if len(entry.shape) > 1 else 1
    return StoredTensor(
        name=entry.name,
        path=entry.path,
        dtype=entry.dtype,
        shape=entry.shape,
        offset=entry.offset,
        encoding="",
        num_rows=math.prod(entry.shape) // width,
        width=width,
        stored_row_bytes=width * entry.dtype.itemsize,
    )


def _typed(encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes (rows, bytes) as elements; a copy only where they can't be looked at where they are."""
    dense = encoded.contiguous()
    return (dense if dense.storage_offset() % dtype.itemsize == 0 else dense.clone()).view(dtype)


class RowsRead:
    """Rows of several tensors on their way into one buffer; ranges that two of them share are read once."""

    def __init__(self, wanted: Sequence[tuple[EncodedTensor, range]]) -> None:
        self._wanted = [(entry, rows, entry.ranges(rows)) for entry, rows in wanted]
        self._ranges = tuple(dict.fromkeys(each for *_, ranges in self._wanted for each in ranges))

    @property
    def is_one_piece(self) -> bool:
        """Whether what is read is what `read` returns, without a copy."""
        return len(self._ranges) == 1 and all(getattr(entry, "order", None) is None for entry, *_ in self._wanted)

    @property
    def room_bytes(self) -> int:
        """What a buffer for them must have."""
        return sum(room_bytes(each.num_bytes) for each in self._ranges)

    def read(self, reader: RangeReader, buffer: AlignedBuffer) -> list[torch.Tensor]:
        """Return the rows of each tensor, as `join` does; views of the buffer where that can be.

        Raises:
            StorageError: They can't be read.
            PackError: They can't be what they should be.
        """
        begun: dict[FileRange, RangeRead] = {}
        at = 0
        for each in self._ranges:
            begun[each] = reader.begin(each.path, each.offset, each.num_bytes, buffer, at)
            at += room_bytes(each.num_bytes)
        raw = {each: read.wait() for each, read in begun.items()}
        found = []
        for entry, rows, ranges in self._wanted:
            found.append(entry.join(rows, [raw[each] for each in ranges]))
            entry.check(found[-1])
        return found
