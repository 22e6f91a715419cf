"""Proof by numbers that a module is the FFN it looks like: its own forward on small random weights against the formula.

A module is copied with its linear layers shrunk to a few elements, so a layer of any size is checked in milliseconds
and without its weights. Inputs of two sizes are tried, since clamps and gates on magnitude show only on large ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from flashlm.transformers_seam import Conv1D

_HIDDEN = 12
_ROWS = 20
_SCALES = (1.0, 40.0)


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

    Names in `configured` (the config's own settings) win over others that do the same. An activation with weights of
    its own has no name: a pack could not hold them.
    """
    if any(True for _ in activation.parameters()) or any(True for _ in activation.buffers()):
        return None
    for name in dict.fromkeys([*configured, *ACT2FN]):
        if name in ACT2FN and _is_same_activation(activation, name):
            return str(name)
    return None


def _is_same_activation(activation: nn.Module, name: str) -> bool:
    cls = ACT2CLS[name]
    if type(activation) is not (cls[0] if isinstance(cls, tuple) else cls):
        return False
    candidate = ACT2FN[name]
    grid = torch.linspace(-20.0, 20.0, 1001)
    return torch.equal(activation(grid), candidate(grid))


def prove(module: nn.Module, parts: FfnParts, activation: str) -> str | None:
    """Return None where `module` computes the FFN formula, else what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    twin = _shrunk(module, parts, generator)
    for scale in _SCALES:
        hidden = torch.randn(1, 1, _HIDDEN, generator=generator, dtype=torch.float64) * scale
        try:
            with torch.no_grad():
                actual = twin(hidden)
        except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
            return f"does not run as a plain feed-forward layer: {error}"
        wanted = _formula(twin, parts, ACT2FN[activation], hidden)
        if not isinstance(actual, torch.Tensor) or actual.shape != wanted.shape:
            return "does not return one tensor of its input's shape"
        if not torch.allclose(actual, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())):
            return f"computes something else than {_describe(parts)}"
    return None


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
