"""Which checkpoint tensor feeds which entry of the model's state dict, by transformers' own renaming rules.

Hub files may lack the base model's prefix or carry one too many, leave tied weights out or store them twice, and keep
buffers of older versions. Renamings that transformers applies on load are applied; one that computes (splits, merges,
permutes) is refused by name, unless it makes experts (`experts_source`), as is every tensor that the model does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set

import torch
from transformers import PreTrainedModel

from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.checkpoint import Checkpoint, TensorEntry
from flashlm.pack.experts import ExpertLayer
from flashlm.pack.experts_source import ExpertSource, ExpertWeight
from flashlm.transformers_seam import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    ignored_patterns,
    rename_source_key,
)

# Buffers that older transformers versions saved and newer ones compute.
_LEGACY_BUFFERS = re.compile(
    r"(\.attn\.bias|\.attn\.masked_bias|\.attn\.attention\.(masked_)?bias|\.attention\.(masked_)?bias"
    r"|\.attention\.rotary_emb\.\w+|rotary_emb\.inv_freq|(^|\.)position_ids|\.embed_positions"
    r"|embed_positions\.weights|\.attn\.causal_mask)$"
)


def map_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return the checkpoint's tensors by their names in `model`'s state dict.

    Raises:
        PackError: A parameter is missing, has another shape, or a tensor has no place in the model.
        UnsupportedModelError: A tensor needs a conversion that is more than a new name.
    """
    return map_with_experts(model, checkpoint, ())[0]


def map_with_experts(
    model: PreTrainedModel, checkpoint: Checkpoint, layers: Sequence[ExpertLayer]
) -> tuple[dict[str, TensorEntry], tuple[ExpertSource, ...]]:
    """Return what `map_names` does for all but the weights of `layers`, and where in the checkpoint those are.

    Raises:
        PackError, UnsupportedModelError: As `map_names`.
    """
    state = model.state_dict()
    experts = {
        name: ExpertWeight(name=name, shape=tuple(state[name].shape))
        for layer in layers
        for name in (layer.in_weight, layer.out_weight)
    }
    mapped = _renamed(model, checkpoint, state, experts)
    _check_missing(model, mapped.keys() | experts.keys(), checkpoint)
    for name, entry in mapped.items():
        if tuple(state[name].shape) != entry.shape:
            raise PackError(
                f"{entry.path} holds {entry.name} with shape {list(entry.shape)},"
                f" the model's config wants {list(state[name].shape)}"
            )
    for weight in experts.values():
        weight.check()
    return mapped, tuple(
        ExpertSource(layer=layer, in_weight=experts[layer.in_weight], out_weight=experts[layer.out_weight])
        for layer in layers
    )


def _renamed(
    model: PreTrainedModel, checkpoint: Checkpoint, state: dict[str, torch.Tensor], experts: dict[str, ExpertWeight]
) -> dict[str, TensorEntry]:
    """Return the tensors that need no more than a new name; those of experts are added to `experts`."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    mapped: dict[str, TensorEntry] = {}
    unknown: list[str] = []
    for key, entry in checkpoint.tensors.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        if name in experts:
            experts[name].add(pattern, converter, entry)
            continue
        if converter is not None:
            raise UnsupportedModelError(
                f"model type {model.config.model_type!r} is not supported: transformers converts {key} by"
                f" {converter!r} on loading, which is more than a new name"
            )
        if name in mapped:
            raise PackError(f"{checkpoint.folder} holds {name} twice: as {mapped[name].name} and as {key}")
        if name in state:
            mapped[name] = entry
        elif not _is_ignored(model, key, name):
            unknown.append(key)
    if unknown:
        raise PackError(
            f"{checkpoint.folder} holds {len(unknown)} tensors that {type(model).__name__} does not know,"
            f" first {', '.join(sorted(unknown)[:3])}"
        )
    return mapped


def _is_ignored(model: PreTrainedModel, key: str, name: str) -> bool:
    patterns = ignored_patterns(model)
    return _LEGACY_BUFFERS.search(key) is not None or any(re.search(pattern, name) for pattern in patterns)


def _check_missing(model: PreTrainedModel, mapped: Set[str], checkpoint: Checkpoint) -> None:
    tied_groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied_groups.setdefault(source, {source}).add(target)
    twins = {name: group for group in tied_groups.values() for name in group}
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(twin in mapped for twin in twins.get(name, {name}))
    ]
    if missing:
        raise PackError(
            f"{checkpoint.folder} lacks {len(missing)} tensors of {type(model).__name__}, first"
            f" {', '.join(missing[:3])}"
        )


def tied_pairs(model: PreTrainedModel, mapped: dict[str, TensorEntry]) -> list[tuple[str, str]]:
    """Return (duplicate, original) names of tied weights that the checkpoint holds both."""
    return [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if target in mapped and source in mapped
    ]
