"""`load`: a pack as a transformers model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.engine.opened import OpenedPack, open_pack
from flashlm.engine.pack_check import named_building_errors
from flashlm.engine.quantizer import FlashConfig
from flashlm.planner.settings import Settings, make_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    pack: str | Path,
    dram: str | int | None = None,
    mode: str | None = None,
    context: str | int | None = None,
    pin: str | int | None = None,
    plan: str | Path | None = None,
    expert_policy: str | None = None,
    check: str | None = None,
    activations: str | None = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a pack as a transformers model whose streamed layers stay on flash.

    Args:
        pack: Folder made by `flashlm convert`.
        dram: Bound on the whole process ("6GiB" or bytes); None takes what the machine or the cgroup has free, less a
            margin. `FLASHLM_DRAM` sets it too.
        mode: "auto" (sparse where a calibration met its error budget and it is expected to be faster, else hybrid),
            "hybrid", "sparse" or "naive"; a pack of experts runs in "experts", whatever is left to choose from.
        context: Tokens that the KV cache may hold, of all sequences and beams together; None means 2048.
        pin: Pin no more of what is streamed than this ("1GiB" or bytes; 0 pins none); None: all that dram leaves.
        plan: File that `flashlm plan --save` wrote; what is None comes from it.
        expert_policy: What the cache of a pack of experts keeps: "lru", "lfu", "pinned" (needs a calibration), or "auto",
            what a calibration found best for the cache's size; without one lru. The output is the same with each.
        check: What is held against the pack's checksums: "load" (the default) what is read while loading, "all" what is
            streamed later too, "none" nothing.
        activations: "exact" (the default), or "int8": tokens are rounded to 8 bits for their products with weights in
            q8_0, q4_0 and the like, which is faster and not exact.
        **from_pretrained: Further arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        An ordinary transformers model; `model.flash` tells mode, placement and telemetry.

    Raises:
        ConfigError: A setting is out of range, or the plan is another model's.
        PackError: The folder is not a finished pack, or what was checked is damaged.
        UnsupportedModelError: This transformers can't build the pack's model.
        BudgetError: The model does not fit `dram`; nothing was read.
        StorageError: A file can't be read, or is damaged in length.
    """
    settings = make_settings(
        dram=dram,
        mode=mode,
        context=context,
        pin=pin,
        plan=plan,
        expert_policy=expert_policy,
        check=check,
        activations=activations,
    )
    trust = bool(from_pretrained.get("trust_remote_code", False))
    opened = open_pack(pack, is_checked=settings.is_checked, trust_remote_code=trust)
    return load_opened(opened, settings, **from_pretrained)


def load_opened(opened: OpenedPack, settings: Settings, **from_pretrained: Any) -> PreTrainedModel:
    """Load a pack that has been opened; everything else as in `load`."""
    from transformers import AutoModelForCausalLM

    from_pretrained.setdefault("trust_remote_code", False)  # else transformers may ask at the terminal
    config = copy.copy(opened.config)
    config.quantization_config = FlashConfig(settings, opened=opened)  # in the place of config.json's entry
    with named_building_errors(opened.folder, has_arguments=len(from_pretrained) > 1):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(opened.folder, config=config, **from_pretrained)
    return model
