"""What a conversion will write: which tensors go into rows, which stay resident, in which files, of which sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flashlm._version import __version__
from flashlm.conversion.experts_source import EncodedExperts, ExpertSource, read_encoded_experts, read_experts
from flashlm.conversion.kept import kept_encodings
from flashlm.conversion.layer_file import LayerPart, LayerPools, RowChunk, read_layer
from flashlm.conversion.names import NameMap, tied_pairs
from flashlm.conversion.resident_file import ResidentPlan, ResidentTensor, encoding_of, is_same, pack_dtype
from flashlm.conversion.source import Source
from flashlm.conversion.sources.tensors import EncodedTensor
from flashlm.errors import ConfigError, PackError, UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.pack.manifest import FORMAT_VERSION, MAX_DIMENSION, RESIDENT_NAME
from flashlm.pack.pack_config import num_hidden_layers
from flashlm.pack.units import Kind, Unit
from flashlm.rows.encodings import ENCODINGS, bytes_per_element
from flashlm.rows.layout import ROWS_PER_STEP, LayerLayout, canonical_dtype
from flashlm.rows.quantize import QUANTIZERS
from flashlm.sizes import format_size
from flashlm.storage.ranges import RangeReader
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer, PartSource, build_meta_model
from flashlm.structure.find_units import MIN_LINEAR_BYTES, EmbeddingLayer, FoundUnit, LinearLayer, find_units
from flashlm.structure.unit_layouts import RowWriting, choose_layouts, part_width, streamed_names
from flashlm.transformers_seam import dtype_plan

FILE_NAMES: dict[Kind, str] = {"ffn": "layer", "experts": "experts", "linear": "linear", "embedding": "embedding"}


@dataclass(frozen=True, kw_only=True)
class StreamedFile:
    """A file of rows to be written.

    Attributes:
        name: Its name in `flash/`.
        found: What it holds of the model.
        unit: The same, as sizes.
        part_names: Checkpoint names of the parts of its rows, for messages.
        source_types: Element types or encodings that its weights have there.
        read: Gives its rows in order.
    """

    name: str
    found: FoundUnit
    unit: Unit
    part_names: tuple[str, ...]
    source_types: frozenset[str]
    read: Callable[[RangeReader, LayerPools], Iterator[RowChunk]]

    @property
    def layout(self) -> LayerLayout:
        """Its geometry."""
        return self.unit.layout

    @property
    def is_decoded(self) -> bool:
        """Whether its weights are in another encoding than plain elements in the checkpoint."""
        return any(name in ENCODINGS and not ENCODINGS[name].is_plain for name in self.source_types)


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """A conversion in all its parts, before anything is written.

    Attributes:
        pack: The folder to write.
        source: What is converted.
        model: Its model, on the meta device.
        model_type: The transformers model type.
        num_hidden_layers: Its decoder layers.
        dtype: Element type of the pack.
        quantize: Encoding that rows were asked in; None: in `dtype`.
        streamed: The files of everything that is streamed, in forward order.
        num_column_parts: The most parts of a layer that lie column by column.
        resident: What goes into `flash/resident.safetensors`.
        left_out: Names of checkpoint tensors that the model does not have and transformers ignores.
        fingerprint: Identifies the conversion.
    """

    pack: Path
    source: Source
    model: PreTrainedModel
    model_type: str
    num_hidden_layers: int
    dtype: str
    quantize: str | None
    streamed: tuple[StreamedFile, ...]
    num_column_parts: int
    resident: ResidentPlan
    left_out: tuple[str, ...]
    fingerprint: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What is quantised, and what is left out, a line each."""
        tensors = []
        if self.left_out:
            tensors = [
                f"left out, not part of the model: {len(self.left_out)} tensors that transformers ignores too, first"
                f" {self.left_out[0]}"
            ]
        lines = (*self._kept_lines(), *self._quantised_lines(), *self._decoded_lines())
        return (*lines, *tensors, *self.source.notes, *self.source.small.lines())

    def _kept_lines(self) -> Iterator[str]:
        done = [file for file in self.streamed if self.quantize is None and file.layout.plain is None]
        if done:
            names = sorted({name for file in done for name in file.layout.encodings})
            what = f"{len(done)} of {len(self.streamed)} streamed units"
            yield f"kept as the source has them, in {' and '.join(names)}: {what}"

    def _quantised_lines(self) -> Iterator[str]:
        if self.quantize is None:
            return
        done = [file for file in self.streamed if file.layout.plain is None]
        names = sorted({name for file in done for name in file.source_types})
        tables = [file.found.module for file in self.streamed if isinstance(file.found, EmbeddingLayer)]
        if done:
            what = f"{len(done)} of {len(self.streamed) - len(tables)} streamed units"
            yield f"quantised to {self.quantize} from {' and '.join(names)} by flashlm: {what}"
        if tables:
            yield f"left in {self.dtype}, since a token reads one row of it: {', '.join(tables)}"
        left = [
            file
            for file in self.streamed
            if file.layout.plain is not None and not isinstance(file.found, EmbeddingLayer)
        ]
        if left:
            widths = ", ".join(str(width) for width in sorted({part_width(file.found) for file in left}))
            yield (
                f"left in {self.dtype}, not {self.quantize}: {len(left)} streamed units whose rows of {widths} elements are"
                f" not whole groups, or blocks too large; first {left[0].found.module}"
            )

    def _decoded_lines(self) -> Iterator[str]:
        """Tell what is held in the pack's dtype though the source has fewer bits."""
        streamed = [file for file in self.streamed if file.layout.plain is not None and file.is_decoded]
        if streamed and self.quantize is None:
            yield (
                f"decoded to {self.dtype}, since their rows can't be read as they are: {len(streamed)} streamed units, first"
                f" {streamed[0].found.module}"
            )
        tensors = [each for each in self.resident.tensors if encoding_of(each.source)]
        if tensors:
            size = format_size(sum(each.num_bytes for each in tensors))
            largest = max(tensors, key=lambda each: each.num_bytes).name
            yield f"decoded to {self.dtype}, resident: {len(tensors)} tensors, {size}, most of it {largest}"

    @property
    def file_bytes(self) -> dict[str, int]:
        """Sizes of the large files by name, in the order in which they are written."""
        return {RESIDENT_NAME: self.resident.num_bytes} | {file.name: file.layout.file_bytes for file in self.streamed}


def plan_conversion(
    source: Source,
    target: Path,
    dtype: str | None,
    block_rows: int | None,
    trust_remote_code: bool,
    min_linear_bytes: int = MIN_LINEAR_BYTES,
    quantize: str | None = None,
) -> ConversionPlan:
    """Decide what of a source goes where; writes nothing.

    Args:
        source: The source, opened.
        target: The pack.
        dtype: Element type of the pack; None: what suits the source.
        block_rows: Rows per block of feed-forward layers; None chooses.
        trust_remote_code: Run model code that comes with the source.
        min_linear_bytes: Smaller linear layers stay in DRAM.
        quantize: Encoding that all streamed weights are written in; None: those that a source has are kept.

    Raises:
        ConfigError: A wrong setting.
        UnsupportedModelError: The model's feed-forward layers can't be placed.
        PackError: The source is damaged or incomplete.
    """
    if quantize is not None and quantize not in QUANTIZERS:
        raise ConfigError(f"quantize is {quantize!r}: one of {', '.join(QUANTIZERS)} expected")
    keeps_plain = dtype is None and source.header is not None
    dtype = canonical_dtype(dtype or source.dtype)
    config = source.config
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    found = find_units(model, dtype_bytes=bytes_per_element(dtype), min_linear_bytes=min_linear_bytes)
    experts = tuple(each for each in found if isinstance(each, ExpertLayer))
    names = source.map_names(model, experts)
    entries = names.entries
    for duplicate, original in tied_pairs(model, entries):
        with RangeReader() as reader:
            if is_same(reader, entries[duplicate], entries[original]):
                del entries[duplicate]
    _check_block_rows(block_rows, has_experts=bool(experts))
    types = _ResidentTypes(model, dtype)
    found = tuple(each for each in found if _can_stream(each, names, types))
    parts = {each.module: _layer_parts(model, each, names) for each in found if not isinstance(each, ExpertLayer)}
    kept = {} if quantize else kept_encodings(found, parts, names.experts, keeps_plain=keeps_plain)
    units = choose_layouts(found, RowWriting(dtype=dtype, quantize=quantize, kept=kept), block_rows)
    streamed = tuple(_streamed_files(found, units, parts, names.experts))
    settings = {
        "dtype": dtype,
        "encodings": [[*file.layout.encodings, file.layout.arrangement] for file in streamed],
        "block_rows": [file.layout.block_rows for file in streamed],
        "flashlm": __version__,
        "format": FORMAT_VERSION,
    }
    return ConversionPlan(
        pack=target,
        source=source,
        model=model,
        model_type=config.model_type,
        num_hidden_layers=num_hidden_layers(config),
        dtype=dtype,
        quantize=quantize,
        streamed=streamed,
        num_column_parts=max(
            (sum(part.neuron_axis == 1 for part in each) for each in parts.values()),
            default=0,
        ),
        resident=ResidentPlan(_resident_tensors(found, names, types)),
        left_out=names.left_out,
        fingerprint=source.fingerprint(settings),
    )


def _check_block_rows(block_rows: int | None, *, has_experts: bool) -> None:
    if block_rows is None:
        return
    if has_experts:
        raise ConfigError(
            f"block_rows is {block_rows}: leave it out, a block of a mixture-of-experts model is an expert"
        )
    if block_rows <= 0 or block_rows % ROWS_PER_STEP or block_rows > MAX_DIMENSION:
        raise ConfigError(f"block_rows is {block_rows}: a multiple of {ROWS_PER_STEP} above zero expected")


def _can_stream(found: FoundUnit, names: NameMap, types: _ResidentTypes) -> bool:
    """Return whether a matrix is one tensor of the checkpoint, and of the pack's dtype in the model."""
    if not isinstance(found, LinearLayer | EmbeddingLayer):
        return True
    there = [name for name in streamed_names(found) if name in names.entries]
    if len(there) != 1:  # made of others, or two that the config ties and that differ
        return False
    entry = names.entries[there[0]]
    if isinstance(entry, EncodedTensor) and entry.is_transposed:
        return False
    return entry.dtype.is_floating_point and types.of(there[0], entry.dtype) == types.wanted


def _streamed_files(
    found: tuple[FoundUnit, ...],
    units: tuple[Unit, ...],
    parts: dict[str, tuple[LayerPart, ...]],
    experts: Sequence[ExpertSource | EncodedExperts],
) -> Iterator[StreamedFile]:
    sources = iter(experts)
    counts = dict.fromkeys(FILE_NAMES, 0)
    for each, unit in zip(found, units, strict=True):
        name = f"{FILE_NAMES[unit.kind]}-{counts[unit.kind]:05d}.rows"
        counts[unit.kind] += 1
        read: Callable[[RangeReader, LayerPools], Iterator[RowChunk]]
        entries: Sequence[TensorEntry]
        if isinstance(each, ExpertLayer):
            source = next(sources)
            part_names, entries = source.part_names, source.entries
            read = partial(_read_experts, layout=unit.layout, source=source)
        else:
            entries = [part.entry for part in parts[each.module]]
            part_names = tuple(entry.name for entry in entries)
            read = partial(_read_layer, layout=unit.layout, parts=parts[each.module])
        types = frozenset(encoding_of(entry) or str(entry.dtype).removeprefix("torch.") for entry in entries)
        yield StreamedFile(name=name, found=each, unit=unit, part_names=part_names, source_types=types, read=read)


def _read_experts(
    reader: RangeReader, pools: LayerPools, layout: LayerLayout, source: ExpertSource | EncodedExperts
) -> Iterator[RowChunk]:
    if isinstance(source, EncodedExperts):
        return read_encoded_experts(reader, layout, source, pools)
    return read_experts(reader, layout, source, pools)


def _read_layer(
    reader: RangeReader, pools: LayerPools, layout: LayerLayout, parts: tuple[LayerPart, ...]
) -> Iterator[RowChunk]:
    return read_layer(reader, layout, parts, pools)


def _layer_parts(
    model: PreTrainedModel, layer: FfnLayer | LinearLayer | EmbeddingLayer, names: NameMap
) -> tuple[LayerPart, ...]:
    if isinstance(layer, LinearLayer | EmbeddingLayer):
        (name,) = (name for name in streamed_names(layer) if name in names.entries)
        return (LayerPart(PartSource(name=name), names.entries[name]),)
    for source in (*layer.parts, *layer.biases.values()):
        if source.name in names.made:
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} is not supported: transformers computes {source.name} from"
                f" {names.made[source.name].part_name} on loading, which is more than a new name"
            )
    parts = tuple(LayerPart(source, names.entries[source.name]) for source in layer.parts)
    for part in parts:
        if not part.entry.dtype.is_floating_point:
            raise PackError(f"{part.entry.path} holds {part.entry.name} as {part.entry.dtype}: floating point expected")
    return parts


class _ResidentTypes:
    """The types of a model's weights in a pack: transformers keeps some in fp32, some routers' corrections for one."""

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self.wanted: torch.dtype = getattr(torch, dtype)
        kept = dtype_plan(model, self.wanted)
        self._keeps = re.compile("|".join(pattern.replace("*", ".*") for pattern in kept)) if kept else None

    def of(self, name: str, source: torch.dtype) -> torch.dtype:
        """Return the type of weight `name`, whose type in the checkpoint is `source`."""
        keeps = self._keeps is not None and self._keeps.search(name)
        return pack_dtype(source, torch.float32 if keeps else self.wanted)


def _resident_tensors(found: tuple[FoundUnit, ...], names: NameMap, types: _ResidentTypes) -> list[ResidentTensor]:
    """Return every tensor that is not streamed, and the biases of feed-forward layers under the pack's names."""
    streamed = {name for each in found for name in streamed_names(each)}
    tensors = [
        ResidentTensor(name=name, source=entry, shape=entry.shape, dtype=types.of(name, entry.dtype))
        for name, entry in names.entries.items()
        if name not in streamed
    ]
    tensors += [
        ResidentTensor(
            name=name, source=each.group.entries[0], shape=each.shape, dtype=types.of(name, each.dtype), made=each
        )
        for name, each in names.made.items()
    ]
    tensors.sort(key=lambda tensor: tensor.name)
    for layer in (each for each in found if isinstance(each, FfnLayer)):
        for name, source in layer.biases.items():
            size = layer.hidden_size if name.endswith(".down_bias") else layer.num_rows
            tensors.append(
                ResidentTensor(
                    name=name,
                    source=names.entries[source.name],
                    first=source.first_neuron,
                    shape=(size,),
                    dtype=types.wanted,
                )
            )
    return tensors
