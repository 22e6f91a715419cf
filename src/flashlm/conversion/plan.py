"""What a conversion will write: which tensors go into rows, which stay resident, in which files, of which sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flashlm._version import __version__
from flashlm.conversion.experts_source import ExpertSource, read_experts
from flashlm.conversion.layer_file import LayerPart, LayerPools, RowChunk, read_layer
from flashlm.conversion.names import NameMap, map_names, tied_pairs
from flashlm.conversion.resident_file import ResidentPlan, ResidentTensor, is_same, pack_dtype
from flashlm.conversion.small_files import SmallFiles, choose_from_folder
from flashlm.conversion.source import fingerprint
from flashlm.errors import ConfigError, PackError, UnsupportedModelError
from flashlm.pack.checkpoint import Checkpoint, open_checkpoint
from flashlm.pack.direct_file import DirectReader
from flashlm.pack.manifest import FORMAT_VERSION, MAX_DIMENSION, RESIDENT_NAME
from flashlm.pack.pack_config import num_hidden_layers
from flashlm.rows.layout import ROWS_PER_STEP, LayerLayout, choose_block_rows
from flashlm.structure.experts import ExpertLayer, find_expert_layers
from flashlm.structure.families import FfnLayer, build_meta_model, find_ffn_layers
from flashlm.structure.model_config import load_config
from flashlm.transformers_seam import dtype_plan


@dataclass(frozen=True, kw_only=True)
class StreamedFile:
    """A file of rows to be written.

    Attributes:
        name: Its name in `flash/`.
        layout: Its geometry.
        part_names: Checkpoint names of the parts of its rows, for messages.
        read: Gives its rows in order.
    """

    name: str
    layout: LayerLayout
    part_names: tuple[str, ...]
    read: Callable[[DirectReader, LayerPools], Iterator[RowChunk]]


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """A conversion in all its parts, before anything is written.

    Attributes:
        pack: The folder to write.
        source_name: The source as it was given.
        checkpoint: The source's weight files.
        model_type: The transformers model type.
        num_hidden_layers: Its decoder layers.
        dtype: Element type of the pack.
        block_rows: Rows per block.
        layers: The feed-forward layers, in forward order; none where there are experts.
        experts: The layers of experts, in forward order.
        streamed: The files of all of these.
        num_column_parts: The most parts of a layer that lie column by column.
        resident: What goes into `flash/resident.safetensors`.
        left_out: Names of checkpoint tensors that the model does not have and transformers ignores.
        small: Small files to copy, and what is left out.
        fingerprint: Identifies the conversion.
    """

    pack: Path
    source_name: str
    checkpoint: Checkpoint
    model_type: str
    num_hidden_layers: int
    dtype: str
    block_rows: int
    layers: tuple[FfnLayer, ...]
    experts: tuple[ExpertLayer, ...]
    streamed: tuple[StreamedFile, ...]
    num_column_parts: int
    resident: ResidentPlan
    left_out: tuple[str, ...]
    small: SmallFiles
    fingerprint: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out, a line each."""
        tensors = []
        if self.left_out:
            tensors = [
                f"left out, not part of the model: {len(self.left_out)} tensors that transformers ignores too, first"
                f" {self.left_out[0]}"
            ]
        return (*tensors, *self.small.lines())

    @property
    def file_bytes(self) -> dict[str, int]:
        """Sizes of the large files by name, in the order in which they are written."""
        return {RESIDENT_NAME: self.resident.num_bytes} | {file.name: file.layout.file_bytes for file in self.streamed}


def layer_file_name(index: int) -> str:
    """Return the name of a layer's file in `flash/`."""
    return f"layer-{index:05d}.rows"


def experts_file_name(index: int) -> str:
    """Return the name of the file of a layer's experts in `flash/`."""
    return f"experts-{index:05d}.rows"


def plan_conversion(
    source_name: str, folder: Path, target: Path, dtype: str, block_rows: int | None, trust_remote_code: bool
) -> ConversionPlan:
    """Read the source's headers and config and decide what goes where; writes nothing.

    Raises:
        ConfigError: A wrong setting.
        UnsupportedModelError: The model's feed-forward layers can't be placed.
        PackError: The source is damaged or incomplete.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    experts = find_expert_layers(model)
    layers = () if experts else find_ffn_layers(model)
    names = map_names(model, checkpoint, experts, is_text_part=type(model.config) is not type(config))
    entries, sources = names.entries, names.experts
    for duplicate, original in tied_pairs(model, entries):
        with DirectReader() as reader:
            if is_same(reader, entries[duplicate], entries[original]):
                del entries[duplicate]
    if experts and block_rows is not None:
        raise ConfigError(
            f"block_rows is {block_rows}: leave it out, a block of a mixture-of-experts model is an expert"
        )
    rows = experts[0].num_rows if experts else _block_rows(layers, dtype, block_rows)
    parts = tuple(_layer_parts(model, layer, names) for layer in layers)
    small = choose_from_folder(folder, checkpoint.files, with_code=trust_remote_code)
    settings = {"dtype": dtype, "block_rows": rows, "flashlm": __version__, "format": FORMAT_VERSION}
    return ConversionPlan(
        pack=target,
        source_name=source_name,
        checkpoint=checkpoint,
        model_type=config.model_type,
        num_hidden_layers=num_hidden_layers(config),
        dtype=dtype,
        block_rows=rows,
        layers=layers,
        experts=experts,
        streamed=(*_layer_files(layers, parts, dtype, rows), *_expert_files(sources, dtype)),
        num_column_parts=max((sum(part.source.neuron_axis == 1 for part in each) for each in parts), default=0),
        resident=ResidentPlan(_resident_tensors(model, layers, names, dtype)),
        left_out=names.left_out,
        small=small,
        fingerprint=fingerprint(checkpoint, small.kept, settings),
    )


def _layer_files(
    layers: tuple[FfnLayer, ...], parts: tuple[tuple[LayerPart, ...], ...], dtype: str, block_rows: int
) -> Iterator[StreamedFile]:
    for index, (layer, found) in enumerate(zip(layers, parts, strict=True)):
        layout = _layout(layer, dtype, block_rows)

        def read(
            reader: DirectReader, pools: LayerPools, layout: LayerLayout, found: tuple[LayerPart, ...]
        ) -> Iterator[RowChunk]:
            return read_layer(reader, layout, found, pools)

        names = tuple(part.entry.name for part in found)
        yield StreamedFile(
            name=layer_file_name(index), layout=layout, part_names=names, read=partial(read, layout=layout, found=found)
        )


def _expert_files(sources: tuple[ExpertSource, ...], dtype: str) -> Iterator[StreamedFile]:
    for index, source in enumerate(sources):
        layer = source.layer
        layout = LayerLayout(
            hidden_size=layer.hidden_size,
            num_rows=layer.num_experts * layer.num_rows,
            has_gate=layer.has_gate,
            dtype=dtype,
            block_rows=layer.num_rows,
        )

        def read(
            reader: DirectReader, pools: LayerPools, layout: LayerLayout, source: ExpertSource
        ) -> Iterator[RowChunk]:
            return read_experts(reader, layout, source, pools)

        yield StreamedFile(
            name=experts_file_name(index),
            layout=layout,
            part_names=source.part_names,
            read=partial(read, layout=layout, source=source),
        )


def _block_rows(layers: tuple[FfnLayer, ...], dtype: str, wanted: int | None) -> int:
    if wanted is not None:
        if wanted <= 0 or wanted % ROWS_PER_STEP or wanted > MAX_DIMENSION:
            raise ConfigError(f"block_rows is {wanted}: a multiple of {ROWS_PER_STEP} above zero expected")
        return wanted
    largest = max(layers, key=lambda layer: layer.num_rows)
    return choose_block_rows(
        hidden_size=largest.hidden_size, num_rows=largest.num_rows, has_gate=largest.has_gate, dtype=dtype
    )


def _layout(layer: FfnLayer, dtype: str, block_rows: int) -> LayerLayout:
    return LayerLayout(
        hidden_size=layer.hidden_size,
        num_rows=layer.num_rows,
        has_gate=layer.has_gate,
        dtype=dtype,
        block_rows=block_rows,
    )


def _layer_parts(model: PreTrainedModel, layer: FfnLayer, names: NameMap) -> tuple[LayerPart, ...]:
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


def _resident_tensors(
    model: PreTrainedModel, layers: tuple[FfnLayer, ...], names: NameMap, dtype: str
) -> list[ResidentTensor]:
    """Return every tensor that is not streamed, and the biases of the streamed layers under the pack's names."""
    wanted: torch.dtype = getattr(torch, dtype)
    # transformers keeps some weights in fp32 whatever is asked, the corrections of some routers among them.
    kept = dtype_plan(model, wanted)
    keeps = re.compile("|".join(pattern.replace("*", ".*") for pattern in kept)) if kept else None
    streamed = {source.name for layer in layers for source in (*layer.parts, *layer.biases.values())}

    def target(name: str, source: torch.dtype) -> torch.dtype:
        return pack_dtype(source, torch.float32 if keeps is not None and keeps.search(name) else wanted)

    tensors = [
        ResidentTensor(name=name, source=entry, shape=entry.shape, dtype=target(name, entry.dtype))
        for name, entry in names.entries.items()
        if name not in streamed
    ]
    tensors += [
        ResidentTensor(
            name=name, source=each.group.entries[0], shape=each.shape, dtype=target(name, each.dtype), made=each
        )
        for name, each in names.made.items()
    ]
    tensors.sort(key=lambda tensor: tensor.name)
    for layer in layers:
        for name, source in layer.biases.items():
            size = layer.hidden_size if name.endswith(".down_bias") else layer.num_rows
            tensors.append(
                ResidentTensor(
                    name=name, source=names.entries[source.name], first=source.first_neuron, shape=(size,), dtype=wanted
                )
            )
    return tensors
