"""How many positions a model can take: a limit only where it has a table of them, else a length that it was trained for.

`max_position_embeddings` means two things. Where positions are looked up (learned ones, GPT-J's table of sines, a stored
mask) nothing follows the last. Where they are computed (rotary, ALiBi) the model runs on, as well as its training allows;
and with YaRN and other scalings the number is often the one before scaling.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flashlm.errors import ConfigError, UnsupportedModelError
from flashlm.structure.families import build_meta_model

logger = logging.getLogger(__name__)

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_TABLES = ("pos", "wpe")  # in the names of learned tables
_MADE_ONCE = ("mpt",)  # ALiBi, but computed for the stated positions and no more
_MAX_OFFSET = 4  # rows that some tables have before the first position


def check_positions(config: Any, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a run past the positions that a model has a table of; warn of one past what it was trained for.

    Args:
        config: The transformers config of the whole model.
        num_prompt_tokens: Tokens of the prompt.
        max_new_tokens: Tokens to generate at most.

    Raises:
        ConfigError: The model has no position for the last of these tokens.
    """
    text = config.get_text_config(decoder=True)
    stated = stated_positions(text)
    wanted = num_prompt_tokens + max_new_tokens
    if stated is None or wanted <= stated:
        return
    if has_position_table(config, stated):
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens and {max_new_tokens} more are wanted, but the model has"
            f" {stated} positions: shorten the prompt or lower --max-new-tokens"
        )
    trained = trained_positions(text)
    if trained is not None and wanted > trained:
        logger.warning(
            "the prompt and what is wanted make %d tokens, the model was trained for %d: it may lose the thread",
            wanted,
            trained,
        )


def stated_positions(text: Any) -> int | None:
    """Return the number of positions that a text config states, whatever it means; None where it states none."""
    for name in _NAMES:
        value = getattr(text, name, None)
        if type(value) is int and value > 0:
            return value
    return None


def trained_positions(text: Any) -> int | None:
    """Return the tokens that a model with computed positions was made for, rope scaling included."""
    stated = stated_positions(text)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # One set of parameters, or one for each type of layer.
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))] if isinstance(rope, dict) else []
    scaled = [_scaled(each, stated) for each in sets]
    return max((value for value in (stated, *scaled) if value is not None), default=None)


def _scaled(rope: dict[str, Any], stated: int | None) -> int | None:
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if not isinstance(factor, int | float) or not isinstance(before, int | float) or not factor > 0:
        return None
    return int(factor * before)


def has_position_table(config: Any, num_positions: int) -> bool:
    """Return whether the model of `config` keeps something for each of `num_positions`, which then is a limit.

    Builds the model without weights; a model that can't be built counts as one without.
    """
    if config.get_text_config(decoder=True).model_type in _MADE_ONCE:
        return True
    config = copy.copy(config)
    if hasattr(config, "quantization_config"):  # a pack's
        del config.quantization_config
    try:
        model = build_meta_model(config)
    except UnsupportedModelError:
        return False
    return any(_is_table(name, tensor, num_positions) for name, tensor in _tensors(model))


def _tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    grown = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Module) and hasattr(module, "make_weights")
    }  # tables of sines that are made anew where they are too short
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if name.rpartition(".")[0] not in grown]


def _is_table(name: str, tensor: torch.Tensor, num_positions: int) -> bool:
    sizes = range(num_positions, num_positions + _MAX_OFFSET + 1)
    owner = name.lower().split(".")
    if any(part in each for each in owner[-2:] for part in _TABLES):
        return tensor.dim() >= 1 and any(size in sizes for size in tensor.shape[:2])
    # A mask for all positions, which some families store with each layer.
    return tensor.dim() >= 2 and tuple(tensor.shape[-2:]) == (num_positions, num_positions)
