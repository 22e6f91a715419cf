"""Where adapters attach to a streamed layer: stand-ins for its family's linear layers, which peft wraps as it wraps any.

A wrapper's own forward never runs: the streamed layer reads its two matrices and computes beside its rows (`adapters`).
Adapters of any other kind than plain LoRA are refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flashlm.engine.adapters import AdapterPass, Branch, read_branches
from flashlm.engine.standin import StreamedActivation, StreamedConv1D, StreamedLinear, StreamedWeight
from flashlm.errors import ConfigError
from flashlm.structure.families import in_layer_parts, linear_parts
from flashlm.transformers_seam import Conv1D

if TYPE_CHECKING:
    from flashlm.engine.ffn import FlashFFN
    from flashlm.pack.manifest import UnitEntry

_LORA = "peft.tuners.lora.layer.Linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Linears:
    """The linear layers of the module that a streamed layer replaces.

    Attributes:
        names: Of each role ("gate", "up", "down") the child's name; a fused gate is part of "up".
        is_fused: Whether "up" holds the gate's outputs first.
        is_in_layer: Whether they are children of the decoder layer itself.
        has_bias: Of each role.
        is_conv: Whether they are GPT-2's `Conv1D`.
    """

    names: dict[str, str]
    is_fused: bool
    is_in_layer: bool
    has_bias: dict[str, bool]
    is_conv: bool


def find_linears(model: nn.Module, entry: UnitEntry) -> Linears | None:
    """Return the linear layers that the streamed layer of `entry` will replace in `model`; None where they are unknown."""
    owner = model.get_submodule(entry.module)
    parts = linear_parts(owner)
    is_in_layer = parts is None
    if parts is None:
        owner = model.get_submodule(entry.module.rpartition(".")[0])
        parts = in_layer_parts(owner)
        if parts is None or parts.up != entry.module.rpartition(".")[2]:
            return None
    names = {"up": parts.up, "down": parts.down} | ({} if parts.gate is None else {"gate": parts.gate})
    children = {role: owner.get_submodule(name) for role, name in names.items()}
    return Linears(
        names=names,
        is_fused=parts.is_fused,
        is_in_layer=is_in_layer,
        has_bias={role: getattr(child, "bias", None) is not None for role, child in children.items()},
        is_conv=isinstance(children["up"], Conv1D),
    )


@dataclass(kw_only=True, slots=True)
class Seat:
    """Where adapters attach to one streamed layer.

    Attributes:
        path: The layer's name, for messages.
        linears: The linear layers that it stands for.
        owner: The module whose children they are.
        stand_ins: Of each role its stand-in, which the owner or a wrapper of it keeps alive.
        order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
        activation: Name of the owner's activation, where that is another module than the streamed layer.
        forwards: In a decoder layer that holds the parts itself: what a wrapper of a role does instead of its own forward.
    """

    path: str
    linears: Linears
    owner: weakref.ref[nn.Module]
    stand_ins: dict[str, weakref.ref[nn.Module]]
    order: torch.Tensor | None
    activation: str | None = None
    forwards: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)

    def wrappers(self) -> Iterator[tuple[str, Any]]:
        """Yield role and module of every stand-in that something has been put in the place of."""
        owner = self.owner()
        if owner is None:  # a layer that was taken out of the model
            return
        for role, stand_in in self.stand_ins.items():
            child = owner._modules.get(self.linears.names[role])
            if child is not stand_in():
                yield role, child

    def check_child(self, name: str, child: nn.Module) -> None:
        """Refuse a module in the streamed layer that would never run.

        Raises:
            ConfigError: It is neither a wrapper of one of the linear layers nor a stand-in that comes back.
        """
        if name not in self.linears.names.values() or not (
            hasattr(child, "base_layer") or hasattr(child, "flash_name")
        ):
            raise ConfigError(
                f"{self.path}.{name} can't be replaced by {type(child).__name__}, which would not run. Change the"
                " checkpoint, and convert it again"
            )

    def take_over(self) -> None:
        """Let the wrappers in a decoder layer hand their input on: the streamed layer does the work of all."""
        owner = self.owner()
        activation = None if owner is None or self.activation is None else owner._modules[self.activation]
        if activation is not None and not isinstance(activation, StreamedActivation):
            raise ConfigError(
                f"{self.path.rpartition('.')[0]}.{self.activation} was replaced by {type(activation).__name__}: the streamed"
                " layer has an activation of its own. Change the checkpoint, and convert it again"
            )
        for role, wrapper in self.wrappers():
            self._check(role, wrapper)
            wrapper.forward = self.forwards[role]

    def check(self, *, will_run: bool = True) -> None:
        """Refuse adapters that would not be served right; in training mode only where a pass is about to run.

        Raises:
            ConfigError: Another kind than plain LoRA, one that has been merged, or one in training.
        """
        for role, wrapper in self.wrappers():
            self._check(role, wrapper, will_run=will_run)

    def _check(self, role: str, wrapper: Any, *, will_run: bool = True) -> None:
        name = self.path_of(role)
        kind = f"{type(wrapper).__module__}.{type(wrapper).__qualname__}"
        if kind != _LORA or wrapper.base_layer is not self.stand_ins[role]():
            raise ConfigError(f"{kind} on the streamed {name} is not supported: only plain LoRA adapters are")
        for adapter, variant in wrapper.lora_variant.items():
            raise ConfigError(
                f"adapter {adapter!r} is {type(variant).__name__} on the streamed {name}: only plain LoRA is supported"
            )
        if wrapper.merged_adapters:
            raise ConfigError(f"adapter {wrapper.merged_adapters} has been merged into the streamed {name}: unmerge it")
        if wrapper.__dict__.get("forward", self.forwards.get(role)) is not self.forwards.get(role):
            raise ConfigError(f"the forward of the adapter on the streamed {name} was replaced: it would not be called")
        if wrapper._forward_hooks:
            raise ConfigError(f"a hook on the adapter of the streamed {name} would not be called: remove it")
        dropouts = (each for each in wrapper.lora_dropout.values() if isinstance(each, nn.Dropout) and each.training)
        if will_run and any(each.p > 0 for each in dropouts):
            raise ConfigError(f"the adapter on the streamed {name} is in training mode: call model.eval() first")

    def path_of(self, role: str) -> str:
        """Return the full name of the linear layer of `role`."""
        parent = self.path.rpartition(".")[0] if self.linears.is_in_layer else self.path
        return f"{parent}.{self.linears.names[role]}"

    def begin(self, hidden_states: torch.Tensor) -> AdapterPass | None:
        """Return the adapters that act on a pass over `hidden_states` (..., hidden_size); None where there are none.

        Raises:
            ConfigError: An adapter that would not be served right.
        """
        branches: dict[str, list[Branch]] = {}
        for role, wrapper in self.wrappers():
            self._check(role, wrapper)
            if self.linears.is_in_layer and "forward" not in wrapper.__dict__:
                raise ConfigError(f"{self.path_of(role)} has an adapter: call the model, not this layer by itself")
            found = read_branches(wrapper, self.path_of(role), hidden_states)
            if found:
                branches[role] = found
        num_tokens = hidden_states[..., 0].numel()
        return AdapterPass(branches, self.linears.is_fused, self.order, num_tokens) if branches else None


def attach(ffn: FlashFFN, entry: UnitEntry, owner: nn.Module, linears: Linears, order: torch.Tensor | None) -> None:
    """Give a loaded streamed layer the stand-ins of its family's linear layers, and a seat for adapters.

    Args:
        ffn: The layer, bound.
        entry: Where it is in the model.
        owner: The decoder layer around it, where that holds the parts itself; else not used.
        linears: What it stands for.
        order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
    """
    hidden_size, num_rows = ffn.layout.hidden_size, ffn.layout.num_rows
    sizes = {
        "gate": (hidden_size, num_rows),
        "up": (hidden_size, num_rows * (2 if linears.is_fused else 1)),
        "down": (num_rows, hidden_size),
    }
    dtype = ffn._dtype
    holder = owner if linears.is_in_layer else ffn
    seat = Seat(path=entry.module, linears=linears, owner=weakref.ref(holder), stand_ins={}, order=order)
    for role, name in sorted(linears.names.items(), key=lambda item: list(sizes).index(item[0])):
        full = seat.path_of(role)
        if linears.is_in_layer and role == "up":  # the streamed layer itself lies there
            ffn.become_linear(StreamedWeight(f"{full}.weight", (num_rows, hidden_size), dtype))
            seat.stand_ins[role] = weakref.ref(ffn)
            continue
        make = StreamedConv1D if linears.is_conv else StreamedLinear
        stand_in = make(full, *sizes[role], dtype, has_bias=linears.has_bias[role])
        stand_in.passes_through = linears.is_in_layer
        stand_in.eval()
        holder.add_module(name, stand_in)
        seat.stand_ins[role] = weakref.ref(stand_in)
    if linears.is_in_layer:
        others = {name.rpartition(".")[2] for name in entry.identities} - {linears.names["down"]}
        seat.activation = next(iter(others), None)
        whole = weakref.ref(ffn)  # a cycle would keep the model's memory when it is let go of
        seat.forwards = {"up": lambda x, *_, **__: whole()(x), "down": lambda x, *_, **__: x}  # type: ignore[misc]
        owner.register_forward_pre_hook(lambda module, args: seat.take_over())
    ffn.seat = seat
