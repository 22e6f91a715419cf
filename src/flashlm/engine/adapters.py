"""LoRA adapters on streamed layers: the low-rank part runs beside the rows, in the loop over blocks.

`attach` gives a streamed layer the linear layers of its family under their own names (stand-ins, without weights), which
peft wraps as it wraps any. A wrapper's own forward never runs: the streamed layer reads its two small matrices, adds
`expand(reduce(x))` to the gate and up products of the rows at hand before the activation, and the down-projection's share
after. Rows may lie in another order than the checkpoint's neurons; adapters know neurons.

Sums are as those of the rows: where the row kernels run, a token gets the same bits alone and in a batch and whatever the
placement; the products of a prompt are cut as its blocks are. Adapters of any other kind are refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flashlm import kernels
from flashlm.engine.standin import StreamedConv1D, StreamedLinear, StreamedWeight
from flashlm.errors import ConfigError
from flashlm.pack.families import in_layer_parts, linear_parts

if TYPE_CHECKING:
    from flashlm.engine.ffn import FlashFFN
    from flashlm.pack.manifest import LayerEntry

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


def find_linears(model: nn.Module, entry: LayerEntry) -> Linears | None:
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


@dataclass(frozen=True, slots=True)
class _Branch:
    """One adapter on one linear layer: `scaling * (expand · reduce · x + bias)`.

    Attributes:
        reduce: (rank, in_features).
        expand: (out_features, rank).
        bias: (out_features,), or None.
        scaling: Its factor.
        tokens: int64, which tokens of the pass it is for; None is all.
    """

    reduce: torch.Tensor
    expand: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    tokens: torch.Tensor | None


@dataclass(kw_only=True, slots=True)
class Seat:
    """Where adapters attach to one streamed layer.

    Attributes:
        path: The layer's name, for messages.
        linears: The linear layers that it stands for.
        owner: The module whose children they are.
        stand_ins: Of each role its stand-in.
        order: int64 (num_rows,): which neuron each row is; None where rows lie in the checkpoint's order.
        forwards: In a decoder layer that holds the parts itself: what a wrapper of a role does instead of its own forward.
    """

    path: str
    linears: Linears
    owner: weakref.ref[nn.Module]
    stand_ins: dict[str, nn.Module]
    order: torch.Tensor | None
    forwards: dict[str, Callable[..., torch.Tensor]] = field(default_factory=dict)

    def wrappers(self) -> Iterator[tuple[str, Any]]:
        """Yield role and module of every stand-in that something has been put in the place of."""
        owner = self.owner()
        assert owner is not None
        for role, stand_in in self.stand_ins.items():
            child = owner._modules.get(self.linears.names[role])
            if child is not stand_in:
                yield role, child

    def take_over(self) -> None:
        """Let the wrappers in a decoder layer hand their input on: the streamed layer does the work of all."""
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
        if kind != _LORA or wrapper.base_layer is not self.stand_ins[role]:
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
        branches: dict[str, list[_Branch]] = {}
        for role, wrapper in self.wrappers():
            self._check(role, wrapper)
            if self.linears.is_in_layer and "forward" not in wrapper.__dict__:
                raise ConfigError(f"{self.path_of(role)} has an adapter: call the model, not this layer by itself")
            found = _branches(wrapper, self.path_of(role), hidden_states)
            if found:
                branches[role] = found
        return AdapterPass(self, branches) if branches else None


def _branches(wrapper: Any, name: str, hidden_states: torch.Tensor) -> list[_Branch]:
    """Return the adapters of a LoRA wrapper that act on a pass."""
    chosen = _names_by_sequence(wrapper, name)
    if wrapper.disable_adapters:
        return []
    tokens_of: dict[str, torch.Tensor | None] = dict.fromkeys(wrapper.active_adapters)
    if chosen is not None:
        if len(chosen) != len(hidden_states):
            raise ConfigError(f"adapter_names has {len(chosen)} names for {len(hidden_states)} sequences at {name}")
        numbers = torch.arange(hidden_states[..., 0].numel()).view(len(chosen), -1)
        tokens_of = {
            each: numbers[torch.tensor([other == each for other in chosen])].flatten() for each in dict.fromkeys(chosen)
        }
    found = []
    for adapter, tokens in tokens_of.items():
        if adapter not in wrapper.lora_A:
            continue
        reduce, expand = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
        bias = None if expand.bias is None else expand.bias.detach().to(torch.float32)
        found.append(
            _Branch(reduce.weight.detach(), expand.weight.detach(), bias, float(wrapper.scaling[adapter]), tokens)
        )
    return found


def _names_by_sequence(wrapper: Any, name: str) -> list[str] | None:
    """Return the adapter of each sequence where peft mixes several in a batch: it says so by a hook on every wrapper."""
    names: list[str] | None = None
    for hook in wrapper._forward_pre_hooks.values():
        keywords = getattr(hook, "keywords", None) or {}
        if set(keywords) != {"adapter_names"}:
            raise ConfigError(f"a hook on the adapter of the streamed {name} would not be called: remove it")
        names = keywords["adapter_names"]
    return names


class AdapterPass:
    """The adapters of one layer in one pass.

    Args:
        seat: The layer's.
        branches: Of each role those that act.
    """

    def __init__(self, seat: Seat, branches: dict[str, list[_Branch]]) -> None:
        self._seat = seat
        self._branches = branches
        self._by_rows = False
        self._reduced: dict[str, list[torch.Tensor]] = {}
        self._hidden: torch.Tensor | None = None
        self._down: list[torch.Tensor] = []

    def prepare(self, tokens: torch.Tensor, num_rows: int, *, by_rows: bool) -> None:
        """Reduce the layer's input (num_tokens, hidden_size); `by_rows`: as the row kernels sum, else as matrix products."""
        self._by_rows = by_rows
        tokens = tokens.detach().to(torch.float32).contiguous()
        for role, branches in self._branches.items():
            if role != "down":
                self._reduced[role] = [
                    self._product(_some(tokens, each), each.reduce) * each.scaling for each in branches
                ]
        down = self._branches.get("down", [])
        if down and by_rows:  # runs of blocks are cut as the placement wills, so their sum waits for all of them
            self._hidden = torch.zeros(len(tokens), num_rows, dtype=torch.float32)
        else:
            self._down = [torch.zeros(len(_some(tokens, each)), len(each.reduce), dtype=torch.float32) for each in down]

    def shift(self, up: torch.Tensor, gate: torch.Tensor | None, span: range, num_rows: int) -> None:
        """Add the adapters' share to the products of rows `span`, fp32 (num_tokens, rows), in place."""
        is_fused = self._seat.linears.is_fused
        self._add("up", up, span, first=num_rows if is_fused else 0)
        if gate is not None:
            self._add("up" if is_fused else "gate", gate, span, first=0)

    def collect(self, hidden: torch.Tensor, span: range) -> None:
        """Take the hidden activations of rows `span`, fp32 (num_tokens, rows)."""
        if self._hidden is not None:
            self._hidden[:, span.start : span.stop] = hidden
        for reduced, branch in zip(self._down, self._branches.get("down", []), strict=False):
            reduced += F.linear(_some(hidden, branch), branch.reduce[:, self._neurons(span)].to(torch.float32))

    def finish(self, output: torch.Tensor) -> None:
        """Add the down-projection's share to fp32 `output` (num_tokens, hidden_size)."""
        for index, branch in enumerate(self._branches.get("down", [])):
            if self._hidden is not None:
                hidden, order = _some(self._hidden, branch), self._seat.order
                if order is not None:
                    in_order = torch.empty_like(hidden)
                    in_order[:, order] = hidden
                    hidden = in_order
                reduced = self._product(hidden, branch.reduce)
            else:
                reduced = self._down[index]
            self._expand(reduced * branch.scaling, branch, slice(None), output)

    def _add(self, role: str, target: torch.Tensor, span: range, *, first: int) -> None:
        neurons = self._neurons(span, first)
        for reduced, branch in zip(self._reduced.get(role, []), self._branches.get(role, []), strict=True):
            self._expand(reduced, branch, neurons, target)

    def _expand(
        self, reduced: torch.Tensor, branch: _Branch, outputs: slice | torch.Tensor, target: torch.Tensor
    ) -> None:
        share = self._product(reduced, branch.expand[outputs])
        if branch.bias is not None:
            share += branch.bias[outputs] * branch.scaling
        if branch.tokens is None:
            target += share
        else:
            target[branch.tokens] += share

    def _neurons(self, span: range, first: int = 0) -> slice | torch.Tensor:
        order = self._seat.order
        if order is None:
            return slice(first + span.start, first + span.stop)
        return order[span.start : span.stop] + first

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x·weightᵀ in fp32; by our kernels a few tokens at a time, which give a token the same bits in any batch."""
        weight = weight.to(torch.float32).contiguous()
        if not self._by_rows:
            return F.linear(x, weight)
        pieces = torch.split(x.contiguous(), kernels.MAX_TOKENS)
        return torch.cat([kernels.linear(some, weight, None) for some in pieces])


def _some(values: torch.Tensor, branch: _Branch) -> torch.Tensor:
    return values if branch.tokens is None else values[branch.tokens]


def attach(ffn: FlashFFN, path: str, owner: nn.Module, linears: Linears, order: torch.Tensor | None) -> None:
    """Give a loaded streamed layer the stand-ins of its family's linear layers, and a seat for adapters.

    Args:
        ffn: The layer, bound.
        path: Its name in the model.
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
    dtype = getattr(torch, ffn.layout.dtype)
    holder = owner if linears.is_in_layer else ffn
    seat = Seat(path=path, linears=linears, owner=weakref.ref(holder), stand_ins={}, order=order)
    for role, name in sorted(linears.names.items(), key=lambda item: list(sizes).index(item[0])):
        full = seat.path_of(role)
        if linears.is_in_layer and role == "up":  # the streamed layer itself lies there
            ffn.become_linear(StreamedWeight(f"{full}.weight", (num_rows, hidden_size), dtype))
            seat.stand_ins[role] = ffn
            continue
        make = StreamedConv1D if linears.is_conv else StreamedLinear
        stand_in = make(full, *sizes[role], dtype, has_bias=linears.has_bias[role])
        stand_in.passes_through = linears.is_in_layer
        stand_in.eval()
        holder.add_module(name, stand_in)
        seat.stand_ins[role] = stand_in
    if linears.is_in_layer:
        seat.forwards = {"up": lambda x, *args, **kwargs: ffn(x), "down": lambda x, *args, **kwargs: x}
        owner.register_forward_pre_hook(lambda module, args: seat.take_over())
    ffn.seat = seat
