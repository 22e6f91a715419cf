"""The table of input embeddings on flash: a token's row is read when the token comes.

It is the model's own `nn.Embedding` (or a family's class that scales what it looks up), without its weight. A row is some
kilobytes of a table of up to gigabytes, so the table is the last thing that deserves DRAM. Where the output layer shares it,
rows come from the output layer's file, or from its pinned blocks.

A read of a row stands in the device's queue behind what is read ahead, up to tens of milliseconds, so rows that were looked
up recently are kept: text comes back to its words.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import counting
from flashlm.engine.guards import StreamedModule
from flashlm.engine.standin import StreamedWeight, refuse
from flashlm.errors import ConfigError, PackError
from flashlm.memory.needs import recent_bytes
from flashlm.rows import kernels
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import File, Reader, ReadRequest
from flashlm.storage.slab import SlabAllocator, SlotRef
from flashlm.transformers_seam import initialise_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
# Of rows read at once: a decoded token takes one of some kilobytes, a prompt's tokens go in parts.
BATCH_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of the file that holds wanted rows, and where it lands."""

    begin: int
    end: int
    place: int


class TableRows:
    """Rows of a matrix by number, from its file or from memory.

    Args:
        layout: Its geometry.
        dtype: Of what is returned.
        reader: Reads rows.
        file: The matrix's, open.
        unit: Its number for `check`.
        check: Knows the checksums of its blocks.
        counters: The model's totals; what a forward pass causes is counted in the pass.
        pinned: Where row 0 is, if all rows are in memory; else None.
    """

    def __init__(
        self,
        layout: LayerLayout,
        dtype: torch.dtype,
        reader: Reader,
        file: File,
        unit: int,
        check: BlockCheck,
        counters: Counters,
        *,
        pinned: SlotRef | None = None,
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._reader = reader
        self._file = file
        self._unit = unit
        self._check = check
        self._totals = counters
        self._pinned = pinned
        # A row never changes, and each step on this is one of Python's own: threads and interrupts can do it no harm.
        self._recent: dict[int, Bytes] = {}
        self._num_recent = recent_bytes(layout.num_rows * layout.row_bytes) // layout.row_bytes

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows: (num_ids, hidden_size).

        Args:
            ids: int64 or int32 (num_ids,), each a row.

        Raises:
            StorageError: A row can't be read.
            PackError: A block is damaged (where that is checked).
        """
        layout = self._layout
        if self._pinned is not None and layout.joins:
            rows = kernels.rows_at(layout, self._pinned, len(ids), ids.to(torch.int32).contiguous())
            return _decoded(rows, layout, self._dtype)
        wanted, where = torch.unique(ids, return_inverse=True)  # ascending
        content = self._content(wanted.tolist())
        plain = None if layout.plain is None else layout.plain.dtype
        if plain is not None:
            return torch.from_numpy(content).view(plain).to(self._dtype)[where]
        memory = SlabAllocator().slab(content.nbytes, 1, huge_pages=False).slot(0)
        memory.numpy(content.nbytes)[:] = content.reshape(-1)
        return _decoded(kernels.rows_at(layout, memory, len(wanted)), layout, self._dtype)[where]

    def _content(self, wanted: list[int]) -> Bytes:
        """Return the bytes of rows, (num_rows, row_bytes): those looked up recently from memory."""
        content = np.empty((len(wanted), self._layout.row_bytes), dtype=np.uint8)
        if self._pinned is not None:  # of padded blocks
            held = self._pinned.numpy(self._layout.file_bytes)
            for index, start in enumerate(self._offsets(np.array(wanted, dtype=np.int64)).tolist()):
                content[index] = held[start : start + self._layout.row_bytes]
            return content
        missing = []
        for index, row in enumerate(wanted):
            kept = self._recent.pop(row, None)
            if kept is None:
                missing.append(index)
                continue
            content[index] = kept
            self._recent[row] = kept  # the last one to go now
        if missing:
            read = np.empty((len(missing), self._layout.row_bytes), dtype=np.uint8)
            rows = [wanted[index] for index in missing]
            for first, spans in self._batches(np.array(rows, dtype=np.int64)):
                self._read(first, spans, read)
            content[missing] = read
            for row, each in zip(rows, read, strict=True):
                self._recent[row] = each.copy()
        for row in list(self._recent)[: max(len(self._recent) - self._num_recent, 0)]:
            self._recent.pop(row, None)
        return content

    def _offsets(self, rows: Numbers) -> Numbers:
        layout = self._layout
        block, within = np.divmod(rows, layout.block_rows)
        return block * layout.block_stride_bytes + within * layout.row_stride_bytes  # type: ignore[no-any-return]

    def _batches(self, rows: Numbers) -> Iterator[tuple[tuple[int, Numbers], list[_Span]]]:
        """Yield, for some rows at a time, ((number of the first, their offsets), the ranges to read for them)."""
        # A block has one checksum: where what is streamed is checked, blocks are read whole.
        unit = self._layout.block_stride_bytes if self._check.checks_streamed else self._file.alignment_bytes
        offsets = self._offsets(rows)
        begins = offsets // unit * unit
        ends = np.minimum(-(-(offsets + self._layout.row_bytes) // unit) * unit, self._file.num_bytes)
        spans: list[_Span] = []
        first = num_bytes = 0
        for index, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            added = end - max(begin, spans[-1].end) if spans else end - begin  # rows that lie side by side share bytes
            if spans and added > 0 and num_bytes + added > BATCH_BYTES:
                yield (first, offsets[first:index]), spans
                spans, first, num_bytes, added = [], index, 0, end - begin
            if spans and begin <= spans[-1].end:
                last = spans[-1]
                spans[-1] = _Span(last.begin, max(end, last.end), last.place)
            else:
                spans.append(_Span(begin, end, num_bytes))
            num_bytes += max(added, 0)
        yield (first, offsets[first:]), spans

    def _read(self, rows: tuple[int, Numbers], spans: list[_Span], content: Bytes) -> None:
        """Read `spans`, and copy the rows that lie in them to `content`."""
        first, offsets = rows
        counters = counting(self._totals)
        num_bytes = spans[-1].place + spans[-1].end - spans[-1].begin
        # New for every batch: an interrupt leaves reads in flight, and the reader keeps their memory until they have landed.
        memory = SlabAllocator().slab(num_bytes, 1, huge_pages=False).slot(0)
        requests = [
            ReadRequest(self._file, span.begin, span.end - span.begin, memory.buffer, memory.buffer_offset + span.place)
            for span in spans
        ]
        started_s = time.perf_counter()
        self._reader.read(requests)
        counters.wait_s += time.perf_counter() - started_s
        counters.bytes_read += num_bytes
        counters.num_reads += len(spans)
        landed = memory.numpy(num_bytes)
        if self._check.checks_streamed:
            self._check_blocks(spans, landed)
        at = 0
        for index, offset in enumerate(offsets.tolist(), start=first):
            while offset >= spans[at].end:
                at += 1
            begin = spans[at].place + offset - spans[at].begin
            content[index] = landed[begin : begin + self._layout.row_bytes]

    def _check_blocks(self, spans: list[_Span], landed: Bytes) -> None:
        stride = self._layout.block_stride_bytes
        for span in spans:
            for block in range(span.begin // stride, -(-span.end // stride)):
                begin = span.place + block * stride - span.begin
                self._check.check(self._unit, block, landed[begin : begin + self._layout.read_bytes(block)])


def _decoded(rows: kernels.RowBlock, layout: LayerLayout, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.empty(rows.num_rows, layout.hidden_size, dtype=torch.float32)
    kernels.widen(rows, 0, wide)
    return wide.to(dtype)


class FlashEmbedding(StreamedModule, nn.Embedding):
    """An `nn.Embedding` whose rows come from `TableRows`. Inference only; `bind_embedding` makes one."""

    seat = None
    weight: Any
    flash_rows: TableRows

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads: nothing to trace
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return rows of the table; ids of any shape to (*shape, embedding_dim).

        Raises:
            ConfigError: The ids are on another device, or the model is in training mode.
            IndexError: An id is not in the table.
            StorageError: A row can't be read.
        """
        if not input.is_cpu:
            raise ConfigError(f"the input is on {input.device}, but a pack computes on the CPU: move it there")
        if self.training:
            raise ConfigError(
                "streamed weights are for inference, and the model is in training mode: call model.eval() first"
            )
        if input.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"token ids are int64 or int32, got {input.dtype}")
        if input.numel() == 0:
            return torch.empty(*input.shape, self.embedding_dim, dtype=self._dtype)
        low, high = (int(each) for each in torch.aminmax(input))
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(f"token id {low if low < 0 else high} is not in a table of {self.num_embeddings}")
        return self.flash_rows.look_up(input.reshape(-1)).view(*input.shape, self.embedding_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and value is not self._parameters.get(name):  # tying again what is tied changes nothing
            refuse(self.weight.flash_name, "can't be replaced")
        super().__setattr__(name, value)


def bind_embedding(model: PreTrainedModel, path: str, weight: StreamedWeight | nn.Parameter, rows: TableRows) -> None:
    """Connect a table of embeddings: an ordinary weight where that is in memory, else `rows`.

    Args:
        model: The model, its other weights loaded.
        path: Where the table is in it.
        weight: Its weight, or what stands for it.
        rows: Gives its rows.

    Raises:
        PackError: There is another module.
    """
    module = model.get_submodule(path)
    if not isinstance(module, nn.Embedding):
        raise PackError(f"the pack has a table of embeddings for {path}, which is {type(module).__name__}")
    module.register_parameter("weight", weight)  # type: ignore[arg-type]  # a stand-in counts as one
    initialise_buffers(model, module)
    if not isinstance(weight, StreamedWeight):
        return
    cls = type(module)
    vars(module)["_dtype"] = weight.dtype
    vars(module)["flash_rows"] = rows
    # A family's own class comes first: what it does with the rows it does with ours, which it takes for torch's.
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    module.__class__ = FlashEmbedding if cls is nn.Embedding else type(cls.__name__, (cls, FlashEmbedding), own)
