"""Whether a pack's manifest says of the model what the model says of itself: which modules are streamed, and as what.

The search that conversion found the feed-forward layers (or experts) with runs again on the model, without weights. A
manifest that names another activation, swaps two layers or takes a norm for a part of an FFN is found out, whoever
signed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flashlm.errors import UnsupportedModelError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.pack.manifest import Manifest, UnitEntry
from flashlm.rows.layout import MATRIX, ffn_parts
from flashlm.structure.asked import misfit
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.find_units import EmbeddingLayer, FoundUnit, LinearLayer, find_units


def check_structure(model: PreTrainedModel, manifest: Manifest, pack: Path) -> None:
    """Hold the manifest of `pack` against `model`, which may be on the meta device and must still have its own layers.

    Raises:
        PackError: They differ.
        ConfigError: They do since the model was asked for as another class, or with other settings.
    """
    problem = next(structure_problems(model, manifest), None)
    if problem is not None:
        raise misfit(problem, model, pack)


def structure_problems(model: PreTrainedModel, manifest: Manifest) -> Iterator[str]:
    """Yield one line for each thing in which the manifest differs from the model."""
    kind = type(model).__name__
    try:
        found = _found(model)
    except UnsupportedModelError as error:
        yield f"the pack does not fit {kind}, in which flashlm finds nothing to stream ({error})"
        return
    stated = [_stated(entry) for entry in manifest.units]
    modules = {entry["module"] for entry in stated}
    # Small linear layers and embeddings are streamed or not as the conversion was asked to.
    found = [entry for entry in found if entry["kind"] in ("ffn", "experts") or entry["module"] in modules]
    if len(found) != len(stated):
        yield f"the pack streams {len(stated)} units, {kind} has {len(found)}"
        return
    for index, (wanted, actual) in enumerate(zip(found, stated, strict=True)):
        if wanted["kind"] != actual["kind"]:
            yield f"the manifest says that unit {index} is of kind {actual['kind']}, {kind} has {wanted['kind']}"
            continue
        for what, value in wanted.items():
            if actual[what] != value:
                yield f"the manifest says that {what} of streamed unit {index} is {actual[what]!r}, {kind} has {value!r}"


def shape_problems(model: PreTrainedModel, tensors: dict[str, TensorEntry]) -> list[str]:
    """Return one line for each resident tensor that is not of the shape that the model wants."""
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    return [
        f"{entry.path}: {name} has shape {entry.shape}, config.json wants {wanted[name]}"
        for name, entry in tensors.items()
        if name in wanted and entry.shape != wanted[name]
    ]


def _found(model: PreTrainedModel) -> list[dict[str, Any]]:
    # transformers builds models with another default device and dtype; the search computes a little, as at conversion.
    before, was_training = torch.get_default_dtype(), model.training
    torch.set_default_dtype(torch.float32)
    model.eval()  # dropout would be taken for something else than the formula
    try:
        with torch.device("cpu"):
            found = find_units(model, dtype_bytes=1, min_linear_bytes=0)
    finally:
        model.train(was_training)
        torch.set_default_dtype(before)
    return [_described(each) for each in found]


def _described(found: FoundUnit) -> dict[str, Any]:
    """Return what a manifest should say of a unit, by the fields of its entry."""
    if isinstance(found, LinearLayer):
        return {
            "kind": "linear",
            "module": found.module,
            "num_rows": found.num_outputs,
            "hidden_size": found.num_inputs,
            "parts": MATRIX,
            "biases": MATRIX if found.has_bias else (),
            "table": found.table,
        }
    if isinstance(found, EmbeddingLayer):
        sizes = {"num_rows": found.num_rows, "hidden_size": found.hidden_size}
        return {"kind": "embedding", "module": found.module, **sizes, "parts": MATRIX}
    shared = {
        "module": found.module,
        "hidden_size": found.hidden_size,
        "parts": ffn_parts(has_gate=found.has_gate),
        "activation": found.activation,
    }
    if isinstance(found, ExpertLayer):
        num_rows = found.num_experts * found.num_rows
        experts = {"num_rows": num_rows, "block_rows": found.num_rows, "num_active": found.num_active}
        return {"kind": "experts", **shared, **experts}
    return {
        "kind": "ffn",
        **shared,
        "identities": found.identities,
        "num_rows": found.num_rows,
        "biases": found.bias_parts,
    }


def _stated(entry: UnitEntry) -> dict[str, Any]:
    return entry.model_dump(exclude={"checksums", "order_checksum", "file"})
