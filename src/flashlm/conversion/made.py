"""Resident weights that transformers makes of several checkpoint tensors on loading, or of a part of one.

Some families keep three convolutions where the model has one, or one matrix where it has three. transformers' own
conversion does the work here too. One that only puts tensors one after the other is read in their order, at any size;
any other is done in memory, for weights up to `MAX_BYTES`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.pack.direct_file import AlignedBuffer, DirectReader, room_bytes
from flashlm.transformers_seam import Concatenate, WeightConverter, dot_natural_key

MAX_BYTES = 1 << 30


@dataclass(kw_only=True, eq=False)
class MakingGroup:
    """Checkpoint tensors that one conversion takes together.

    Attributes:
        name: State-dict name of the first weight that comes of them.
        converter: transformers' conversion.
        sources: The tensors by the converter's source pattern.
    """

    name: str
    converter: WeightConverter
    sources: dict[str, list[TensorEntry]] = field(default_factory=dict)

    def add(self, pattern: str, entry: TensorEntry) -> None:
        """Note that `entry` is a part of it."""
        self.sources.setdefault(pattern, []).append(entry)

    @property
    def entries(self) -> list[TensorEntry]:
        """All tensors, in the order in which the conversion takes them."""
        found = (self.sources.get(pattern, []) for pattern in self.converter.source_patterns)
        return [entry for entries in found for entry in sorted(entries, key=lambda each: dot_natural_key(each.name))]

    def targets(self, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Iterator[MadeTensor]:
        """Yield the weights that come of them, after a run without data.

        Raises:
            PackError: A tensor is missing, or what comes has not the shape that the model wants.
            UnsupportedModelError: The conversion can't be run here.
        """
        missing = [pattern for pattern in self.converter.source_patterns if pattern not in self.sources]
        if missing:
            raise PackError(f"{self.name} is made of {self.converter.source_patterns}, {missing[0]} is missing")
        floating = {entry.dtype.is_floating_point for entry in self.entries}
        if floating != {True}:
            raise PackError(f"{self.name} is made of {self.entries[0].name}, which is no floating-point tensor")
        blanks = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for e in self.entries}
        found = self.convert(model, blanks)
        if self.name not in found:
            raise UnsupportedModelError(f"{self._what()} gives {', '.join(found)} and not {self.name}")
        for name, tensor in found.items():
            if name not in state or tensor.shape != state[name].shape:
                wanted = list(state[name].shape) if name in state else "no such weight"
                raise PackError(
                    f"{self.entries[0].path}: {self.entries[0].name} becomes {name} of shape {list(tensor.shape)},"
                    f" the model's config wants {wanted}"
                )
        made = [
            MadeTensor(name=name, group=self, model=model, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in found.items()
        ]
        num_bytes = sum(entry.num_bytes for entry in self.entries)
        if num_bytes > MAX_BYTES and not made[0].is_joined:
            raise UnsupportedModelError(f"{self._what()} takes {num_bytes} bytes at once, at most {MAX_BYTES} are")
        yield from made

    def convert(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights made of `tensors` (by checkpoint name), by state-dict name."""
        converter = copy.deepcopy(self.converter)
        for pattern in self.converter.source_patterns:
            for entry in sorted(self.sources[pattern], key=lambda each: dot_natural_key(each.name)):
                tensor = tensors[entry.name]
                converter.add_tensor(self.name, entry.name, pattern, lambda tensor=tensor: tensor)
        try:
            with torch.no_grad():
                found = converter.convert(self.name, model=model, config=model.config)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            NotImplementedError,
        ) as error:
            raise UnsupportedModelError(f"{self._what()} can't be done here: {error}") from error
        return {name: each[0] if isinstance(each, list) else each for name, each in found.items()}

    def _what(self) -> str:
        operations = [type(operation).__name__ for operation in self.converter.operations]
        return f"transformers makes {self.name} of {self.converter.source_patterns} by {operations}, which"


@dataclass(kw_only=True, eq=False)
class MadeTensor:
    """One weight of a group.

    Attributes:
        name: State-dict name.
        group: What it is made of.
        model: The model, on the meta device; some conversions ask it for shapes.
        shape: Its shape.
        dtype: Its element type as made, before the pack's.
    """

    name: str
    group: MakingGroup
    model: PreTrainedModel
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def part_name(self) -> str:
        """A checkpoint name for messages."""
        return self.group.entries[0].name

    @property
    def is_joined(self) -> bool:
        """Whether its tensors simply follow each other."""
        same = {entry.dtype for entry in self.group.entries} == {self.dtype}
        match self.group.converter.operations:
            case [Concatenate(dim=0)]:
                return same
        return False

    def build(self, reader: DirectReader) -> torch.Tensor:
        """Return the weight, flat; reads all that it is made of."""
        tensors: dict[str, torch.Tensor] = {}
        for entry in self.group.entries:
            buffer = AlignedBuffer(room_bytes(entry.num_bytes))
            raw = reader.read(entry.path, entry.offset, entry.num_bytes, buffer)
            aligned = raw if raw.storage_offset() % entry.dtype.itemsize == 0 else raw.clone()
            tensors[entry.name] = aligned.view(entry.dtype).view(entry.shape)
        return self.group.convert(self.model, tensors)[self.name].contiguous().flatten()
