"""What a loaded pack can't do is refused by name, before anything has changed: moving, casting, copying, saving, training.

A model in which some weights are on flash looks like any other to the programs around it. Each of torch's and transformers'
ways to move or copy weights ends in one of a few methods; these are guarded on the model and on every module around a
streamed layer, so that a refusal leaves the model as it was. Nothing here knows adapters or budgets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from flashlm.engine.standin import StreamedWeight, refuse
from flashlm.errors import ConfigError, FlashError
from flashlm.transformers_seam import are_adapters_loaded, note_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashlm.engine.seat import Seat

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WITHOUT_EMBEDDINGS = (
    "Beside LoRA on embeddings or the output layer peft saves the layer itself: where that was not trained, save the adapter"
    " with save_embedding_layers=False"
)
_ACCELERATORS = ("cuda", "mlu", "musa", "npu", "hpu", "xpu", "mps")  # that a pipeline looks for


def check_hidden_states(module: nn.Module, hidden_states: torch.Tensor) -> None:
    """Refuse what a streamed layer can't compute on.

    Raises:
        ConfigError: Another device than the CPU, a dtype that rows don't have, a gradient, or training mode.
    """
    if not hidden_states.is_cpu:
        raise ConfigError(f"the input is on {hidden_states.device}, but a pack computes on the CPU: move it there")
    if hidden_states.dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"the input is {hidden_states.dtype}, but streamed layers take float32, bfloat16 or float16")
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or any(each is not None and each.requires_grad for each in module._parameters.values())
    ):
        raise ConfigError("streamed weights are for inference: run the model under torch.no_grad()")
    if module.training:
        raise ConfigError(
            "streamed weights are for inference, and the model is in training mode: call model.eval() first"
        )


def check_function(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse a function that torch's `_apply` would give every weight, unless it changes nothing.

    Raises:
        ConfigError: It moves, casts, copies or shares.
    """
    probe = torch.zeros(1, dtype=dtype)
    try:
        result = fn(probe)
    except Exception as error:  # a device that this machine does not have, for one
        raise ConfigError(f"a pack computes on the CPU and can't be moved: {error}") from error
    is_shared = bool(probe.is_shared())  # type: ignore[no-untyped-call]
    if result is probe and not is_shared:
        return
    what = "shared" if result is probe else f"made anew on {result.device}"
    if result.device.type != "cpu":
        what = f"moved to {result.device}"
    elif result.dtype != dtype:
        what = f"cast to {result.dtype}"
    raise ConfigError(
        f"a pack can't be {what}: its weights are {dtype} on flash and are computed with on the CPU. Leave it there; for"
        " another dtype convert again with --dtype"
    )


def _refuse_copy(name: str) -> NoReturn:
    raise ConfigError(
        f"{name} can't be copied, pickled or sent to another process: its weights are on flash. Copy the pack's folder, and"
        " load it again where you need it"
    )


class StreamedModule(nn.Module):
    """A module whose weights are on flash: it is neither copied nor pickled, moved nor cast."""

    seat: Seat | None
    _dtype: torch.dtype

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_copy("a streamed layer")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy("a streamed layer")

    def _apply(self, fn: Any, recurse: bool = True) -> StreamedModule:
        check_function(fn, self._dtype)
        return self


class _Guarded:
    """Mixed into the class of every module around a streamed one."""

    flash_dtype: torch.dtype

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_copy(f"a {type(self).__name__} with streamed layers")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy(f"a {type(self).__name__} with streamed layers")

    def _apply(self, fn: Any, recurse: bool = True) -> _Guarded:
        check_function(fn, self.flash_dtype)
        return self  # and not through the buffers, which torch would cast with the rest

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Refuse to ask for gradients.

        Raises:
            ConfigError: They were asked for.
        """
        if requires_grad:
            streamed = (each for each in self.parameters() if isinstance(each, StreamedWeight))  # type: ignore[attr-defined]
            refuse(next(streamed).flash_name, "can't be trained", "a pack is for inference")
        return super().requires_grad_(False)  # type: ignore[misc]


class LoadedPack(_Guarded):
    """Mixed into the class of a loaded model: what needs more than torch's own methods."""

    flash: Any
    undo_adapter: Callable[[], None] | None = None  # while an adapter's weights are to come

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """The CPU, where a pipeline would choose a device by itself; elsewhere there is no map.

        With a map a pipeline refuses any `device`, even the CPU; so there is none where there is nothing to keep it from.

        Raises:
            AttributeError: There is no accelerator.
        """
        seen = sys.modules.get("transformers.pipelines.base") or sys.modules["transformers.utils"]
        if any(getattr(seen, f"is_torch_{kind}_available", bool)() for kind in _ACCELERATORS):
            return {"": torch.device("cpu")}
        raise AttributeError("hf_device_map")

    @hf_device_map.setter
    def hf_device_map(self, device_map: dict[str, Any]) -> None:
        if {str(device) for device in device_map.values()} != {"cpu"}:
            raise ConfigError(f"device_map {device_map}: a pack computes on the CPU; leave it there")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_copy(f"the pack {self.flash.pack}")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy(f"the pack {self.flash.pack}")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save adapters where there are some; a pack itself is not saved.

        Raises:
            ConfigError: There is no adapter.
        """
        if not are_adapters_loaded(self):
            raise ConfigError(
                f"a loaded pack is not saved: its weights are on flash. Copy {self.flash.pack} to {save_directory}"
            )
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push adapters where there are some; a pack itself is uploaded as the folder that it is.

        Raises:
            ConfigError: There is no adapter.
        """
        if not are_adapters_loaded(self):
            raise ConfigError(f"a loaded pack is not pushed: upload its folder, {self.flash.pack}")
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def half(self, *args: Any) -> Any:
        """Change nothing in a float16 pack.

        Raises:
            ConfigError: The pack is of another dtype.
        """
        return nn.Module.half(self)  # type: ignore[type-var]

    def float(self, *args: Any) -> Any:
        """Change nothing in a float32 pack.

        Raises:
            ConfigError: The pack is of another dtype.
        """
        return nn.Module.float(self)  # type: ignore[type-var]

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter as transformers does, or leave the model as it was.

        Raises:
            ConfigError: Part of the adapter has no place in the streamed layers.
        """
        with _adapters_kept(self):
            info = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
            lost = [key for key in info.unexpected_keys if _streamed_around(self, key)]  # type: ignore[arg-type]
            if lost:
                _refuse_keys(self, lost, is_adapter=True)
            self.undo_adapter = None
            return info

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter as transformers does, or leave the model as it was."""
        with _adapters_kept(self):
            return super().add_adapter(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def _adapters_kept(model: Any) -> Iterator[None]:
    """Put transformers' note of whether there are adapters back where adding one is refused."""
    was_loaded = are_adapters_loaded(model)
    try:
        yield
    except FlashError as error:
        note_adapters(model, are_loaded=was_loaded)
        if model.undo_adapter is None:
            raise
        model.undo_adapter()  # its layers are in the model, and one of its weights has no place
        model.undo_adapter = None
        raise ConfigError(f"the adapter can't be loaded: {error}. {_WITHOUT_EMBEDDINGS}") from error


def is_streamed(module: nn.Module) -> bool:
    """Return whether weights of `module` itself are on flash."""
    return isinstance(module, StreamedModule) or any(
        isinstance(weight, StreamedWeight) for weight in module._parameters.values()
    )


def _streamed_around(model: nn.Module, key: str) -> bool:
    """Return whether a state-dict key leads to or into a streamed module."""
    for part in key.split("."):
        if is_streamed(model):
            return True
        child = model._modules.get(part)
        if child is None:
            return False
        model = child
    return is_streamed(model)


def _refuse_keys(model: Any, keys: list[str], *, is_adapter: bool = False) -> NoReturn:
    """Say of weights that they have no place; where they are an adapter's that was being loaded, take it back first."""
    for module in model.modules():
        if isinstance(module, LoadedPack) and module.undo_adapter is not None:
            module.undo_adapter()
            module.undo_adapter = None
            is_adapter = True
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    where = f"{keys[0]}{more} would go into a streamed layer"
    if is_adapter or ".lora_" in f".{keys[0]}":
        remedy = f". {_WITHOUT_EMBEDDINGS}" if any(".base_layer." in key for key in keys) else ""
        raise ConfigError(
            f"{where}, which takes plain LoRA on its linear layers and nothing else: put other weights into the checkpoint"
            f" and convert it again{remedy}"
        )
    raise ConfigError(
        f"{where}, whose weights are on flash and are not loaded from elsewhere: put them into the checkpoint and convert"
        " it again, or leave them out of the state dict and load the others with strict=False"
    )


def guard(model: PreTrainedModel) -> None:
    """Guard a loaded pack, and every module around its streamed layers.

    Methods are overridden by class: kept on the instances they would make cycles, and a model that is let go of would keep
    its memory until the garbage collector comes round.
    """
    dtype = getattr(torch, model.flash.manifest.dtype)
    seats = [
        module.seat for module in model.modules() if isinstance(module, StreamedModule) and module.seat is not None
    ]
    for module in list(_around(model)):
        if not isinstance(module, StreamedModule):
            module.__class__ = _guarded_class(type(module), LoadedPack if module is model else _Guarded, dtype)  # type: ignore[arg-type]
            if hasattr(module, "get_input_embeddings"):  # a model that may be called by itself
                module.register_forward_pre_hook(partial(_check_call, seats), with_kwargs=True)
        module.register_load_state_dict_pre_hook(_check_keys)  # type: ignore[no-untyped-call]


@cache
def _guarded_class(own: type[nn.Module], mixin: type, dtype: torch.dtype) -> type[nn.Module]:
    """Return `own` with the methods of `mixin`, under the same name: tools go by that."""
    members = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "flash_dtype": dtype,
    }
    return type(own.__name__, (mixin, own), members)


def _around(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module that is streamed or holds one that is."""
    for module in model.modules():
        if any(is_streamed(each) for each in module.modules()):
            yield module


def _check_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights for what is streamed, before any other of `state_dict` is loaded."""
    for name, each in module.named_modules():
        if not is_streamed(each):
            continue
        start = f"{prefix}{name}." if name else prefix
        given = [key for key in state_dict if key.startswith(start)]
        if not given:
            continue
        own = each.state_dict(prefix=start, keep_vars=True)
        lost = [
            key
            for key in given
            if key not in own or (isinstance(own[key], StreamedWeight) and state_dict[key] is not own[key])
        ]
        if lost:
            _refuse_keys(module, lost)
    if isinstance(module, LoadedPack):
        module.undo_adapter = None


def _check_call(seats: list[Seat], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that are not on the CPU, and adapters that would not be served, before a pass begins."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and not value.is_cpu:
            raise ConfigError(f"an input is on {value.device}, but a pack computes on the CPU: move it there")
    for seat in seats:
        seat.check()
