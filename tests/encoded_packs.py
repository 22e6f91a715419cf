"""Packs whose units keep the encodings of a source, written from random bytes, and the model of what the bytes mean."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import AutoModelForCausalLM, PreTrainedModel

from flashlm.conversion.convert import convert
from flashlm.pack.manifest import UnitEntry, read_manifest, unit_path, write_manifest
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import LayerLayout
from flashlm.structure.find_units import find_units
from flashlm.structure.unit_layouts import RowWriting, choose_layouts
from tests.models import save_checkpoint
from tests.rows.test_encodings import FP16_PLACES, reference

SPREAD = 0.05  # standard deviation of the weights
Kept = Mapping[str, tuple[str, ...]]


def random_matrix(name: str, num_rows: int, width: int, random: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """Return the rows of a matrix in an encoding, uint8 (num_rows, row bytes), and what they mean, fp32."""
    encoding = ENCODINGS[name]
    if encoding.dtype is not None:
        values = torch.from_numpy(random.standard_normal((num_rows, width)) * SPREAD).to(encoding.dtype)
        return values.view(torch.uint8).numpy(), values.float()
    groups = random.integers(
        0, 256, (num_rows * width // encoding.group_elements, encoding.group_bytes), dtype=np.uint8
    )
    scales = random.choice([-1.0, 1.0], (len(groups), 2)) * random.uniform(0.5, 1.5, (len(groups), 2))
    if name == "mxfp4":
        groups[:, 0] = random.integers(118, 124, len(groups))
    if name == "fp8_block":
        groups[:, 4:][groups[:, 4:] & 127 == 127] = 3
    factor = 1.0
    for _ in range(2):  # values are linear in all scales of a group
        for index, place in enumerate(FP16_PLACES.get(name, ())):
            groups[:, place : place + 2] = (factor * scales[:, index, None]).astype(np.float16).view(np.uint8)
        if name == "fp8_block":
            groups[:, :4] = (factor * scales[:, :1]).astype(np.float32).view(np.uint8)
        values = reference(name, groups)
        factor = SPREAD / float(values.std())
    return groups.reshape(num_rows, -1), torch.from_numpy(values).view(num_rows, width)


def save_encoded_pack(
    folder: Path, family: str, kept: Kept, *, block_rows: int | None = None, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Write a tiny checkpoint of `family` to `folder / "source"`, and as a pack to `folder / "pack"` with random weights.

    Args:
        folder: Where.
        family: As in `tests.models`.
        kept: The encodings of units by module, as `RowWriting` takes them; "ffn", "experts" and "linear" stand for the
            others of a kind.
        block_rows: Of feed-forward layers.
        seed: Of the weights.
        overrides: Of the config.

    Returns:
        The model in fp32 with the weights that the pack has.
    """
    save_checkpoint(folder / "source", family, **overrides)
    convert(folder / "source", folder / "plain", dtype="float32", min_linear_bytes=0)
    shutil.copytree(folder / "plain", folder / "pack")
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    manifest = read_manifest(folder / "pack")
    found = find_units(model, dtype_bytes=4, min_linear_bytes=0)
    by_module = {
        each.module: kept.get(each.module) or kept[entry.kind]
        for each, entry in zip(found, manifest.units, strict=True)
        if each.module in kept or entry.kind in kept
    }
    units = choose_layouts(found, RowWriting(dtype="float32", kept=by_module), block_rows)
    random, entries = np.random.default_rng(seed), []
    for entry, unit in zip(manifest.units, units, strict=True):
        content, values = random_unit(unit.layout, random)
        path = unit_path(folder / "pack", entry)
        path.write_bytes(content)
        entries.append(_with_layout(entry, unit.layout, content, unit.num_active))
        with torch.no_grad():
            _set_weights(model, entry, values)
    write_manifest(folder / "pack", manifest.with_units(tuple(entries)))
    return model


def random_unit(layout: LayerLayout, random: np.random.Generator) -> tuple[bytes, list[torch.Tensor]]:
    """Return the file of a unit, and its parts: gate and up (rows, hidden), down (hidden, rows), or the matrix."""
    content = np.zeros(layout.file_bytes, dtype=np.uint8)
    values: list[list[torch.Tensor]] = [[] for _ in layout.parts]
    for block in range(layout.num_blocks):
        rows, start = len(layout.rows_of(block)), layout.offset_of(block)
        if layout.is_by_block:
            for index, part in enumerate(layout.block_parts(rows)):
                raw, meant = random_matrix(part.encoding.name, part.num_rows, part.width, random)
                values[index].append(meant)
                at = start + part.offset_bytes
                content[at : at + raw.size] = raw.ravel()
            continue
        stored = content[start : start + rows * layout.row_stride_bytes].reshape(rows, layout.row_stride_bytes)
        for index, placed in enumerate(layout.placed):
            raw, meant = random_matrix(placed.encoding.name, rows, layout.hidden_size, random)
            values[index].append(meant.t() if layout.parts[index] == "down" else meant)
            stored[:, placed.offset_bytes : placed.offset_bytes + placed.num_bytes] = raw
    joined = [torch.cat(some, dim=int(layout.parts[index] == "down")) for index, some in enumerate(values)]
    return content.tobytes(), joined


def _with_layout(entry: UnitEntry, layout: LayerLayout, content: bytes, num_active: int) -> UnitEntry:
    spans = [(layout.offset_of(block), layout.read_bytes(block)) for block in range(layout.num_blocks)]
    fields = {name: getattr(entry, name) for name in UnitEntry.model_fields}
    return UnitEntry(
        **fields
        | {
            "encodings": layout.encodings,
            "arrangement": layout.arrangement,
            "block_rows": layout.block_rows,
            "row_stride_bytes": None if layout.is_by_block else layout.row_stride_bytes,
            "block_stride_bytes": layout.block_stride_bytes,
            "num_active": num_active,
            "checksums": tuple(xxhash.xxh3_64_hexdigest(content[at : at + size]) for at, size in spans),
        }
    )


def _set_weights(model: PreTrainedModel, entry: UnitEntry, values: list[torch.Tensor]) -> None:
    module: Any = model.get_submodule(entry.module)
    if entry.kind in ("linear", "embedding"):
        module.weight.copy_(values[0])
    elif entry.kind == "experts":
        num_experts, hidden = entry.num_experts, entry.hidden_size
        gate, up = (each.view(num_experts, entry.block_rows, hidden) for each in values[:2])
        down = values[2].view(hidden, num_experts, entry.block_rows).transpose(0, 1)
        if module.is_concatenated:
            module.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        else:
            module.gate_up_proj.copy_(torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2))
        module.down_proj.copy_(down.transpose(1, 2) if module.is_transposed else down)
    elif model.config.model_type == "opt":
        layer: Any = model.get_submodule(entry.module.rpartition(".")[0])
        layer.fc1.weight.copy_(values[0])
        layer.fc2.weight.copy_(values[1])
    else:
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), values, strict=True):
            getattr(module, name).weight.copy_(weight)
