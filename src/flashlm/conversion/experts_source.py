"""Experts out of a checkpoint, one at a time, by transformers' own conversions.

A checkpoint may hold a layer's experts as one tensor, as two (gate and up apart), or one by one; transposed, interleaved,
under other names. transformers knows all this (`conversion_mapping`) and joins the tensors of a whole layer when it loads a
model. Here its conversion operations run on one expert at a time: of the operations that only stack experts, or work within
each of them, both give the same. Any other operation is refused by name.

Experts in an encoding that is not plain are told by their rows: the same operations run on numbers of rows and not on
values, and say which rows of which tensor an expert's parts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from flashlm.conversion.layer_file import LayerPools, RowChunk, typed
from flashlm.conversion.sources.tensors import EncodedTensor, RowsRead
from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.rows.layout import LayerLayout
from flashlm.storage.ranges import RangeReader, room_bytes
from flashlm.storage.reader import AlignedBuffer
from flashlm.structure.experts import ExpertLayer
from flashlm.transformers_seam import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)


@dataclass(kw_only=True, eq=False)
class ExpertWeight:
    """One three-dimensional weight of an experts module, and what in the checkpoint it is made of.

    Attributes:
        name: State-dict name.
        shape: (experts, ...), as the model has it.
        converter: transformers' conversion; None where the checkpoint holds the weight as it is.
        sources: Checkpoint tensors by the converter's source pattern ("" without one).
    """

    name: str
    shape: tuple[int, ...]
    converter: WeightConverter | None = None
    sources: dict[str, list[TensorEntry]] = field(default_factory=dict)

    @property
    def entries(self) -> list[TensorEntry]:
        """All tensors that it is made of."""
        return [entry for entries in self.sources.values() for entry in entries]

    def add(self, pattern: str | None, converter: WeightConverter | None, entry: TensorEntry) -> None:
        """Note that `entry` is a part of it.

        Raises:
            UnsupportedModelError: The conversion does more than stack experts or work within each of them.
            PackError: Two conversions lead to the same weight.
        """
        if converter is not None:
            _check_operations(self.name, converter)
        if self.sources and self.converter is not converter:
            raise PackError(f"{entry.path} holds parts of {self.name} in two ways, the second as {entry.name}")
        self.converter = converter
        self.sources.setdefault(pattern or "", []).append(entry)

    def check(self) -> None:
        """Check that everything is there.

        Raises:
            PackError: A tensor is missing or has a wrong shape.
        """
        patterns = [""] if self.converter is None else self.converter.source_patterns
        for pattern in patterns:
            entries = sorted(self.sources.get(pattern, []), key=lambda entry: dot_natural_key(entry.name))
            wanted = self.shape[0] if "*" in pattern else 1
            if len(entries) != wanted:
                raise PackError(f"{self.name} needs {wanted} tensors like {pattern or self.name}, found {len(entries)}")
            self.sources[pattern] = entries
            for entry in entries:
                if not entry.dtype.is_floating_point:
                    raise PackError(f"{entry.path} holds {entry.name} as {entry.dtype}: floating point expected")
                if len({each.shape for each in entries}) > 1 or (wanted == 1 and entry.shape[:1] != self.shape[:1]):
                    raise PackError(f"{entry.path} holds {entry.name} with shape {list(entry.shape)}, which is no"
                                    f" part of {self.name} {list(self.shape)}")  # fmt: skip
        built = self.assemble({pattern: self._like(pattern) for pattern in patterns})
        if tuple(built.shape) != (1, *self.shape[1:]):
            raise PackError(
                f"{self.entries[0].path} holds {self.entries[0].name} with shape {list(self.entries[0].shape)}: an expert"
                f" of {self.name} becomes {list(built.shape)}, the model's config wants {[1, *self.shape[1:]]}"
            )

    def _like(self, pattern: str) -> torch.Tensor:
        return torch.empty(self._slice_shape(pattern), device="meta", dtype=self.sources[pattern][0].dtype)

    def _slice_shape(self, pattern: str) -> tuple[int, ...]:
        """Return the shape of what one expert has of `pattern`: a whole tensor, or (1, ...) of a stacked one."""
        shape = self.sources[pattern][0].shape
        return shape if "*" in pattern else (1, *shape[1:])

    def slices(self, expert: int) -> Iterator[tuple[str, TensorEntry, int, int]]:
        """Yield pattern, tensor, byte offset in its file and bytes of everything that `expert` is made of."""
        for pattern, entries in self.sources.items():
            if "*" in pattern:
                yield pattern, entries[expert], entries[expert].offset, entries[expert].num_bytes
            else:
                num_bytes = entries[0].num_bytes // self.shape[0]
                yield pattern, entries[0], entries[0].offset + expert * num_bytes, num_bytes

    def shaped(self, pattern: str, raw: torch.Tensor) -> torch.Tensor:
        """Return bytes that `slices` named as the tensor that they are."""
        return typed(raw, self.sources[pattern][0].dtype).view(self._slice_shape(pattern))

    def assemble(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return one expert, (1, ...) as the model has it, from its tensors by pattern."""
        if self.converter is None:
            return tensors[""]
        collected: dict[str, Any] = {pattern: [tensors[pattern]] for pattern in self.converter.source_patterns}
        one_expert = SimpleNamespace(shape=(1, *self.shape[1:]))
        model = SimpleNamespace(get_parameter=lambda name: one_expert)
        for operation in self.converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.name,
                model=model,
                config=None,
                missing_keys=None,
            )
        (built,) = collected.values()
        result: torch.Tensor = built[0] if isinstance(built, list) else built
        return result


def _check_operations(name: str, converter: WeightConverter) -> None:
    is_list = any("*" in pattern for pattern in converter.source_patterns)
    # From where on the first axis is that of the experts.
    is_stacked = not is_list
    for operation in converter.operations:
        match operation:
            case MergeModulelist(dim=0) if not is_stacked:
                is_stacked = True
                continue
            case Concatenate(dim=dim) | Interleave(dim=dim) if is_stacked and dim != 0:
                continue
            case Transpose(dim0=first, dim1=second) if is_stacked and 0 not in (first, second):
                continue
        break
    else:
        if is_stacked and (not is_list or all("*" in pattern for pattern in converter.source_patterns)):
            return
    raise UnsupportedModelError(
        f"transformers makes {name} from {converter.source_patterns} by {converter.operations}, which can't be done one"
        " expert at a time"
    )


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """One part of a layer's experts: of each expert the tensor and its rows there."""

    slices: tuple[tuple[EncodedTensor, range], ...]

    @property
    def first(self) -> EncodedTensor:
        """The tensor that the first expert is in; all are alike."""
        return self.slices[0][0]


@dataclass(frozen=True, kw_only=True)
class EncodedExperts:
    """One layer's experts in a checkpoint that holds their parts by rows: gate and up by neurons, down by outputs."""

    layer: ExpertLayer
    parts: tuple[ExpertRows, ...]

    @property
    def part_names(self) -> tuple[str, ...]:
        """A checkpoint name for each part of a row, for messages."""
        return tuple(part.first.name for part in self.parts)

    @property
    def entries(self) -> list[EncodedTensor]:
        """The tensors of the first expert."""
        return [part.first for part in self.parts]


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """One layer's experts in the checkpoint."""

    layer: ExpertLayer
    in_weight: ExpertWeight
    out_weight: ExpertWeight

    @property
    def part_names(self) -> tuple[str, ...]:
        """A checkpoint name for each part of a row, for messages."""
        first = self.in_weight.entries[0].name
        return (*((first,) * (2 if self.layer.has_gate else 1)), self.out_weight.entries[0].name)

    @property
    def entries(self) -> list[TensorEntry]:
        """All tensors."""
        return [*self.in_weight.entries, *self.out_weight.entries]

    def by_rows(self) -> EncodedExperts | ExpertSource:
        """Return the same by rows where it is encoded.

        Raises:
            UnsupportedModelError: Some of it is, and some is not; or parts do not lie by rows.
        """
        encoded = [isinstance(entry, EncodedTensor) and not entry.is_plain for entry in self.entries]
        if not any(encoded):
            return self
        if not all(encoded):
            plain = self.entries[encoded.index(False)]
            raise UnsupportedModelError(
                f"{plain.path} holds {plain.name} as {plain.dtype}, other parts of the experts of {self.layer.module} are"
                " quantised"
            )
        inner, outer = _rows_of(self.in_weight, self.layer), _rows_of(self.out_weight, self.layer)
        count = self.layer.num_rows
        if not self.layer.has_gate:
            cuts = [slice(None)]
        elif self.layer.is_concatenated:
            cuts = [slice(count), slice(count, None)]
        else:
            cuts = [slice(0, None, 2), slice(1, None, 2)]
        parts = [_slices(self.in_weight, inner[cut]) for cut in cuts] + [_slices(self.out_weight, outer)]
        return EncodedExperts(layer=self.layer, parts=tuple(parts))


_ROW_BITS = 40  # of a row's number; above them the number of the tensor it lies in


def _rows_of(weight: ExpertWeight, layer: ExpertLayer) -> torch.Tensor:
    """Return which row of which tensor each output of an expert is, int64, as transformers' conversion lays them."""
    numbers: dict[str, torch.Tensor] = {}
    for index, (pattern, entries) in enumerate(weight.sources.items()):
        entry = entries[0]
        assert isinstance(entry, EncodedTensor)
        num_rows = entry.num_rows if "*" in pattern else entry.num_rows // weight.shape[0]
        rows = (index << _ROW_BITS) + torch.arange(num_rows)
        lies = (-1, 1) if not entry.is_transposed else (1, -1)
        numbers[pattern] = rows.view(*lies) if "*" in pattern else rows.view(1, *lies)
    built = weight.assemble(numbers)
    if built.shape[2 if layer.is_transposed else 1] != built.numel():
        first = weight.entries[0]
        raise UnsupportedModelError(
            f"{first.path} holds {first.name} quantised along its outputs, where {weight.name} is multiplied along its"
            " inputs: convert a checkpoint that is not quantised"
        )
    return built.flatten()


def _slices(weight: ExpertWeight, numbers: torch.Tensor) -> ExpertRows:
    """Return the rows of every expert, whose numbers are those of the first."""
    steps = numbers.diff()
    step = int(steps[0]) if len(steps) else 1
    if not bool((steps == step).all()) or not 0 < step < 1 << _ROW_BITS:
        raise UnsupportedModelError(f"the rows of {weight.name} lie in {weight.entries[0].path} in no order known here")
    index, first = divmod(int(numbers[0]), 1 << _ROW_BITS)
    pattern, entries = list(weight.sources.items())[index]
    rows = range(first, first + step * len(numbers), step)
    slices: list[tuple[EncodedTensor, range]] = []
    for expert in range(weight.shape[0]):
        entry = entries[expert] if "*" in pattern else entries[0]
        assert isinstance(entry, EncodedTensor)
        start = 0 if "*" in pattern else expert * (entry.num_rows // weight.shape[0])
        slices.append((entry, range(rows.start + start, rows.stop + start, step)))
    return ExpertRows(slices=tuple(slices))


def read_encoded_experts(
    reader: RangeReader, layout: LayerLayout, source: EncodedExperts, pools: LayerPools
) -> Iterator[RowChunk]:
    """Yield the experts of a layer in order, each as one block: as they are encoded, or as values where rows are made."""
    for expert in range(source.layer.num_experts):
        wanted = [part.slices[expert] for part in source.parts]
        read = RowsRead(wanted)
        buffer = pools.rows.take(read.room_bytes)
        found = read.read(reader, buffer)
        if layout.is_by_block:
            parts = [
                encoded if layout.encodings[index] == entry.encoding else entry.values(encoded)
                for index, ((entry, _), encoded) in enumerate(zip(wanted, found, strict=True))
            ]
        else:
            values = [entry.values(encoded) for (entry, _), encoded in zip(wanted, found, strict=True)]
            parts = [*values[:-1], values[-1].t()]
        rows = range(expert * layout.block_rows, (expert + 1) * layout.block_rows)
        yield RowChunk(rows, tuple(parts), ((pools.rows, buffer),))


def read_experts(
    reader: RangeReader, layout: LayerLayout, source: ExpertSource, pools: LayerPools
) -> Iterator[RowChunk]:
    """Yield the experts of a layer in order, each as the rows of one block. Holds a few experts at a time."""
    weights = (source.in_weight, source.out_weight)
    for expert in range(source.layer.num_experts):
        pieces = [(weight, *piece) for weight in weights for piece in weight.slices(expert)]
        buffer = pools.rows.take(sum(room_bytes(num_bytes) for *_, num_bytes in pieces))
        built = [weight.assemble(tensors) for weight, tensors in _read(reader, weights, pieces, buffer)]
        rows = range(expert * layout.block_rows, (expert + 1) * layout.block_rows)
        yield RowChunk(rows, expert_parts(source.layer, built[0][0], built[1][0]), ((pools.rows, buffer),))


def _read(
    reader: RangeReader,
    weights: Sequence[ExpertWeight],
    pieces: list[tuple[ExpertWeight, str, TensorEntry, int, int]],
    buffer: AlignedBuffer,
) -> list[tuple[ExpertWeight, dict[str, torch.Tensor]]]:
    begun = []
    at = 0
    for *_, entry, offset, num_bytes in pieces:
        begun.append(reader.begin(entry.path, offset, num_bytes, buffer, at))
        at += room_bytes(num_bytes)
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in weights]
    for (weight, pattern, *_), read in zip(pieces, begun, strict=True):
        tensors[weights.index(weight)][pattern] = weight.shaped(pattern, read.wait())
    return list(zip(weights, tensors, strict=True))


def expert_parts(layer: ExpertLayer, inner: torch.Tensor, outer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the parts of an expert's rows, each (num_rows, hidden_size), as views of its two weights.

    Args:
        layer: How they lie.
        inner: The weight that the input meets, (outputs, hidden_size), or the other way round where transposed.
        outer: The weight that gives the output, (hidden_size, num_rows), or the other way round where transposed.
    """
    if layer.is_transposed:
        inner, outer = inner.t(), outer.t()
    down = outer.t()
    if not layer.has_gate:
        return inner, down
    if layer.is_concatenated:
        return inner[: layer.num_rows], inner[layer.num_rows :], down
    return inner[0::2], inner[1::2], down
