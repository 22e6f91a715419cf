from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from flashlm.errors import UnsupportedModelError
from flashlm.structure.families import FfnLayer, PartSource, build_meta_model, find_ffn_layers
from flashlm.structure.ffn_probe import FfnParts, activation_name, find_function, learned_name, prove, prove_in_place
from tests.models import FAMILIES, tiny_config, tiny_model


def _part(state: dict[str, torch.Tensor], source: PartSource, num_rows: int) -> torch.Tensor:
    weight = state[source.name] if source.neuron_axis == 0 else state[source.name].T
    return weight[source.first_neuron : source.first_neuron + num_rows]


def _bias(state: dict[str, torch.Tensor], source: PartSource | None, size: int) -> torch.Tensor:
    if source is None:
        return torch.zeros(size)
    return state[source.name][source.first_neuron : source.first_neuron + size]


def ffn_by_rows(state: dict[str, torch.Tensor], layer: FfnLayer, x: torch.Tensor) -> torch.Tensor:
    up = x @ _part(state, layer.up, layer.num_rows).T + _bias(state, layer.up_bias, layer.num_rows)
    act = ACT2FN[layer.activation]
    if layer.gate is None:
        inner = act(up)
    else:
        gate = x @ _part(state, layer.gate, layer.num_rows).T + _bias(state, layer.gate_bias, layer.num_rows)
        inner = act(gate) * up
    return inner @ _part(state, layer.down, layer.num_rows) + _bias(state, layer.down_bias, layer.hidden_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_found_parts_compute_what_the_model_computes(family: str) -> None:
    model = tiny_model(family)
    layers = find_ffn_layers(build_meta_model(model.config))
    assert len(layers) == 2
    x = torch.randn(5, 48)
    for layer in layers:
        out = x
        for path in (layer.module, *layer.identities):  # in OPT: fc1, activation, fc2
            out = model.get_submodule(path)(out)
        torch.testing.assert_close(ffn_by_rows(model.state_dict(), layer, x), out, rtol=1e-5, atol=1e-5)


def test_opt_layers_name_the_modules_that_they_replace() -> None:
    layer = find_ffn_layers(build_meta_model(tiny_config("opt")))[1]
    assert layer.module == "model.decoder.layers.1.fc1"
    assert layer.identities == ("model.decoder.layers.1.activation_fn", "model.decoder.layers.1.fc2")
    assert layer.biases == {
        "model.decoder.layers.1.fc1.up_bias": PartSource(name="model.decoder.layers.1.fc1.bias"),
        "model.decoder.layers.1.fc1.down_bias": PartSource(name="model.decoder.layers.1.fc2.bias"),
    }


def test_phi3_gate_is_the_first_half_of_the_fused_tensor() -> None:
    layer = find_ffn_layers(build_meta_model(tiny_config("phi3")))[0]
    assert layer.gate == PartSource(name="model.layers.0.mlp.gate_up_proj.weight")
    assert layer.up == PartSource(name="model.layers.0.mlp.gate_up_proj.weight", first_neuron=88)


def test_gpt2_weights_are_known_to_be_transposed() -> None:
    layer = find_ffn_layers(build_meta_model(tiny_config("gpt2")))[0]
    assert (layer.up.neuron_axis, layer.down.neuron_axis) == (1, 0)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("mixtral", {"num_local_experts": 4}, "mixture-of-experts"),
        ("llama4_text", {"num_key_value_heads": 2, "head_dim": 12}, "Llama4TextMoe is part of a mixture-of-experts"),
        ("bloom", {"n_head": 4, "n_layer": 2, "slow_but_exact": True, "pretraining_tp": 2}, "BloomMLP does not run"),
        ("mamba", {}, "feed-forward"),
        ("bitnet", {"num_key_value_heads": 2}, "ffn_sub_norm"),
        ("gemma3n_text", {"num_key_value_heads": 2, "head_dim": 12, "activation_sparsity_pattern": [0.5, 0.5],
                          "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0,
                          "layer_types": ["full_attention"] * 2}, "Gemma3nTextMLP"),
    ],
)  # fmt: skip
def test_model_with_another_feed_forward_is_refused(family: str, settings: dict[str, object], reason: str) -> None:
    model = build_meta_model(tiny_config(family, **settings))
    with pytest.raises(UnsupportedModelError, match=family) as raised:
        find_ffn_layers(model)
    assert reason in str(raised.value)


def test_layers_that_disagree_are_refused() -> None:
    model = build_meta_model(tiny_config("llama"))
    with torch.device("meta"):
        model.get_submodule("model.layers.1.mlp").act_fn = nn.ReLU()
    with pytest.raises(UnsupportedModelError, match="disagree in activation"):
        find_ffn_layers(model)


def test_layers_may_differ_in_width() -> None:
    model = build_meta_model(tiny_config("llama"))
    wide = build_meta_model(tiny_config("llama", intermediate_size=104))
    model.get_submodule("model.layers")[1] = wide.get_submodule("model.layers")[1]
    assert [layer.num_rows for layer in find_ffn_layers(model)] == [88, 104]


class _Clamped(nn.Module):
    """Looks like a gated FFN, but clamps large values."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


_GATED = FfnParts(gate="gate_proj", up="up_proj", down="down_proj", is_fused=False)


def test_probe_sees_a_clamp_that_only_large_inputs_reach() -> None:
    assert prove(_Clamped(limit=float("inf")), _GATED, "silu") is None
    assert "something else" in (prove(_Clamped(limit=30.0), _GATED, "silu") or "")


def test_probe_leaves_the_module_as_it_was() -> None:
    module = _Clamped(limit=float("inf"))
    before = copy.deepcopy(module.state_dict())
    prove(module, _GATED, "silu")
    assert module.up_proj.in_features == 8
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "gelu_10", "swish"])
def test_activation_is_named_by_what_it_is(name: str) -> None:
    assert activation_name(ACT2FN[name], []) == name


def test_activation_with_weights_has_no_name() -> None:
    assert activation_name(nn.PReLU(), ["prelu"]) is None


class _Function(nn.Module):
    """An activation class that transformers' table does not have."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("activation", "configured", "name"),
    [
        (BloomGelu().eval(), [], "gelu_fast"),  # the tanh form with a constant cut after eight digits
        (BloomGelu().eval(), ["gelu_new"], "gelu_new"),
        (nn.GELU(), [], "gelu"),
        (nn.GELU(approximate="tanh"), [], "gelu_fast"),
        (_Function(torch.relu), [], "relu"),
        (_Function(lambda x: torch.relu(x).clamp(max=1000.0)), [], None),
        (_Function(lambda x: nn.functional.gelu(x) * (1 + 1e-5)), [], None),
        (_Function(lambda x: torch.relu(x) - torch.relu(x).mean(-1, keepdim=True)), [], None),
        (_Function(lambda x: torch.relu(x) + 1e-3 * x.roll(1, -1).sign()), [], None),
    ],
)
def test_an_activation_of_another_class_is_named_by_what_it_computes(
    activation: nn.Module, configured: list[str], name: str | None
) -> None:
    assert activation_name(activation, configured) == name


def test_an_activation_with_a_weight_for_each_neuron_is_not_kept() -> None:
    assert learned_name(nn.PReLU()) == "prelu"
    assert learned_name(nn.PReLU(88)) is None


class _Functional(nn.Module):
    """A gated FFN that calls a function where others have an activation module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.function(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), "gelu_new"),
        (lambda x: torch.relu(x).square(), "relu2"),
        (lambda x: nn.functional.silu(x).clamp(max=30.0), None),
        (torch.sin, None),
    ],
)
def test_a_function_in_the_place_of_an_activation_is_found_by_proof(
    function: Callable[[torch.Tensor], torch.Tensor], name: str | None
) -> None:
    assert find_function(_Functional(function), _GATED, []) == name


class _Adding(nn.Module):
    """An FFN that adds the residual itself, and `extra` of what the down-projection gives."""

    def __init__(self, extra: float) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU()
        self.extra = extra

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        inner = self.act(self.up_proj(x))
        return self.down_proj(inner) + residual + self.extra * inner[..., : residual.shape[-1]]


def test_a_module_that_adds_the_residual_is_proved_as_it_will_run() -> None:
    parts = FfnParts(gate=None, up="up_proj", down="down_proj", is_fused=False)
    assert prove_in_place(_Adding(0.0), parts, "relu", "act") is None
    assert "computes something else than down(act(up(x))) + residual" in (
        prove_in_place(_Adding(1e-3), parts, "relu", "act") or ""
    )
