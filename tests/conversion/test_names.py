"""Releases hold more than the model: what transformers ignores is left out, whatever conversion its name would fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name

from flashlm.conversion.convert import convert
from flashlm.conversion.names import map_names
from flashlm.conversion.sources.safetensors import Checkpoint
from flashlm.errors import PackError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.structure.experts import find_expert_layers
from flashlm.structure.families import build_meta_model
from tests import tiny_models
from tests.pack.packs import all_bytes

# What a layer that predicts further tokens holds, experts among it.
MTP_PARTS = (
    "enorm.weight",
    "eh_proj.weight",
    "embed_tokens.weight",
    "shared_head.head.weight",
    "self_attn.rotary_emb.inv_freq",
    "self_attn.q_proj.weight",
    "mlp.experts.3.gate_proj.weight",
    "mlp.experts.3.down_proj.weight",
    "mlp.gate_up_proj.weight",
    "linear_attn.q_conv1d.weight",
)


def ignoring() -> list[str]:
    """Causal model types of the installed transformers whose code names keys to ignore."""
    root = Path(transformers.__file__).parent / "models"
    naming = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if re.search(r"^ +_keys_to_ignore_on_load_unexpected = [^N]", path.read_text(), re.MULTILINE)
    }
    return [name for name in tiny_models.causal_types() if model_type_to_module_name(name) in naming]


def a_key(pattern: str) -> str:
    """A key that `pattern` finds and that looks like a released one."""
    plain = (
        re.sub(r"\([^()]*\)\?", "", pattern)
        .replace(r"(^|\.)", "")
        .replace("^", "")
        .replace(r"\d+", "7")
        .replace(r"\.", ".")
        .replace(".*", "")
    )
    return plain.removesuffix("$").rstrip(".")


def fake_checkpoint(names: dict[str, tuple[int, ...]]) -> Checkpoint:
    folder = Path("nowhere")
    tensors = {
        name: TensorEntry(name=name, path=folder / "model.safetensors", dtype=torch.float32, shape=shape, offset=0)
        for name, shape in names.items()
    }
    return Checkpoint(folder=folder, files=(), tensors=tensors)


# Encoders and speech models (refused or not built before names are looked at), and a text model that ignores nothing itself.
NOT_READ = {"bart", "musicgen", "musicgen_melody", "mvp", "data2vec-text"}


@pytest.mark.parametrize("model_type", [name for name in ignoring() if name not in NOT_READ])
@pytest.mark.filterwarnings("ignore")
def test_what_a_family_ignores_is_left_out(model_type: str) -> None:
    model = build_meta_model(tiny_models.small_config(model_type))
    patterns = sorted(model._keys_to_ignore_on_load_unexpected)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    extra = {}
    for pattern in patterns:
        keys = [a_key(pattern), *(f"{a_key(pattern)}.{part}" for part in MTP_PARTS)]
        extra |= {key: (2, 2) for key in keys if re.search(pattern, key)}
    assert len(extra) >= len(patterns) > 0
    found = map_names(model, fake_checkpoint(names | extra), find_expert_layers(model))
    assert set(found.left_out) == set(extra)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "llama", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")
def test_layers_for_further_tokens_behind_the_last_are_left_out_where_the_config_states_them(model_type: str) -> None:
    """Releases of another depth than the one that transformers' pattern names."""
    config = tiny_models.small_config(model_type)
    config.num_nextn_predict_layers = 1
    model = build_meta_model(config)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    extra = {f"model.layers.4.{part}": (2, 2) for part in MTP_PARTS}
    found = map_names(model, fake_checkpoint(names | extra), find_expert_layers(model))
    assert set(found.left_out) == set(extra)
    with pytest.raises(PackError, match=r"1 tensors that \w+ does not know, first model.layers.5.enorm.weight"):
        map_names(
            model, fake_checkpoint(names | extra | {"model.layers.5.enorm.weight": (2,)}), find_expert_layers(model)
        )


def test_a_layer_that_the_model_has_is_kept_whatever_the_pattern_says() -> None:
    """GLM-4.5 has 92 layers, its Air sister 46: transformers ignores both numbers, and each model has layer 46 or not."""
    config = tiny_models.small_config("glm4_moe")
    model = build_meta_model(config)
    model._keys_to_ignore_on_load_unexpected = {r"model\.layers\.2.*"}
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = map_names(model, fake_checkpoint(names), find_expert_layers(model))
    assert found.left_out == ()
    assert any(name.startswith("model.layers.2.") for name in found.entries)


def test_buffers_of_older_versions_are_left_out() -> None:
    model = build_meta_model(tiny_models.small_config("llama"))
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    old = {
        "model.rotary_emb.inv_freq": (8,),
        "model.rotary_emb.original_inv_freq": (8,),
        **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (8,) for layer in range(4)},
        "model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 64, 8),
        "model.position_ids": (1, 64),
    }
    assert set(map_names(model, fake_checkpoint(names | old)).left_out) == set(old)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.mlp.adapter.weight", "score.weight", "model.layers.9.mlp.up_proj.weight"]
)
def test_a_tensor_that_nobody_ignores_is_refused(extra: str) -> None:
    model = build_meta_model(tiny_models.small_config("llama"))
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(PackError, match="1 tensors that LlamaForCausalLM does not know"):
        map_names(model, fake_checkpoint(names | {extra: (2, 2)}))


@pytest.mark.parametrize(
    ("model_type", "prefix"),
    [("deepseek_v3", "model.layers.61."), ("glm4_moe", "model.layers.46."), ("qwen3_next", "mtp.layers.0.")],
)
@pytest.mark.filterwarnings("ignore")
def test_a_release_gives_the_pack_of_its_model(model_type: str, prefix: str, tmp_path: Path) -> None:
    tiny_models.save_tiny(model_type, tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "release")
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    last = {name: weight for name, weight in tensors.items() if name.startswith("model.layers.3.")}
    tensors |= {prefix + name.removeprefix("model.layers.3."): weight.clone() for name, weight in last.items()}
    tensors |= {prefix + part: torch.ones(2, 2) for part in MTP_PARTS[:5]}
    save_file(tensors, tmp_path / "release" / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    for name in ("plain", "release"):
        convert(tmp_path / name, tmp_path / f"{name}-pack", dtype="float32", announce=lines.append)
    assert not any("left out" in line for line in lines[:1])
    assert any(f"{len(last) + 5} tensors" in line and "left out" in line for line in lines)
    first, second = ({k: v for k, v in all_bytes(tmp_path / f"{n}-pack").items() if not k.endswith("manifest.json")}
                     for n in ("plain", "release"))  # fmt: skip
    assert first == second


@pytest.mark.parametrize("model_type", ["olmo_hybrid", "kimi_linear"])
@pytest.mark.filterwarnings("ignore")
def test_resident_weights_that_transformers_makes_are_what_it_makes(model_type: str, tmp_path: Path) -> None:
    tiny_models.save_tiny(model_type, tmp_path / "source")
    saved = load_file(tmp_path / "source" / "model.safetensors")
    assert any(name.endswith("q_conv1d.weight") for name in saved)
    convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").state_dict()
    (path,) = (tmp_path / "pack").rglob("*.safetensors")
    resident = load_file(path)
    assert sum(name.endswith("conv1d.weight") for name in resident) >= 2
    for name, weight in resident.items():
        assert torch.equal(weight, reference[name]), name


def test_a_made_weight_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    tiny_models.save_tiny("olmo_hybrid", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    del tensors["model.layers.0.linear_attn.k_conv1d.weight"]
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackError, match=r"layers\.0\.linear_attn\.conv1d\.weight is made of .*k_conv1d.* is missing"):
        convert(tmp_path / "source", tmp_path / "pack")
