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
from flashlm.pack.manifest import Manifest
from flashlm.structure.asked import misfit
from flashlm.structure.experts import find_expert_layers
from flashlm.structure.families import find_ffn_layers


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
    stated = _stated(manifest)
    if len(found) != len(stated):
        yield f"the pack streams {len(stated)} layers, {kind} has {len(found)}"
        return
    for layer, (wanted, actual) in enumerate(zip(found, stated, strict=True)):
        for what, value in wanted.items():
            if actual[what] != value:
                yield f"the manifest says that {what} of streamed layer {layer} is {actual[what]!r}, {kind} has {value!r}"


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
            experts = find_expert_layers(model)
            layers = () if experts else find_ffn_layers(model)
    finally:
        model.train(was_training)
        torch.set_default_dtype(before)
    if experts:
        return [
            {
                "module": each.module,
                "num_experts": each.num_experts,
                "num_active": each.num_active,
                "num_rows": each.num_rows,
                "hidden_size": each.hidden_size,
                "has_gate": each.has_gate,
                "activation": each.activation,
            }
            for each in experts
        ]
    return [
        {
            "module": each.module,
            "identities": each.identities,
            "num_rows": each.num_rows,
            "hidden_size": each.hidden_size,
            "has_gate": each.has_gate,
            "activation": each.activation,
            "has_up_bias": each.up_bias is not None,
            "has_gate_bias": each.gate_bias is not None,
            "has_down_bias": each.down_bias is not None,
        }
        for each in layers
    ]


def _stated(manifest: Manifest) -> list[dict[str, Any]]:
    shared = {
        "hidden_size": manifest.hidden_size,
        "has_gate": manifest.has_gate,
        "activation": manifest.activation,
    }
    layers = [entry.model_dump(exclude={"checksums", "order_checksum", "file"}) | shared for entry in manifest.layers]
    experts = [
        entry.model_dump(exclude={"checksums", "file"}) | shared | {"num_rows": manifest.block_rows}
        for entry in manifest.experts
    ]
    return [*layers, *experts]
