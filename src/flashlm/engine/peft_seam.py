"""The seam into peft: adding an adapter to a loaded pack is done whole or not at all, and merging into flash is refused.

peft replaces a model's layers one by one and merges weight by weight; an error in the middle would leave some of it done. It
has no hook before either, so two methods of its base class are wrapped as soon as peft is imported (`_registration`). Models
that are no packs pass through untouched.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from flashlm.engine.ffn import FlashFFN
from flashlm.engine.guards import LoadedPack
from flashlm.errors import ConfigError
from flashlm.sizes import format_size

logger = logging.getLogger(__name__)


def _flash_layers(model: nn.Module) -> list[FlashFFN]:
    return [module for module in model.modules() if isinstance(module, FlashFFN)]


def _is_pack(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, LoadedPack) for module in model.modules())


def _check_target_parameters(model: nn.Module, config: Any) -> None:
    """Refuse adapters on streamed parameters as such, which is how peft adapts experts."""
    for target in getattr(config, "target_parameters", None) or ():
        for name, module in model.named_modules():
            streamed = [f"{name}.{each}" for each in ("gate_up_proj", "up_proj", "down_proj")]
            if hasattr(module, "flash_experts") and any(f".{each}".endswith(f".{target}") for each in streamed):
                raise ConfigError(
                    f"target_parameters {target!r}: the experts at {name} are streamed and take no adapters"
                )


def _inject(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_pack(model):
            return original(self, model, adapter_name, *args, **kwargs)
        before = [(module, dict(module._modules)) for module in model.modules()]
        num_bytes = _parameter_bytes(model)
        try:
            _check_target_parameters(model, self.peft_config[adapter_name])
            result = original(self, model, adapter_name, *args, **kwargs)
            for layer in _flash_layers(model):
                if layer.seat is not None:
                    layer.seat.check(will_run=False)
        except BaseException:
            for module, children in before:
                module._modules.clear()
                module._modules.update(children)
            raise
        _announce(model, _parameter_bytes(model) - num_bytes)
        return result

    return inject_adapter


def _parameter_bytes(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _announce(model: nn.Module, num_bytes: int) -> None:
    """Say where an adapter's memory goes beyond what `dram` has left: placing came before it was known."""
    flash = next(module.flash for module in model.modules() if isinstance(module, LoadedPack))
    left_bytes = max(flash.placement.dram_bytes - flash.placement.planned_bytes, 0)
    if num_bytes > left_bytes:
        pin = format_size(max(flash.placement.pinned_bytes - num_bytes, 0))
        logger.warning(
            "the adapter takes %s, dram has %s left: to stay within it load the pack with pin=%r or less",
            format_size(num_bytes),
            format_size(left_bytes),
            pin,
        )


def _check_merge(original: Any) -> Any:
    @functools.wraps(original)
    def _check_merge_allowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in _flash_layers(self.model):
            adapted = [] if layer.seat is None else [layer.seat.path_of(role) for role, _ in layer.seat.wrappers()]
            if adapted:
                raise ConfigError(
                    f"the adapter can't be merged: {adapted[0]} is streamed. Use it unmerged, or merge it into"
                    " the checkpoint and convert that"
                )
        return original(self, *args, **kwargs)

    return _check_merge_allowed


def register() -> None:
    """Wrap peft's methods; this module calls it once. Calling it again does nothing."""
    if not hasattr(BaseTuner.inject_adapter, "__wrapped__"):
        BaseTuner.inject_adapter = _inject(BaseTuner.inject_adapter)
        BaseTuner._check_merge_allowed = _check_merge(BaseTuner._check_merge_allowed)


register()
