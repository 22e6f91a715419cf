from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, PackError, UnsupportedModelError
from flashlm.pack.description import describe
from flashlm.pack.manifest import RESIDENT_NAME, manifest_path, read_manifest
from flashlm.structure.families import build_meta_model, find_ffn_layers
from tests import tiny_models
from tests.models import FAMILIES, save_checkpoint, tiny_config
from tests.pack.packs import all_bytes, read_rows


def _wanted_rows(state: dict[str, torch.Tensor], layer, dtype: torch.dtype) -> torch.Tensor:
    parts = []
    for source in layer.parts:
        weight = state[source.name] if source.neuron_axis == 0 else state[source.name].T
        parts.append(weight[source.first_neuron : source.first_neuron + layer.num_rows].to(dtype))
    return torch.stack(parts, dim=1)


def _check_round_trip(source: Path, pack: Path, model, dtype: torch.dtype) -> None:
    manifest = read_manifest(pack)
    layers = find_ffn_layers(build_meta_model(model.config))
    state = model.state_dict()
    resident = load_file(pack / RESIDENT_NAME)
    streamed = set()
    for index, layer in enumerate(layers):
        assert torch.equal(read_rows(pack, manifest, index), _wanted_rows(state, layer, dtype))
        streamed |= {part.name for part in (*layer.parts, *layer.biases.values())}
        for name, bias in layer.biases.items():
            held = resident.pop(name)
            assert torch.equal(held, state[bias.name][bias.first_neuron :][: len(held)].to(dtype))
    tied = set(model.all_tied_weights_keys)
    assert set(resident) == set(state) - streamed - tied
    for name, value in resident.items():
        assert torch.equal(value, state[name].to(dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", family, max_shard_size="60KB" if family == "llama" else "1GB")
    manifest = convert(tmp_path / "source", tmp_path / "pack")
    _check_round_trip(tmp_path / "source", tmp_path / "pack", model, torch.bfloat16)
    assert manifest == read_manifest(tmp_path / "pack")
    assert verify(tmp_path / "pack").problems == ()


_OWN_NAMES = ("apertus", "bloom", "lfm2", "lfm3", "modernbert-decoder", "mpt", "olmo_hybrid")


# Older releases of transformers lack some.
@pytest.mark.parametrize("family", [name for name in _OWN_NAMES if name in tiny_models.causal_types()])
@pytest.mark.filterwarnings("ignore")
def test_families_with_names_and_activations_of_their_own_round_trip(family: str, tmp_path: Path) -> None:
    model = tiny_models.save_tiny(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pack", dtype="fp32")
    _check_round_trip(tmp_path / "source", tmp_path / "pack", model, torch.float32)
    assert verify(tmp_path / "pack").problems == ()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_cast_as_torch_casts_them(dtype: str, source_dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "qwen2", dtype=source_dtype)
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype=dtype, block_rows=32)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert getattr(torch, manifest.dtype) is wanted
    assert manifest.ffns[0].block_rows == 32
    _check_round_trip(tmp_path / "source", tmp_path / "pack", model, wanted)


def test_sharded_and_single_checkpoints_give_the_same_pack(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one", "gemma2")
    save_checkpoint(tmp_path / "many", "gemma2", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert(tmp_path / "one", tmp_path / "p1")
    convert(tmp_path / "many", tmp_path / "p2")
    first, second = all_bytes(tmp_path / "p1"), all_bytes(tmp_path / "p2")
    for files in (first, second):
        del files["flash/manifest.json"]  # it names the source
    assert first == second


def test_prefixless_gpt2_checkpoint_with_old_buffers_is_understood(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "new", "gpt2")
    convert(tmp_path / "new", tmp_path / "p1")
    state = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    convert(tmp_path / "old", tmp_path / "p2")
    first, second = all_bytes(tmp_path / "p1"), all_bytes(tmp_path / "p2")
    assert first["flash/layer-00000.rows"] == second["flash/layer-00000.rows"]
    assert first[RESIDENT_NAME] == second[RESIDENT_NAME]


def test_tied_weight_stored_twice_is_kept_once(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "pack")
    assert "lm_head.weight" not in load_file(tmp_path / "pack" / RESIDENT_NAME)


def test_tied_weights_that_differ_are_both_kept(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["lm_head.weight"][3, 4] += 1
    save_file(state, tmp_path / "source" / "model.safetensors")
    convert(tmp_path / "source", tmp_path / "pack")
    assert "lm_head.weight" in load_file(tmp_path / "pack" / RESIDENT_NAME)


def test_pack_is_a_model_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(source, "llama")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "README.md", "LICENSE"):
        (source / name).write_text(f"{{}} {name}")
    convert(source, tmp_path / "pack")
    config = json.loads((tmp_path / "pack" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {"quant_method": "flashlm", "format_version": 5}
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {
        "config.json", "generation_config.json", "OPEN-WITH-FLASHLM.txt", "flash",
        "tokenizer.json", "chat_template.jinja", "tokenizer.model", "README.md", "LICENSE",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "pack" / "flash").iterdir()} == {
        "manifest.json", "resident.safetensors", "layer-00000.rows", "layer-00001.rows",
    }  # fmt: skip


def test_resident_data_is_aligned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "phi")
    convert(tmp_path / "source", tmp_path / "pack", dtype="fp32")
    raw = (tmp_path / "pack" / RESIDENT_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all(entry["data_offsets"][0] % 4 == 0 for entry in header.values())


def test_progress_ends_at_the_total_and_never_falls(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    calls: list[tuple[int, int, str]] = []
    lines: list[str] = []
    manifest = convert(
        tmp_path / "source", tmp_path / "pack", progress=lambda *call: calls.append(call), announce=lines.append
    )
    total = manifest.streamed_bytes + manifest.resident.num_bytes
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (total, total)
    assert "2 streamed layers" in lines[0]


def test_finished_pack_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    first = convert(tmp_path / "source", tmp_path / "pack")
    lines: list[str] = []
    assert convert(tmp_path / "source", tmp_path / "pack", announce=lines.append) == first
    assert lines == [f"{tmp_path / 'pack'} is already finished: nothing to do"]
    with pytest.raises(ConfigError, match="finished pack of another source or with other settings"):
        convert(tmp_path / "source", tmp_path / "pack", dtype="fp32")


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "llama")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name][3, 3] = 1e5
        save_file(state, tmp_path / "source" / "model.safetensors")
        with pytest.raises(PackError, match=f"{name} holds 100000, too large for float16"):
            convert(tmp_path / "source", tmp_path / f"pack-{name}", dtype="fp16")


def test_describe_tells_the_shapes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "opt")
    manifest = convert(tmp_path / "source", tmp_path / "pack")
    info = describe(tmp_path / "pack")
    assert (info.model_type, info.num_layers, info.hidden_size, info.ffn_size) == ("opt", 2, 48, 88)
    assert (info.activation, info.has_gate, info.dtype) == ("relu", False, "bfloat16")
    assert info.streamed_bytes == manifest.streamed_bytes
    assert json.dumps(info.to_dict())
    assert ("model type", "opt") in info.rows()


@pytest.mark.parametrize("settings", [{"dtype": "int4"}, {"block_rows": 17}, {"block_rows": 0}])
def test_wrong_setting_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(ConfigError, match=next(iter(settings))):
        convert(tmp_path / "source", tmp_path / "pack", **settings)
    assert not (tmp_path / "pack").exists()


def test_unknown_model_type_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    config = tiny_config("llama").to_dict() | {"model_type": "nosuchmodel"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="nosuchmodel"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_a_finished_pack_of_another_format_is_no_dead_end(tmp_path: Path) -> None:
    """Its own advice, to convert again, would lead back to it."""
    save_checkpoint(tmp_path / "source", "llama")
    convert(tmp_path / "source", tmp_path / "pack")
    path = manifest_path(tmp_path / "pack")
    path.write_bytes(path.read_bytes().replace(b'"format_version": 5', b'"format_version": 3'))
    with pytest.raises(ConfigError, match=r"choose another folder, or delete .*format version 3"):
        convert(tmp_path / "source", tmp_path / "pack")
