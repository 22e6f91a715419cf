"""The seam into peft: adding an adapter to a loaded pack is done whole or not at all, and merging into flash is refused.

peft replaces a model's layers one by one and merges weight by weight; an error in the middle would leave some of it done. It
has no hook before either, so two methods of its base class are wrapped as soon as peft is imported (`_registration`). Models
that are no packs pass through untouched; importing this costs nothing as long as no pack is loaded.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTuner

from flashlm.errors import ConfigError, FlashError
from flashlm.sizes import format_size

if TYPE_CHECKING:
    from torch import nn

    from flashlm.engine.guards import LoadedPack
    from flashlm.engine.seat import Seat

logger = logging.getLogger(__name__)

_WEIGHTLESS = {"gaussian", "orthogonal", "eva"}  # ways to begin an adapter that don't touch the layer's own weight


def _pack_in(model: Any) -> LoadedPack | None:
    guards = sys.modules.get("flashlm.engine.guards")
    if guards is None or not hasattr(model, "modules"):
        return None
    return next((module for module in model.modules() if isinstance(module, guards.LoadedPack)), None)


def _seats(model: nn.Module) -> list[Seat]:
    from flashlm.engine.ffn import FlashFFN

    layers = [module for module in model.modules() if isinstance(module, FlashFFN)]
    return [layer.seat for layer in layers if layer.seat is not None]


def _check_config(tuner: Any, model: nn.Module, config: Any) -> None:
    """Refuse what would change weights of the model before an error stops it: it could not be undone."""
    from flashlm.engine.standin import StreamedWeight

    for target in getattr(config, "target_parameters", None) or ():
        for name, weight in model.named_parameters():
            if isinstance(weight, StreamedWeight) and f".{name}".endswith(f".{target}"):
                raise ConfigError(f"target_parameters {target!r}: {name} is streamed and takes no adapter of this kind")
    with_bias = [seat.path_of(role) for seat in _seats(model) for role, has in seat.linears.has_bias.items() if has]
    bias = getattr(config, "bias", "none")
    begins_with = getattr(config, "init_lora_weights", None)
    needs_weight = isinstance(begins_with, str) and begins_with not in _WEIGHTLESS
    if bias == "all" and with_bias:
        raise ConfigError(f"bias={bias!r} changes the bias of {with_bias[0]}, which is streamed: use bias='none'")
    if (needs_weight or (bias != "none" and with_bias)) and _reaches_streamed(tuner, model, config):
        what = f"init_lora_weights={begins_with!r}" if needs_weight else f"bias={bias!r}"
        raise ConfigError(
            f"{what} changes the layer's own weights, and these are streamed: leave feed-forward layers out"
        )


def _check_wrapped(model: nn.Module) -> None:
    """Refuse wrappers that the streamed layers would not serve."""
    for seat in _seats(model):
        seat.check(will_run=False)
    for name, module in model.named_modules():
        if "flash_experts" in vars(module._modules.get("base_layer") or object):
            raise ConfigError(f"{type(module).__name__} on {name}: streamed experts take no adapters")


def _reaches_streamed(tuner: Any, model: nn.Module, config: Any) -> bool:
    """Return whether an adapter's targets include a linear layer of a streamed one."""
    config = copy.copy(config)
    if config.target_modules is None:
        config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        return True
    names = [seat.path_of(role) for seat in _seats(model) for role in seat.stand_ins]
    return any(tuner._check_target_module_exists(config, name) for name in names)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Return what puts modules and weights of `model` back to what they are now."""
    from flashlm.engine.standin import StreamedWeight

    modules = [(module, dict(module._modules), dict(module._parameters)) for module in model.modules()]
    # A wrapper that is there already keeps notes of its adapters: ranks, factors, variants.
    wrappers = [module for module in model.modules() if hasattr(module, "base_layer")]
    notes = [(note, dict(note)) for module in wrappers for note in vars(module).values() if type(note) is dict]
    # Some ways to begin an adapter (PiSSA) point the layer's own weight at what is left of it.
    resident = [(each, each.data) for each in model.parameters() if not isinstance(each, StreamedWeight)]

    pack = _pack_in(model)
    configs = vars(pack).get("peft_config")

    def restore() -> None:
        vars(pack).pop("peft_config", None)
        if configs is not None:
            vars(pack)["peft_config"] = configs
        for module, children, parameters in modules:
            _refill(module._modules, children)
            _refill(module._parameters, parameters)
        for note, values in notes:
            _refill(note, values)
        for weight, data in resident:
            weight.data = data

    return restore


def _refill(target: dict[Any, Any], values: dict[Any, Any]) -> None:
    target.clear()
    target.update(values)


def _inject(original: Any) -> Any:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        pack = _pack_in(model)
        if pack is None:
            return original(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        restore, num_bytes = _snapshot(model), _parameter_bytes(model)
        try:
            _check_config(self, model, config)
            result = original(self, model, adapter_name, *args, **kwargs)
            _check_wrapped(model)
        except FlashError as error:
            restore()
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ConfigError(f"the {kind} adapter {adapter_name!r} can't be used with this pack: {error}") from error
        except BaseException:
            restore()
            raise
        # An adapter that is being loaded has its weights still to come, and they may be refused.
        pack.undo_adapter = restore if config.inference_mode else None
        _announce(pack, _parameter_bytes(model) - num_bytes)
        return result

    return inject_adapter


def _parameter_bytes(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _announce(pack: LoadedPack, num_bytes: int) -> None:
    """Say where an adapter's memory goes beyond what `dram` has left: placing came before it was known."""
    placement = pack.flash.placement
    left_bytes = max(placement.dram_bytes - placement.planned_bytes, 0)
    if num_bytes > left_bytes:
        logger.warning(
            "the adapter takes %s, dram has %s left: to stay within it load the pack with pin=%r or less",
            format_size(num_bytes),
            format_size(left_bytes),
            format_size(max(placement.pinned_bytes - num_bytes, 0)),
        )


def _adapted_on_flash(model: nn.Module) -> list[str]:
    """Return the names of streamed layers that have an adapter."""
    from flashlm.engine.flash_embedding import FlashEmbedding
    from flashlm.engine.flash_linear import FlashLinear

    names = [seat.path_of(role) for seat in _seats(model) for role, _ in seat.wrappers()]
    return names + [
        name
        for name, module in model.named_modules()
        if isinstance(module._modules.get("base_layer"), FlashLinear | FlashEmbedding)
    ]


def _check_merge(original: Any) -> Any:
    @functools.wraps(original)
    def _check_merge_allowed(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapted = [] if _pack_in(self.model) is None else _adapted_on_flash(self.model)
        if adapted:
            raise ConfigError(
                f"the adapter can't be merged: {adapted[0]} is streamed. Use it unmerged, or merge it into the checkpoint"
                " and convert that"
            )
        return original(self, *args, **kwargs)

    return _check_merge_allowed


def register() -> None:
    """Wrap peft's methods; this module calls it once. Calling it again does nothing."""
    if not hasattr(BaseTuner.inject_adapter, "__wrapped__"):
        BaseTuner.inject_adapter = _inject(BaseTuner.inject_adapter)
        BaseTuner._check_merge_allowed = _check_merge(BaseTuner._check_merge_allowed)


register()
