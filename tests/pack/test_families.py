from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from flashlm.errors import UnsupportedModelError
from flashlm.pack.families import FfnLayer, PartSource, build_meta_model, find_ffn_layers
from flashlm.pack.ffn_probe import FfnParts, activation_name, prove
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
        ("bloom", {"n_head": 4, "n_layer": 2}, "BloomGelu"),
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
