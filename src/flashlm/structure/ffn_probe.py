"""Proof by numbers that a module is the FFN it looks like: its own forward on small random weights against the formula.

A module is copied with its linear layers shrunk to a few elements, so a layer of any size is checked in milliseconds
and without its weights. Inputs of two sizes are tried, since clamps and gates on magnitude show only on large ones.

A module may also take the residual and add it (BLOOM, MPT). Then only its linear layers and its activation are replaced,
and the proof is that the module with these replaced still gives what it gave.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from flashlm.transformers_seam import Conv1D

_HIDDEN = 12
_ROWS = 20
_SCALES = (1.0, 40.0)
_SAME = (
    1e-7  # formulas that differ in the last digits of a constant; the least of real differences is 1e-4 (tanh for erf)
)
_USUAL = ("silu", "gelu", "gelu_new", "relu", "relu2")


@dataclass(frozen=True, kw_only=True)
class FfnParts:
    """Names of the linear children of an FFN module.

    Attributes:
        gate: The gate, None where there is none or where it is fused.
        up: The up-projection; holds gate and up rows where `is_fused`.
        down: The down-projection.
        is_fused: Whether `up` holds the gate's outputs first, then the up outputs.
    """

    gate: str | None
    up: str
    down: str
    is_fused: bool


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer whose weights can be placed: `nn.Linear` or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer."""
    weight = module.get_parameter("weight")
    return (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])


def neuron_axis(module: nn.Module, *, neurons_are_outputs: bool) -> int:
    """Return the weight axis along which neurons run: `nn.Linear` is (out, in), `Conv1D` is (in, out)."""
    output_axis = 1 if isinstance(module, Conv1D) else 0
    return output_axis if neurons_are_outputs else 1 - output_axis


def activation_name(activation: nn.Module, configured: Iterable[str]) -> str | None:
    """Return the `ACT2FN` name of an activation module, or None where it is none of them.

    Names in `configured` (the config's own settings) win over others that do the same. A class that transformers' table
    does not have is named by what it computes. One with weights of its own has no name here: see `learned_name`.
    """
    if has_weights(activation):
        return None
    candidates = [name for name in dict.fromkeys([*configured, *ACT2FN]) if name in ACT2FN]
    for is_same in (_is_of_class, _computes_the_same):
        for name in candidates:
            if is_same(activation, name):
                return str(name)
    return None


def learned_name(activation: nn.Module) -> str | None:
    """Return the `ACT2FN` name of an activation with weights of its own, or None where it is none that can be kept.

    Its weights must be single numbers: one for each neuron would have to lie with the rows.
    """
    if not has_weights(activation) or any(p.numel() != 1 for p in (*activation.parameters(), *activation.buffers())):
        return None
    for name in ACT2FN:
        if type(activation) is _class_of(name):
            return str(name)
    return None


def has_weights(activation: nn.Module) -> bool:
    """Return whether an activation has weights of its own (xIELU, PReLU)."""
    return any(True for _ in activation.parameters()) or any(True for _ in activation.buffers())


def find_learned(module: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Return the child of `module` that is the activation `name`, with its name, where that one has weights of its own."""
    for child_name, child in module.named_children():
        if type(child) is _class_of(name) and has_weights(child):
            return child_name, child
    return None


def _class_of(name: str) -> type[nn.Module] | None:
    cls = ACT2CLS.get(name)  # a program may have added an instance only
    found: type[nn.Module] | None = cls[0] if isinstance(cls, tuple) else cls
    return found


def _is_of_class(activation: nn.Module, name: str) -> bool:
    if type(activation) is not _class_of(name):
        return False
    grid = torch.linspace(-20.0, 20.0, 1001)
    return torch.equal(activation(grid), ACT2FN[name](grid))


def _computes_the_same(activation: nn.Module, name: str) -> bool:
    """Compare two activations in double precision, on small and on large values, in more than one shape and order."""
    candidate = ACT2FN[name].double()
    if has_weights(candidate):
        return False
    grid = torch.cat([torch.linspace(-20.0, 20.0, 4001), torch.linspace(-3e4, 3e4, 999)]).double()
    shuffled = grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))]
    for values in (grid.view(8, -1), shuffled[None]):
        wanted = candidate(values)
        try:
            with torch.no_grad():
                found = activation(values)
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, NotImplementedError):
            return False
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            return False
        if not torch.allclose(found.double(), wanted, rtol=_SAME, atol=_SAME):
            return False
    return True


def takes_residual(module: nn.Module) -> bool:
    """Return whether a module's forward wants a second tensor beside the hidden states."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in kinds and each.default is inspect.Parameter.empty for each in parameters) == 2


def find_function(module: nn.Module, parts: FfnParts, configured: Iterable[str]) -> str | None:
    """Return the `ACT2FN` name of the activation that a module without an activation module computes, or None."""
    for name in dict.fromkeys([*configured, *_USUAL, *ACT2FN]):
        if name in ACT2FN and not has_weights(ACT2FN[name]) and prove(module, parts, name) is None:
            return str(name)
    return None


def prove(module: nn.Module, parts: FfnParts, activation: str, *, learned: str | None = None) -> str | None:
    """Return None where `module` computes the FFN formula, else what is wrong with it.

    Args:
        module: The module; its weights are not looked at.
        parts: Its linear layers.
        activation: Name in `ACT2FN`.
        learned: Name of the child that is the activation, where that one has weights of its own.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _shrunk(module, parts, generator)
    act = ACT2FN[activation].double()
    if learned is not None:
        with torch.no_grad():
            for weight in act.parameters():
                weight.add_(0.1 * torch.rand(weight.shape, generator=generator, dtype=weight.dtype))
        twin._modules[learned] = act
    for scale in _SCALES:
        hidden = torch.randn(1, 1, _HIDDEN, generator=generator, dtype=torch.float64) * scale
        try:
            with torch.no_grad():
                actual = twin(hidden)
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
            return f"does not run as a plain feed-forward layer: {error}"
        wanted = _formula(twin, parts, act, hidden)
        if not isinstance(actual, torch.Tensor) or actual.shape != wanted.shape:
            return "does not return one tensor of its input's shape"
        if not _is_close(actual, wanted):
            return f"computes something else than {_describe(parts)}"
    return None


def prove_in_place(module: nn.Module, parts: FfnParts, activation: str, child: str) -> str | None:
    """Return None where a module that takes the residual gives the FFN formula plus that, else what is wrong.

    It is run as it is, and with its up-projection doing the whole FFN, its activation `child` and its down-projection doing
    nothing: that is how it will run.
    """
    generator = torch.Generator().manual_seed(0)
    twin = _shrunk(module, parts, generator)
    placed = copy.copy(twin)
    whole = _Whole(twin, parts, ACT2FN[activation])
    placed.__dict__["_modules"] = {
        **twin._modules, parts.up: whole, child: nn.Identity(), parts.down: nn.Identity(),
    }  # fmt: skip
    for scale in _SCALES:
        hidden = torch.randn(1, 3, _HIDDEN, generator=generator, dtype=torch.float64) * scale
        residual = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                found = [each(hidden, residual) for each in (twin, placed)]
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
            return f"does not run as a feed-forward layer that adds the residual: {error}"
        wanted = whole(hidden) + residual
        if not all(isinstance(each, torch.Tensor) and each.shape == wanted.shape for each in found):
            return "does not return one tensor of its input's shape"
        if not all(_is_close(each, wanted) for each in found):
            return f"computes something else than {_describe(parts)} + residual"
    return None


class _Whole(nn.Module):
    """The formula of a shrunken module."""

    def __init__(self, twin: nn.Module, parts: FfnParts, activation: nn.Module) -> None:
        super().__init__()
        self._arguments = (twin, parts, activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _formula(*self._arguments, hidden)


def _is_close(actual: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(actual, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def _describe(parts: FfnParts) -> str:
    return "down(act(gate(x)) * up(x))" if parts.gate or parts.is_fused else "down(act(up(x)))"


def _formula(twin: nn.Module, parts: FfnParts, activation: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        up = _apply(twin.get_submodule(parts.up), hidden)
        if parts.is_fused:
            gate, up = up[..., :_ROWS], up[..., _ROWS:]
            inner = activation(gate) * up
        elif parts.gate is not None:
            inner = activation(_apply(twin.get_submodule(parts.gate), hidden)) * up
        else:
            inner = activation(up)
        return _apply(twin.get_submodule(parts.down), inner)


def _apply(linear: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the plain affine map, whatever a subclass of `nn.Linear` may do in its forward."""
    weight = linear.get_parameter("weight")
    out = hidden @ (weight if isinstance(linear, Conv1D) else weight.T)
    bias = getattr(linear, "bias", None)
    return out if bias is None else out + bias


def _shrunk(module: nn.Module, parts: FfnParts, generator: torch.Generator) -> nn.Module:
    up_width = 2 * _ROWS if parts.is_fused else _ROWS
    sizes = {parts.up: (_HIDDEN, up_width), parts.down: (_ROWS, _HIDDEN)}
    if parts.gate is not None:
        sizes[parts.gate] = (_HIDDEN, _ROWS)
    twin = copy.copy(module)  # shallow: the config and the meta weights stay shared and untouched
    children = dict(module._modules)
    for name, (inputs, outputs) in sizes.items():
        children[name] = _small_linear(module.get_submodule(name), inputs, outputs, generator)
    twin.__dict__["_modules"] = children
    return twin


def _small_linear(linear: nn.Module, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    small = copy.copy(linear)
    shape = (inputs, outputs) if isinstance(linear, Conv1D) else (outputs, inputs)
    parameters: dict[str, nn.Parameter | None] = dict.fromkeys(linear._parameters)
    parameters["weight"] = _random(shape, generator)
    if linear._parameters.get("bias") is not None:
        parameters["bias"] = _random((outputs,), generator)
    small.__dict__["_parameters"] = parameters
    sizes = {"nf": outputs, "nx": inputs} if isinstance(linear, Conv1D) else {}
    small.__dict__.update(sizes or {"in_features": inputs, "out_features": outputs})
    return small


def _random(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False)
