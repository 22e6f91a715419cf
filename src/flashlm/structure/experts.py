"""Where the routed experts of a mixture-of-experts model are: every family that uses transformers' experts interface.

That interface (`use_experts_implementation`, transformers 5) keeps the experts of a layer in two three-dimensional
weights and says by flags how they lie: transposed or not, gate and up one after the other or interleaved, with or without
gate and biases. The flags are read here; no family is named but Llama 4, whose experts have none. The other
large matrices of such a model (attention, shared experts, the dense feed-forward layers that some families begin with) are
linear layers of their own (`find_units`): every token uses them, so they are pinned first, and streamed only where memory
does not reach. Their modules keep their own arithmetic.

Needs the model on the meta device only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from flashlm.errors import UnsupportedModelError
from flashlm.pack.manifest import CUSTOM_GATE
from flashlm.structure.ffn_probe import activation_name
from flashlm.transformers_seam import has_plain_gate

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Experts beside the interface that the engine leads to it (`engine/llama4.py`), and what their flags would say.
_LED = {"Llama4TextExperts": {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}}
_NUM_ACTIVE_NAMES = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """The routed experts of one decoder layer.

    Attributes:
        module: Dotted path of the experts module, which stays in the model without its large weights.
        num_experts: Experts.
        num_active: Experts that a token uses.
        hidden_size: Elements that an expert takes and gives.
        num_rows: Neurons of an expert.
        has_gate: Whether experts are gated.
        is_transposed: Whether the weights are (expert, in, out) and not (expert, out, in).
        is_concatenated: Whether gate and up outputs follow each other, and do not alternate.
        activation: Name in transformers' `ACT2FN`, or `CUSTOM_GATE` where the module has a way of its own.
    """

    module: str
    num_experts: int
    num_active: int
    hidden_size: int
    num_rows: int
    has_gate: bool
    is_transposed: bool
    is_concatenated: bool
    activation: str

    @property
    def in_weight(self) -> str:
        """State-dict name of the weights that the input meets."""
        return f"{self.module}.{in_weight_name(has_gate=self.has_gate)}"

    @property
    def out_weight(self) -> str:
        """State-dict name of the weights that give the output."""
        return f"{self.module}.{OUT_WEIGHT_NAME}"


OUT_WEIGHT_NAME = "down_proj"


def in_weight_name(*, has_gate: bool) -> str:
    """Return what the interface calls the weights that an expert's input meets."""
    return "gate_up_proj" if has_gate else "up_proj"


def find_expert_layers(model: PreTrainedModel) -> tuple[ExpertLayer, ...]:
    """Return the experts of `model` in the order of its layers; none where it does not use the experts interface.

    Raises:
        UnsupportedModelError: Weights that do not fit the flags, or layers that disagree in shape.
    """
    found = tuple(
        _expert_layer(model, path, module, flags)
        for path, module in model.named_modules()
        if (flags := _stated_flags(module) or led_flags(module)) is not None
    )
    for what in ("hidden_size", "num_rows", "has_gate", "activation"):
        values = {getattr(layer, what) for layer in found}
        if len(values) > 1:
            raise _unsupported(model, "its experts", f"layers disagree in {what}: {sorted(map(str, values))}")
    return found


def _stated_flags(module: nn.Module) -> dict[str, bool] | None:
    """Return what a module of the experts interface says of itself; None of any other."""
    flags = {flag: getattr(module, flag, None) for flag in _FLAGS}
    return flags if all(isinstance(value, bool) for value in flags.values()) else None  # type: ignore[return-value]


def led_flags(module: nn.Module) -> dict[str, bool] | None:
    """Return what the flags of a module beside the interface would say where the engine leads it there; else None."""
    return _LED.get(type(module).__name__)


def _unsupported(model: PreTrainedModel, where: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model type {model.config.model_type!r} is not supported: at {where}: {why}")


def _expert_layer(model: PreTrainedModel, path: str, module: nn.Module, flags: dict[str, bool]) -> ExpertLayer:
    shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters(recurse=False)}
    wanted = (in_weight_name(has_gate=flags["has_gate"]), OUT_WEIGHT_NAME)
    if any(len(shapes.get(name, ())) != 3 for name in wanted):
        raise _unsupported(model, path, f"three-dimensional {' and '.join(wanted)} expected, found {shapes}")
    num_experts, outputs, inputs = _as_linear(shapes[wanted[0]], is_transposed=flags["is_transposed"])
    down = _as_linear(shapes[wanted[1]], is_transposed=flags["is_transposed"])
    num_rows = outputs // 2 if flags["has_gate"] else outputs
    if down != (num_experts, inputs, num_rows) or num_rows == 0:
        raise _unsupported(model, path, f"weights {shapes} do not make experts of {num_rows} neurons")
    biases = {f"{name}_bias" for name in wanted} if flags["has_bias"] else set()
    others = set(shapes) - {*wanted, *biases}
    if others or biases - set(shapes):
        raise _unsupported(model, path, f"weights {sorted({*wanted, *biases})} expected, found {sorted(shapes)}")
    return ExpertLayer(
        module=path,
        num_experts=num_experts,
        num_active=min(_num_active(model, module) or num_experts, num_experts),
        hidden_size=inputs,
        num_rows=num_rows,
        has_gate=flags["has_gate"],
        is_transposed=flags["is_transposed"],
        is_concatenated=flags["is_concatenated"],
        activation=_activation(module),
    )


def _as_linear(shape: tuple[int, ...], *, is_transposed: bool) -> tuple[int, int, int]:
    """Return (experts, outputs, inputs)."""
    return (shape[0], shape[2], shape[1]) if is_transposed else (shape[0], shape[1], shape[2])


def _num_active(model: PreTrainedModel, module: nn.Module) -> int | None:
    """Return how many experts the config sends a token to; None where it does not say."""
    for config in (getattr(module, "config", None), model.config.get_text_config(decoder=True)):
        for name in _NUM_ACTIVE_NAMES:
            value: Any = getattr(config, name, None)
            if isinstance(value, list):  # one for each layer
                value = max(value, default=None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _activation(module: nn.Module) -> str:
    """Return the name of the module's activation where it is the plain formula, else `CUSTOM_GATE`."""
    is_plain = has_plain_gate(module) or led_flags(module) is not None
    act = getattr(module, "act_fn", None)
    if not is_plain and getattr(module, "has_gate", True):
        return CUSTOM_GATE
    if isinstance(act, nn.Module):
        with torch.device("cpu"):
            return activation_name(act, ACT2FN) or CUSTOM_GATE
    return CUSTOM_GATE
