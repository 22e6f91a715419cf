"""Where the feed-forward layers (FFNs) of a transformers model are, found by structure and not by a class per model.

An FFN is `down(act(up(x)))` or `down(act(gate(x)) * up(x))`. Its parts are recognised by the names that model authors
give them (`_SHAPES`); a few models keep the parts in the decoder layer itself (`_IN_LAYER`). Names can lie, so
`ffn_probe` runs every module found this way on small random weights against the formula. Models whose FFN is anything
else (extra scales or norms) are refused by name. Experts are found by `experts`. Needs the model on the meta device only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flashlm.errors import UnsupportedModelError
from flashlm.rows.layout import Part
from flashlm.structure.ffn_probe import (
    FfnParts,
    activation_name,
    find_function,
    has_weights,
    is_linear,
    learned_name,
    linear_sizes,
    neuron_axis,
    prove,
    prove_in_place,
    takes_residual,
)


@dataclass(frozen=True, kw_only=True)
class PartSource:
    """The weights of one part of a row, or one bias, inside a state-dict tensor.

    Attributes:
        name: State-dict name of the tensor.
        neuron_axis: The axis along which neurons run: 0 where a neuron is a row of the tensor, 1 where it is a column.
        first_neuron: Index on that axis of the layer's first neuron (above zero in the second half of a fused tensor).
    """

    name: str
    neuron_axis: int = 0
    first_neuron: int = 0


@dataclass(frozen=True, kw_only=True)
class FfnLayer:
    """One feed-forward layer.

    Attributes:
        module: Dotted path of the module that the streamed FFN replaces.
        identities: Dotted paths of modules whose work the streamed FFN takes over.
        hidden_size: Width of its input and output (d_model).
        num_rows: Its neurons (d_ffn).
        activation: Name in transformers' `ACT2FN`.
        gate, up, down: Where the weights are; `gate` is None in an ungated FFN.
        gate_bias, up_bias, down_bias: Where the biases are, None where there is none.
    """

    module: str
    identities: tuple[str, ...]
    hidden_size: int
    num_rows: int
    activation: str
    gate: PartSource | None
    up: PartSource
    down: PartSource
    gate_bias: PartSource | None
    up_bias: PartSource | None
    down_bias: PartSource | None

    @property
    def has_gate(self) -> bool:
        """Whether the FFN is gated."""
        return self.gate is not None

    @property
    def parts(self) -> tuple[PartSource, ...]:
        """The weights in the order in which a row holds them."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def bias_parts(self) -> tuple[Part, ...]:
        """The parts that have a bias, in the order of the weights."""
        biases: dict[Part, PartSource | None] = {"gate": self.gate_bias, "up": self.up_bias, "down": self.down_bias}
        return tuple(part for part, source in biases.items() if source is not None)

    @property
    def biases(self) -> dict[str, PartSource]:
        """The biases that exist, by the name under which a pack holds them."""
        named = {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}
        return {f"{self.module}.{name}": source for name, source in named.items() if source is not None}


@dataclass(frozen=True)
class _Shape:
    up: str
    down: str
    gate: str | None = None
    is_fused: bool = False  # `up` holds the gate's rows first, then the up rows


_SHAPES = (
    _Shape(gate="gate_proj", up="up_proj", down="down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, StableLM, Granite...
    _Shape(up="gate_up_proj", down="down_proj", is_fused=True),  # Phi-3, GLM
    _Shape(up="up_proj", down="down_proj"),  # Nemotron, Arcee
    _Shape(up="fc1", down="fc2"),  # Phi
    _Shape(up="dense_h_to_4h", down="dense_4h_to_h"),  # Falcon, GPT-NeoX, Persimmon
    _Shape(up="c_fc", down="c_proj"),  # GPT-2, GPT-Neo, Starcoder2, GPT-BigCode
    _Shape(up="fc_in", down="fc_out"),  # GPT-J, CodeGen
    _Shape(gate="w1", up="w3", down="w2"),  # LFM2, LFM3
    _Shape(up="Wi", down="Wo", is_fused=True),  # ModernBERT's decoder
)

# Decoder layers that hold the parts themselves. Their forward can't be run apart, so each was read by a person:
# `fc2(activation_fn(fc1(x)))` with nothing but dropout and reshapes between.
_IN_LAYER = {
    "OPTDecoderLayer": (_Shape(up="fc1", down="fc2"), "activation_fn"),
    "XGLMDecoderLayer": (_Shape(up="fc1", down="fc2"), "activation_fn"),
    "BioGptDecoderLayer": (_Shape(up="fc1", down="fc2"), "activation_fn"),
}

_EXPERTS = re.compile(r"moe|experts|router", re.IGNORECASE)
_WHOLES = ("Layer", "Block", "Model", "ForCausalLM", "ForConditionalGeneration")


def linear_parts(module: nn.Module) -> FfnParts | None:
    """Return the names of the linear layers of an FFN module, by name alone; None where it does not look like one."""
    children = dict(module.named_children())
    for shape in _SHAPES:
        roles = [role for role in (shape.gate, shape.up, shape.down) if role is not None]
        if all(role in children and is_linear(children[role]) for role in roles):
            return _parts(module, shape)
    return None


def in_layer_parts(layer: nn.Module) -> FfnParts | None:
    """Return the same of a decoder layer that holds the parts itself."""
    found = _IN_LAYER.get(type(layer).__name__)
    return None if found is None else _parts(layer, found[0])


def build_meta_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of `config` without memory for its weights (meta device, eval mode).

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model's class has ways of its own to stumble over its config
        raise UnsupportedModelError(
            f"transformers can't build a causal language model of type {config.model_type!r}:"
            f" {type(error).__name__}: {error}"
        ) from error
    return model.eval()


def find_ffn_layers(model: PreTrainedModel) -> tuple[FfnLayer, ...]:
    """Return the FFNs of `model` in the order in which a forward pass meets them, one for each decoder layer.

    Raises:
        UnsupportedModelError: An FFN that can't be placed, none or several in a layer, or layers that disagree.
    """
    _refuse_experts(model)
    path, layers = decoder_layers(model)
    found = tuple(_ffn_of_layer(model, f"{path}.{index}", layer) for index, layer in enumerate(layers))
    for what in ("hidden_size", "has_gate", "activation"):
        values = {getattr(ffn, what) for ffn in found}
        if len(values) > 1:
            raise _unsupported(model, path, f"its layers disagree in {what}: {sorted(map(str, values))}")
    return found


def _unsupported(model: PreTrainedModel, path: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model type {model.config.model_type!r} is not supported: at {path}: {why}")


def _refuse_experts(model: PreTrainedModel) -> None:
    """Refuse experts that `find_expert_layers` did not find: Llama 4, JetMoE, DBRX have ways of their own to hold them."""
    for name, module in model.named_modules():
        cls = type(module).__name__
        if name and _EXPERTS.search(cls) and not cls.endswith(_WHOLES) and not isinstance(module, nn.ModuleList):
            raise _unsupported(
                model,
                name,
                f"{cls} is part of a mixture-of-experts layer beside transformers' experts interface, through which alone"
                " experts are streamed",
            )


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the model's list of decoder layers, and the list.

    Raises:
        UnsupportedModelError: There is none, or more than one that looks like it.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and 0 < len(module) == num_layers and _looks_like_decoder(module[0])
    ]
    if len(lists) != 1:
        names = ", ".join(name for name, _ in lists) or "none"
        raise _unsupported(model, type(model).__name__, f"one list of {num_layers} layers expected, got {names}")
    return lists[0]


def _looks_like_decoder(layer: nn.Module) -> bool:
    # A vision tower of equal depth is told apart by its class; every text layer in transformers says what it is.
    name = type(layer).__name__
    return name.endswith(("DecoderLayer", "Block", "Layer")) and not re.search(r"Vision|Audio|Encoder", name)


def _ffn_of_layer(model: PreTrainedModel, path: str, layer: nn.Module) -> FfnLayer:
    if type(layer).__name__ in _IN_LAYER:
        shape, act = _IN_LAYER[type(layer).__name__]
        return _in_layer_ffn(model, path, layer, shape, act)
    found = list(_matches(layer, path))
    if len(found) != 1:
        names = ", ".join(name for name, _, _ in found) or "none"
        raise _unsupported(model, path, f"one feed-forward module expected in {type(layer).__name__}, found {names}")
    module_path, module, shape = found[0]
    return _module_ffn(model, module_path, module, shape, type(layer))


def _matches(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, _Shape]]:
    for name, module in layer.named_modules(prefix=path):
        children = dict(module.named_children())
        for shape in _SHAPES:
            roles = [role for role in (shape.gate, shape.up, shape.down) if role is not None]
            if all(role in children and is_linear(children[role]) for role in roles):
                yield name, module, shape
                break


def _module_ffn(
    model: PreTrainedModel, path: str, module: nn.Module, shape: _Shape, layer_class: type[nn.Module]
) -> FfnLayer:
    parts = _parts(module, shape)
    others = [
        name
        for name, child in module.named_children()
        if name not in (shape.gate, shape.up, shape.down) and not isinstance(child, nn.Dropout)
    ]
    if isinstance(module, layer_class):
        raise _unsupported(
            model,
            path,
            f"{layer_class.__name__} holds its feed-forward layer itself, in a forward that is not known here",
        )
    if len(others) > 1 or any(True for _ in module.parameters(recurse=False)):
        raise _unsupported(model, path, f"one activation expected beside its linear layers, found {others}")
    cls = type(module).__name__
    if not others:
        function = find_function(module, parts, _configured_activations(model.config))
        if function is None:
            raise _unsupported(
                model, path, f"{cls} computes no activation of transformers' ACT2FN in the formula of an FFN"
            )
        return _place(model, path, module, shape, parts, activation=function, prefix=path, identities=())
    child = others[0]
    activation = _activation(model, path, module, child)
    learned = child if has_weights(module.get_submodule(child)) else None
    if takes_residual(module) and learned is None:
        problem = prove_in_place(module, parts, activation, child)
        if problem:
            raise _unsupported(model, path, f"{cls} {problem}")
        inside = (f"{path}.{child}", f"{path}.{shape.down}")
        return _place(
            model, f"{path}.{shape.up}", module, shape, parts, activation=activation, prefix=path, identities=inside
        )
    problem = prove(module, parts, activation, learned=learned)
    if problem:
        raise _unsupported(model, path, f"{cls} {problem}")
    return _place(model, path, module, shape, parts, activation=activation, prefix=path, identities=())


def _in_layer_ffn(model: PreTrainedModel, path: str, layer: nn.Module, shape: _Shape, act: str) -> FfnLayer:
    activation = _activation(model, path, layer, act)
    identities = (f"{path}.{act}", f"{path}.{shape.down}")
    return _place(
        model,
        f"{path}.{shape.up}",
        layer,
        shape,
        _parts(layer, shape),
        activation=activation,
        prefix=path,
        identities=identities,
    )


def _parts(module: nn.Module, shape: _Shape) -> FfnParts:
    return FfnParts(gate=shape.gate, up=shape.up, down=shape.down, is_fused=shape.is_fused)


def _activation(model: PreTrainedModel, path: str, module: nn.Module, child: str) -> str:
    found = module.get_submodule(child)
    name = activation_name(found, _configured_activations(model.config)) or learned_name(found)
    if name is None:
        cls = type(module.get_submodule(child)).__name__
        raise _unsupported(model, f"{path}.{child}", f"{cls} is not an activation of transformers' ACT2FN")
    return name


def _configured_activations(config: PreTrainedConfig) -> Iterable[str]:
    settings: dict[str, Any] = config.get_text_config(decoder=True).to_dict()
    return [value for key, value in settings.items() if "act" in key and isinstance(value, str)]


def _place(
    model: PreTrainedModel,
    module_path: str,
    owner: nn.Module,
    shape: _Shape,
    parts: FfnParts,
    *,
    activation: str,
    prefix: str,
    identities: tuple[str, ...],
) -> FfnLayer:
    hidden_size, width = linear_sizes(owner.get_submodule(shape.up))
    num_rows = width // 2 if shape.is_fused else width
    wanted = {shape.down: (num_rows, hidden_size), shape.gate: (hidden_size, num_rows)}
    for child, sizes in wanted.items():
        if child is not None and linear_sizes(owner.get_submodule(child)) != sizes:
            raise _unsupported(model, f"{prefix}.{child}", f"sizes {sizes} expected (in, out)")

    def weight(child: str, *, neurons_are_outputs: bool, first: int = 0) -> PartSource:
        axis = neuron_axis(owner.get_submodule(child), neurons_are_outputs=neurons_are_outputs)
        return PartSource(name=f"{prefix}.{child}.weight", neuron_axis=axis, first_neuron=first)

    def bias(child: str | None, *, first: int = 0) -> PartSource | None:
        if child is None or getattr(owner.get_submodule(child), "bias", None) is None:
            return None
        return PartSource(name=f"{prefix}.{child}.bias", first_neuron=first)

    gate = shape.up if shape.is_fused else shape.gate
    first_up = num_rows if shape.is_fused else 0
    return FfnLayer(
        module=module_path,
        identities=identities,
        hidden_size=hidden_size,
        num_rows=num_rows,
        activation=activation,
        gate=None if gate is None else weight(gate, neurons_are_outputs=True),
        up=weight(shape.up, neurons_are_outputs=True, first=first_up),
        down=weight(shape.down, neurons_are_outputs=False),
        gate_bias=bias(gate),
        up_bias=bias(shape.up, first=first_up),
        down_bias=bias(shape.down),
    )
