"""Which checkpoint tensor feeds which entry of the model's state dict, by transformers' own renaming rules.

Hub files may lack the base model's prefix or carry one too many, leave tied weights out or store them twice, and keep
buffers of older versions. Renamings that transformers applies on load are applied. Conversions that compute are done where
they make experts (`experts_source`) or resident weights (`made`), and are refused by name where they make a streamed layer.

A release may hold more than the model: layers that predict several tokens ahead, buffers that are computed today. What
transformers ignores is left out and counted; any other tensor that the model does not know is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from flashlm.conversion.experts_source import EncodedExperts, ExpertSource, ExpertWeight
from flashlm.conversion.made import MadeTensor, MakingGroup
from flashlm.conversion.sources.safetensors import Checkpoint
from flashlm.errors import PackError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.structure.experts import ExpertLayer
from flashlm.transformers_seam import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    ignored_patterns,
    rename_source_key,
)

# Buffers that older transformers versions saved and newer ones compute.
_LEGACY_BUFFERS = re.compile(
    r"(\.attn\.bias|\.attn\.masked_bias|\.attn\.attention\.(masked_)?bias|\.attention\.(masked_)?bias"
    r"|\.attention\.rotary_emb\.\w+|(^|\.)(original_)?inv_freq|(^|\.)(cos|sin)_cached|(^|\.)position_ids"
    r"|\.embed_positions|embed_positions\.weights|\.attn\.causal_mask)$"
)
# Modules that predict several tokens ahead; no causal model of transformers runs them.
_MULTI_TOKEN = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")
# Parts of a model of several kinds of input beside the text model, where that one alone is built.
_OTHER_PARTS = re.compile(
    r"^(model\.)?(vision\w*|visual\w*|image\w*|audio\w*|speech\w*|embed_(vision|audio)|multi_?modal_\w+|mm_\w+|\w*connector"
    r"|aligner)\."
)
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NUM_EXTRA_LAYERS = re.compile(r"nextn|mtp")  # settings such as num_nextn_predict_layers


@dataclass(kw_only=True)
class NameMap:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        entries: Those that need no more than a new name, by their name in the model's state dict.
        made: Resident weights that transformers makes of others on loading, by the same.
        experts: Where the weights of the layers of experts are.
        left_out: Checkpoint names that the model does not have and transformers ignores.
    """

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    made: dict[str, MadeTensor] = field(default_factory=dict)
    experts: tuple[ExpertSource | EncodedExperts, ...] = ()
    left_out: tuple[str, ...] = ()


def map_names(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    layers: Sequence[ExpertLayer] = (),
    *,
    is_text_part: bool = False,
) -> NameMap:
    """Return where every weight of `model` is in the checkpoint.

    Args:
        model: The model, on the meta device.
        checkpoint: Its checkpoint.
        layers: The layers whose experts are streamed.
        is_text_part: Whether the checkpoint's config is one of several kinds of input, and `model` the text model in it.

    Raises:
        PackError: A weight is missing, has another shape, or a tensor has no place in the model.
        UnsupportedModelError: A tensor needs a conversion that can't be done here.
    """
    state = model.state_dict()
    experts = {
        name: ExpertWeight(name=name, shape=tuple(state[name].shape))
        for layer in layers
        for name in (layer.in_weight, layer.out_weight)
    }
    found = _renamed(model, checkpoint, state, experts, _Ignored(model, is_text_part=is_text_part))
    check_names(model, found, layers, checkpoint)
    for weight in experts.values():
        weight.check()
    found.experts = tuple(
        ExpertSource(layer=layer, in_weight=experts[layer.in_weight], out_weight=experts[layer.out_weight]).by_rows()
        for layer in layers
    )
    return found


def check_names(model: PreTrainedModel, found: NameMap, layers: Sequence[ExpertLayer], checkpoint: Checkpoint) -> None:
    """Check that every weight but those of experts is there, in its shape.

    Raises:
        PackError: One is not.
    """
    state = model.state_dict()
    experts = {name for layer in layers for name in (layer.in_weight, layer.out_weight)}
    _check_missing(model, found.entries.keys() | found.made.keys() | experts, checkpoint)
    for name, entry in found.entries.items():
        if tuple(state[name].shape) != entry.shape:
            raise PackError(
                f"{entry.path} holds {entry.name} with shape {list(entry.shape)},"
                f" the model's config wants {list(state[name].shape)}"
            )


def _renamed(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    state: dict[str, torch.Tensor],
    experts: dict[str, ExpertWeight],
    ignored: _Ignored,
) -> NameMap:
    """Sort the checkpoint's tensors; those of experts are added to `experts`."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found, groups = NameMap(), dict[str, MakingGroup]()
    unknown: list[str] = []
    left_out: list[str] = []
    # In transformers' order: some renamings hold only from the first key on that shows them to be needed.
    for key, entry in sorted(checkpoint.tensors.items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # saved under a name that is final already
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        if name in experts:
            experts[name].add(pattern, converter, entry)
        elif name not in state:
            # Before any conversion is looked at: one may fit the names of a layer that the model does not have.
            (left_out if ignored(key, name) else unknown).append(key)
        elif converter is not None and pattern is not None:
            groups.setdefault(name, MakingGroup(name=name, converter=converter)).add(pattern, entry)
        elif name in found.entries:
            raise PackError(f"{checkpoint.place} holds {name} twice: as {found.entries[name].name} and as {key}")
        else:
            found.entries[name] = entry
    if unknown:
        raise PackError(
            f"{checkpoint.place} holds {len(unknown)} tensors that {type(model).__name__} does not know,"
            f" first {', '.join(sorted(unknown)[:3])}"
        )
    for group in groups.values():
        for made in group.targets(model, state):
            if made.name in found.entries or made.name in found.made:
                raise PackError(f"{checkpoint.place} holds {made.name} in two ways, the second as {made.part_name}")
            found.made[made.name] = made
    found.left_out = tuple(left_out)
    return found


class _Ignored:
    """Tells whether a tensor that the model does not have is one that transformers ignores."""

    def __init__(self, model: PreTrainedModel, *, is_text_part: bool) -> None:
        self._is_text_part = is_text_part
        self._patterns = [re.compile(pattern) for pattern in ignored_patterns(model)]
        self._computed = {name for name, _ in model.named_buffers()}  # not in the state dict: computed, never read
        text = model.config.get_text_config(decoder=True)
        self._num_layers = int(getattr(text, "num_hidden_layers", 0) or 0)
        self._num_extra = _num_extra_layers(text)

    def __call__(self, key: str, name: str) -> bool:
        if name in self._computed or _LEGACY_BUFFERS.search(key) or _MULTI_TOKEN.search(key):
            return True
        if any(pattern.search(name) for pattern in self._patterns):
            return True
        if self._is_text_part and _OTHER_PARTS.search(key):
            return True
        # DeepSeek and GLM put what predicts further tokens behind the last layer, and state how many such layers there are.
        number = _LAYER_NUMBER.search(name)
        return number is not None and self._num_layers <= int(number.group(1)) < self._num_layers + self._num_extra


def _num_extra_layers(config: Any) -> int:
    """Return how many layers for further tokens a config states beyond the model's own."""
    values = [value for key, value in config.to_dict().items() if _NUM_EXTRA_LAYERS.search(key) and type(value) is int]
    return max(values, default=0)


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
            f"{checkpoint.place} lacks {len(missing)} tensors of {type(model).__name__}, first {', '.join(missing[:3])}"
        )


def tied_pairs(model: PreTrainedModel, mapped: dict[str, TensorEntry]) -> list[tuple[str, str]]:
    """Return (duplicate, original) names of tied weights that the checkpoint holds both."""
    return [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if target in mapped and source in mapped
    ]
