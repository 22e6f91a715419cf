from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashlm.conversion.convert import convert
from flashlm.conversion.sources.safetensors import open_checkpoint
from flashlm.errors import ConfigError, PackError
from flashlm.pack.checkpoint import read_header
from tests.models import save_checkpoint


def _write(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _tensor(**changes: object) -> dict[str, object]:
    return {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


BYTES = b'"x": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}'


def test_header_is_read_as_safetensors_writes_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors["a"].shape == (3, 5)
    assert tensors["b"].dtype is torch.int64
    assert tensors["a"].num_bytes == 60


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        {"x": 3},
        _tensor(shape=[4, -4]),
        _tensor(shape=[4, 4.0]),
        _tensor(shape=[1 << 62, 1 << 62]),
        _tensor(shape=[1] * 2000),
        _tensor(data_offsets=[0, 65]),
        _tensor(data_offsets=[32, 96]),
        _tensor(data_offsets=[-64, 0]),
        _tensor(data_offsets=[64, 0]),
        _tensor(data_offsets=[0]),
        _tensor(dtype="F8_E4M3"),
        _tensor(dtype="U8", shape=[1], data_offsets=[False, True]),
        _tensor() | {"y": {"dtype": "U8", "shape": [1], "data_offsets": [63, 64]}},
        _tensor() | {"y": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}},
        b"{" + BYTES + b"," + BYTES + b"}",
        b"[" * 100_000,
    ],
)
def test_damaged_header_is_refused(header: object, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"x\.safetensors"):
        read_header(_write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 62).to_bytes(8, "little"), bytes(8), b"\xff" * 100])
def test_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(PackError):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=120), st.booleans())
def test_random_bytes_are_refused(tmp_path: Path, junk: bytes, has_length: bool) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(junk).to_bytes(8, "little") + junk if has_length else junk)
    with pytest.raises(PackError, match=r"x\.safetensors"):
        read_header(path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "source", "llama", max_shard_size="60KB")
    return tmp_path / "source"


def test_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(PackError, match=gone.name):
        convert(sharded, sharded.parent / "pack")


def test_truncated_shard_is_named(sharded: Path) -> None:
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(PackError, match=f"{cut.name} is too short"):
        convert(sharded, sharded.parent / "pack")


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "x.bin", 3])
def test_index_that_leaves_the_folder_is_refused(file: object, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(PackError, match=r"lm_head\.weight"):
        open_checkpoint(sharded)


def test_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(PackError, match="ghost"):
        open_checkpoint(sharded)


def test_pickled_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(PackError, match=r"pickles.*save_pretrained"):
        convert(tmp_path / "source", tmp_path / "pack")


def _resave(folder: Path, change) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    _resave(tmp_path / "source", lambda state: state.pop(name))
    with pytest.raises(PackError, match=f"lacks 1 tensors.*{name}"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_tensor_unknown_to_the_model_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    _resave(tmp_path / "source", lambda state: state.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(PackError, match=r"1 tensors that LlamaForCausalLM does not know, first model\.layers\.7"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    _resave(tmp_path / "source", lambda state: state.update({"model.norm.weight": torch.zeros(47)}))
    with pytest.raises(PackError, match=r"model\.norm\.weight with shape \[47\].*\[48\]"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    _resave(tmp_path / "source", lambda state: state.update({name: state[name].to(torch.int8)}))
    with pytest.raises(PackError, match="floating point expected"):
        convert(tmp_path / "source", tmp_path / "pack")


@pytest.mark.parametrize(("method", "reason"), [("gptq", "already quantized"), ("flashlm", "already a flashlm pack")])
def test_quantized_source_is_refused(method: str, reason: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(PackError, match=reason):
        convert(tmp_path / "source", tmp_path / "pack")


def test_folder_without_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(PackError, match="not a model folder"):
        convert(tmp_path / "source", tmp_path / "pack")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_source_that_is_no_folder_is_refused_without_asking_the_hub(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        convert(source, tmp_path / "pack")


def test_weights_at_odd_addresses_are_read(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "llama")
    convert(tmp_path / "source", tmp_path / "even")
    file = tmp_path / "source" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip() + b" "
    text += b" " * ((text.__len__() + 1) % 2)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert (8 + len(text)) % 2 == 1
    convert(tmp_path / "source", tmp_path / "odd")
    for name in ("flash/resident.safetensors", "flash/layer-00001.rows"):
        assert (tmp_path / "even" / name).read_bytes() == (tmp_path / "odd" / name).read_bytes()
    assert model is not None
