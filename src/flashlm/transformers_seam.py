"""Everything of transformers that is not its documented interface, in one place.

flashlm swaps modules, renames weights and runs conversions, for which transformers has no stable interface. Whatever of
it is private, or may change from one minor release to the next, is named here and nowhere else: a test holds the rest of
the package to that, and CI runs at both ends of `TRIED`. Names are looked up when they are used: a name that has gone
breaks what needs it, by a named error, and not `import transformers`, within which this module is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flashlm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate as Concatenate
    from transformers.core_model_loading import Interleave as Interleave
    from transformers.core_model_loading import MergeModulelist as MergeModulelist
    from transformers.core_model_loading import Transpose as Transpose
    from transformers.core_model_loading import WeightConverter as WeightConverter
    from transformers.core_model_loading import WeightRenaming as WeightRenaming
    from transformers.core_model_loading import dot_natural_key as dot_natural_key
    from transformers.core_model_loading import rename_source_key as rename_source_key
    from transformers.generation.configuration_utils import ContinuousBatchingConfig as ContinuousBatchingConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as ALL_EXPERTS_FUNCTIONS
    from transformers.loss.loss_utils import ForCausalLMLoss as ForCausalLMLoss
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
    from transformers.pytorch_utils import Conv1D as Conv1D
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.auto import register_quantization_config as register_quantization_config
    from transformers.quantizers.auto import register_quantizer as register_quantizer
    from transformers.quantizers.base import HfQuantizer as HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin as QuantizationConfigMixin

logger = logging.getLogger(__name__)

TRIED = ("5.20.0", "5.24.0")
"""Oldest and newest release of transformers that the tests pass with; pyproject.toml allows no others."""

_CONVERSIONS = "transformers.core_model_loading"
_QUANTIZERS = "transformers.quantizers.auto"

MODULE_OF: Mapping[str, str] = {
    "ALL_ATTENTION_FUNCTIONS": "transformers.modeling_utils",
    "ALL_EXPERTS_FUNCTIONS": "transformers.integrations.moe",
    "AUTO_QUANTIZER_MAPPING": _QUANTIZERS,
    "Concatenate": _CONVERSIONS,
    "ContinuousBatchingConfig": "transformers.generation.configuration_utils",
    "Conv1D": "transformers.pytorch_utils",
    "ForCausalLMLoss": "transformers.loss.loss_utils",
    "HfQuantizer": "transformers.quantizers.base",
    "Interleave": _CONVERSIONS,
    "MergeModulelist": _CONVERSIONS,
    "QuantizationConfigMixin": "transformers.utils.quantization_config",
    "Transpose": _CONVERSIONS,
    "WeightConverter": _CONVERSIONS,
    "WeightRenaming": _CONVERSIONS,
    "dot_natural_key": _CONVERSIONS,
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "register_quantization_config": _QUANTIZERS,
    "register_quantizer": _QUANTIZERS,
    "rename_source_key": _CONVERSIONS,
}
"""What other modules import from here, and where transformers has it."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "transformers.PreTrainedConfig": ("_attn_implementation", "_experts_implementation"),
    "transformers.PreTrainedModel": (
        "_get_dtype_plan",
        "_hf_peft_config_loaded",
        "_init_weights",
        "_is_stateful",
        "_keys_to_ignore_on_load_unexpected",
        "_tied_weights_keys",
        "get_expanded_tied_weights_keys",
    ),
    "transformers.GenerationMixin": (
        "_expand_inputs_for_generation",
        "_update_model_kwargs_for_generation",
        "_supports_default_dynamic_cache",
    ),
    "transformers.integrations.moe": ("_default_apply_gate",),
    "transformers.models.auto.modeling_auto": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "transformers.pipelines.Pipeline": ("_default_generation_config",),
    _QUANTIZERS: ("LOADING_ATTRIBUTES_CONFIG_TYPES",),
    "transformers.quantizers.base.HfQuantizer": (
        "_process_model_after_weight_loading",
        "_process_model_before_weight_loading",
        "is_serializable",
        "is_trainable",
        "update_attn_implementation",
        "update_device_map",
        "update_dtype",
        "update_weight_conversions",
        "validate_environment",
    ),
    "transformers.utils.quantization_config.QuantizationConfigMixin": ("to_dict",),
}
"""What the functions below touch, and what our classes stand in for: by the module or class that has it."""


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(MODULE_OF[name]), name)
    except (ImportError, AttributeError) as error:
        raise _unfit(f"{MODULE_OF[name]}.{name}") from error


def _unfit(*missing: str) -> ConfigError:
    return ConfigError(
        f"transformers {version('transformers')} has no {', '.join(missing)}: flashlm works with transformers"
        f" {TRIED[0]} to {TRIED[1]}; run `pip install --upgrade flashlm`, or install one of those"
    )


def _find(path: str) -> Any:
    """Return the module or class of that dotted path."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


@cache
def check() -> None:
    """Check that this transformers has all that is named here; warn where it is a release that was never tried.

    Raises:
        ConfigError: A name is missing.
    """
    missing = [f"{module}.{name}" for name, module in MODULE_OF.items() if not hasattr(_find(module), name)]
    missing += [
        f"{path}.{name}" for path, names in ATTRIBUTES.items() for name in names if not hasattr(_find(path), name)
    ]
    if missing:
        raise _unfit(*missing)
    installed = version("transformers")
    if not _minor(TRIED[0]) <= _minor(installed) <= _minor(TRIED[1]):
        logger.warning("flashlm was tried with transformers %s to %s, this is %s", *TRIED, installed)


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def accept_loading_attributes(config_class: type) -> None:
    """Let `from_pretrained(quantization_config=...)` change a pack's settings.

    A pack's config.json has a quantization config already. For classes on a list of its own transformers then takes over
    the attributes of the one passed; for all others it ignores them with a warning.
    """
    auto: Any = import_module(_QUANTIZERS)
    known = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())  # `check` refuses to load a pack where it is missing
    if config_class not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, config_class)


def dtype_plan(model: PreTrainedModel, wanted: torch.dtype) -> dict[str, torch.dtype]:
    """Return the patterns of weights that transformers keeps in another dtype than `wanted`, with that dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(wanted)
    return plan


def ignored_patterns(model: PreTrainedModel) -> tuple[str, ...]:
    """Return patterns of checkpoint tensors that transformers leaves out when it loads this model."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def keep_from_initialising(module: nn.Module) -> None:
    """Tell transformers that `module` needs no random numbers for weights that it lacks."""
    module._is_hf_initialized = True  # type: ignore[assignment]  # nn.Module declares tensors and modules only


def forget_tie(model: PreTrainedModel, name: str) -> None:
    """Tell transformers that it need not tie a weight to another, which it would look for when others are loaded."""
    pairs = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {one: other for one, other in pairs if name not in (one, other)}


def initialise_buffers(model: PreTrainedModel, module: nn.Module) -> None:
    """Give `module`, all of whose weights are there, the buffers that its family computes and saves nowhere."""
    for weight in module.parameters(recurse=False):
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or it would be filled with random numbers
    if any(True for _ in module.buffers(recurse=False)):
        model._init_weights(module)


def is_initialised(loaded: nn.Parameter | nn.Module) -> bool:
    """Return whether transformers has loaded a parameter, or all of a module, from a checkpoint."""
    return getattr(loaded, "_is_hf_initialized", False)


def lead_experts_to(config: PreTrainedConfig, implementation: str) -> None:
    """Choose the function of `ALL_EXPERTS_FUNCTIONS` that experts modules with this config call."""
    config._experts_implementation = implementation


def has_plain_gate(module: nn.Module) -> bool:
    """Return whether an experts module multiplies up by the activation of gate, and does nothing else."""
    return getattr(getattr(type(module), "_apply_gate", None), "__name__", "") == "_default_apply_gate"


def apply_gate(module: Any, joined: torch.Tensor) -> torch.Tensor:
    """Return (tokens, rows): an experts module's own gating of its (tokens, 2 · rows) gate and up outputs."""
    activated: torch.Tensor = module._apply_gate(joined)
    return activated


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return which attention function models with this config call; None where nobody has chosen yet."""
    return getattr(config, "_attn_implementation", None)


def are_adapters_loaded(model: PreTrainedModel) -> bool:
    """Return whether transformers has put adapters (peft) into `model`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def note_adapters(model: PreTrainedModel, *, are_loaded: bool) -> None:
    """Set what `are_adapters_loaded` returns."""
    model._hf_peft_config_loaded = are_loaded


def pipeline_defaults(pipeline: object) -> GenerationConfig | None:
    """Return the generation settings that a pipeline brings of its own; None for what is no such pipeline."""
    return getattr(pipeline, "_default_generation_config", None)


def previous_cache_length(model: PreTrainedModel) -> int:
    """Return the tokens of the largest static cache that `generate` has made for `model`; 0 before the first."""
    return max(getattr(model, "_previous_max_cache_length", 0), 0)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the KV cache among the keyword arguments of a forward call, None without one.

    It is `cache` since transformers 5.24, and was `past_key_values`, which older callers still pass.
    """
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def made_cache(output: object) -> Any:
    """Return the KV cache of a forward call's output, None without one; under either name, as in `given_cache`."""
    cache = getattr(output, "past_key_values", None)
    return getattr(output, "cache", None) if cache is None else cache


def name_causal_class(model_type: str, model_class: type) -> None:
    """Enter a class of ours where transformers' Trainer looks for causal language models, whose labels it shifts."""
    known: dict[str, str] = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known[model_type] = model_class.__name__
