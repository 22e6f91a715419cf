"""How tokens are chosen: what a user asked for over what the pack's generation_config.json says, decided before loading.

transformers allows that file anything its `generate` takes. Whatever one streamed continuation can't use is either put
back to its default and named in `notes`, or refused here, before a weight is read.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError, PackError

_SERVED = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
# Needs another device, another package, or transformers' continuous batching; without it the text is the same.
_UNUSED_CACHES = ("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked", "quantized", "paged")
# One continuation is wanted, and of it the text.
_UNUSED = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_UNSERVED = ("assistant_early_exit", "is_assistant", "token_healing")
_NAME = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None leaves a choice to the pack's generation_config.json.

    Attributes:
        max_new_tokens: Tokens to generate at most.
        temperature: 0 takes the most likely token always (greedy); above 0 samples.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        top_k: Sample from this many most likely tokens, at least 1.
        seed: Seed of the sampler; the same seed gives the same text. None draws one.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed} must fit 64 bits")

    def overrides(self) -> dict[str, Any]:
        """Return what is changed in the pack's generation config."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "max_length": None}
        if self.temperature == 0:
            greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
            return chosen | greedy
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in named.items() if value is not None}
        return chosen | given | ({"do_sample": True} if given else {})


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A decided way to choose tokens.

    Attributes:
        changes: What is set in the generation config that transformers has made of the pack's.
        num_beams: Sequences that the KV cache holds.
        seed: Seed of the sampler; None where nothing is drawn.
        stop_strings: Text that ends a sequence.
        notes: What the pack's generation_config.json asks for and this run does not use, one sentence each.
    """

    changes: dict[str, Any]
    num_beams: int
    seed: int | None
    stop_strings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def can_stream(self) -> bool:
        """Whether tokens are final as they come: a beam may still be dropped."""
        return self.num_beams == 1

    def apply(self, generation_config: Any) -> None:
        """Change the generation config of a loaded model; `generate` takes what is None elsewhere from there."""
        for name, value in self.changes.items():
            setattr(generation_config, name, value)


def decide_decoding(pack: Path, sampling: Sampling) -> Decoding:
    """Return how tokens of one continuation are chosen.

    Raises:
        PackError: The pack's generation_config.json can't be read.
        ConfigError: It asks for what flashlm does not do; the message names it.
    """
    config = _read(pack)
    changes, notes = _unused(config)
    changes |= sampling.overrides()
    stop_strings = config.stop_strings or ()
    for name, value in changes.items():
        setattr(config, name, value)
    _check_mode(config)
    is_sampled = config.do_sample is True
    seed = sampling.seed
    if is_sampled and seed is None:
        seed = secrets.randbits(32)
    return Decoding(
        changes=changes,
        num_beams=int(config.num_beams or 1),
        seed=seed if is_sampled else None,
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        notes=tuple(notes),
    )


def _unused(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what of a generation config is put back to its default, and the sentences that say so."""
    changes: dict[str, Any] = {"stop_strings": None}  # looked for in `generate`
    notes = []
    for name, value in _UNUSED.items():
        found = getattr(config, name, None)
        if found not in (None, value):
            notes.append(f"{_NAME} says {name}={found!r}: not used here")
            changes[name] = value
    if config.cache_implementation in _UNUSED_CACHES:
        notes.append(f"{_NAME} says cache_implementation={config.cache_implementation!r}: the default cache is used")
        changes["cache_implementation"] = None
    return changes, notes


def _read(pack: Path) -> Any:
    from transformers import GenerationConfig

    if not (pack / _NAME).exists():
        return GenerationConfig()
    try:
        return GenerationConfig.from_pretrained(pack)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PackError(f"{pack / _NAME} can't be used: {str(error).strip().splitlines()[0]}") from error


def _check_mode(config: Any) -> None:
    if getattr(config, "use_mtp", None):
        raise ConfigError(f"{_NAME} says use_mtp: a pack has no multi-token-prediction layers. Remove it there")
    if config.num_beams is not None and (type(config.num_beams) is not int or config.num_beams < 1):
        raise PackError(f"{_NAME} says num_beams={config.num_beams!r}: a whole number, at least 1, expected")
    if not isinstance(config.do_sample, bool | None):
        raise PackError(f"{_NAME} says do_sample={config.do_sample!r}: true or false expected")
    for name in _UNSERVED:
        if getattr(config, name, None):
            raise ConfigError(f"{_NAME} says {name}, which flashlm generate does not do: change that file")
    for name in ("temperature", "repetition_penalty"):
        value = getattr(config, name, None)
        if value is not None and (name != "temperature" or config.do_sample) and not value > 0:
            raise ConfigError(f"{_NAME} says {name}={value!r}: above 0 expected; --temperature 0 is greedy")
    mode = config.get_generation_mode()
    if mode.value not in _SERVED:
        raise ConfigError(
            f"{_NAME} asks for {mode.value.replace('_', ' ')}, which needs code from the hub:"
            " use --temperature 0 (greedy), or change that file"
        )
