"""Why a model is not the pack's: it was asked for as another class, or with other settings, or the pack is another's.

Looked at only where something does not fit, to say what helps: a pack that is fine need not be converted again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.errors import ConfigError, FlashError, PackError

if TYPE_CHECKING:  # this module is imported within transformers' own import
    from transformers import PreTrainedModel

_SHOWN = 3
_MISSING = object()
# What loading itself sets, or what has no part in which weights there are.
_NOT_SETTINGS = frozenset(
    {"architectures", "dtype", "torch_dtype", "quantization_config", "transformers_version", "transformers_weights"}
)


def misfit(problem: str, model: PreTrainedModel, pack: Path) -> FlashError:
    """Return the error for a model that does not fit its pack.

    Args:
        problem: In what they differ.
        model: As transformers built it.
        pack: The folder.

    Returns:
        ConfigError where the class or the settings that were asked for are not the pack's, PackError elsewhere.
    """
    kind = type(model).__name__
    classes = _classes(model)
    if classes and kind not in classes:
        return ConfigError(
            f"{pack} was made of {classes[0]} and opened as {kind} ({problem}): load it with AutoModelForCausalLM or"
            " flashlm.load; for hidden states call .get_decoder() of that"
        )
    others = list(_other_settings(model, pack))
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        return ConfigError(
            f"{', '.join(others[:_SHOWN])}{more}: a pack is computed with the settings that it was converted with"
            f" ({problem}). Leave them out, or convert a model that has them"
        )
    return PackError(f"{problem}: convert the model again with this version of transformers")


def _classes(model: PreTrainedModel) -> list[str]:
    """Return the classes that a pack of this config is opened as: what it was saved as, and what the library makes of it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    saved = getattr(model.config, "architectures", None) or []
    return [*([causal.__name__] if causal is not None else []), *saved]


def _other_settings(model: PreTrainedModel, pack: Path) -> Iterator[str]:
    """Yield a line for each setting of the model that differs from the pack's config.json."""
    try:
        own = type(model.config).from_pretrained(pack).to_dict()
    except Exception:  # whatever a config's class makes of the file: there is an error to tell already
        return
    yield from _differences(model.config.to_dict(), own, "")


def _differences(asked: dict[str, Any], own: dict[str, Any], where: str) -> Iterator[str]:
    for key, value in asked.items():
        stated = own.get(key, _MISSING)
        if key.startswith("_") or key in _NOT_SETTINGS or value == stated:
            continue
        if isinstance(value, dict) and isinstance(stated, dict):
            yield from _differences(value, stated, f"{where}{key}.")
        else:
            yield f"{where}{key} is {value!r}, {'not there' if stated is _MISSING else repr(stated)} in config.json"
