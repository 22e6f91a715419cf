"""Linear layers: a matrix cut into blocks of rows gives the bits of the whole one, and so does one that is streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flashlm
from flashlm.conversion.convert import convert
from flashlm.engine.flash_linear import FlashLinear
from flashlm.engine.linear import choose_way, multiply, prepare
from flashlm.errors import ConfigError
from flashlm.pack.manifest import read_manifest
from flashlm.rows.kernels import choose_plain_strategy
from tests.engine.conftest import TinyPack
from tests.models import save_checkpoint
from tests.tiny_models import save_tiny

Make = Callable[..., TinyPack]
STEP = 16


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    num_tokens=st.sampled_from([1, 2, 5, 16, 17, 40, 300]),
    num_inputs=st.integers(1, 300),
    num_steps=st.integers(1, 40),
    has_bias=st.booleans(),
    data=st.data(),
)
def test_blocks_of_rows_give_the_bits_of_the_whole_matrix(
    dtype: torch.dtype, num_tokens: int, num_inputs: int, num_steps: int, has_bias: bool, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(num_inputs)
    num_rows = STEP * num_steps
    weight = torch.randn(num_rows, num_inputs, generator=generator).to(dtype)
    bias = torch.randn(num_rows, generator=generator).to(dtype) if has_bias else None
    tokens = torch.randn(num_tokens, num_inputs, generator=generator).to(dtype)
    cuts = sorted({STEP * cut for cut in data.draw(st.lists(st.integers(1, num_steps), max_size=5))} - {num_rows})
    widens = choose_plain_strategy(dtype) == "widen"
    for widened in {widens, dtype != torch.float32}:
        way = choose_way(tokens, dtype, widens=widened)
        prepared = prepare(way, tokens)
        whole, pieces = torch.empty(num_tokens, num_rows, dtype=dtype), torch.empty(num_tokens, num_rows, dtype=dtype)
        multiply(way, prepared, weight, bias, whole)
        for start, stop in zip([0, *cuts], [*cuts, num_rows], strict=True):
            some = None if bias is None else bias[start:stop]
            multiply(way, prepared, weight[start:stop].clone(), some, pieces[:, start:stop])
        assert torch.equal(whole, pieces), way


def linears(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(each.module) for each in model.flash.manifest.units if each.kind == "linear"]


def test_what_is_pinned_as_a_whole_is_an_ordinary_layer(whole_pack: Make) -> None:
    pack = whole_pack("llama", "bfloat16").pack
    pinned, streamed = flashlm.load(pack), flashlm.load(pack, pin=0)
    assert len(linears(pinned)) == 5
    assert not any(isinstance(each, FlashLinear) for each in linears(pinned))
    assert all(isinstance(each, FlashLinear) for each in linears(streamed))
    assert streamed.flash.placement.ring_bytes == sum(each.layout.file_bytes for each in read_manifest(pack).dense)
    names = [name for name, _ in pinned.named_parameters()]
    assert names == [name for name, _ in streamed.named_parameters()]
    assert sum(each.numel() for each in pinned.parameters()) == sum(each.numel() for each in streamed.parameters())
    for mine, other in zip(linears(pinned), linears(streamed), strict=True):
        assert mine.weight.shape == other.weight.shape
        with pytest.raises(ConfigError, match=r"weight is streamed and can't be used"):
            other.weight.sum()
        with pytest.raises(ConfigError, match="can't be replaced"):
            other.weight = nn.Parameter(torch.zeros(other.weight.shape))


@pytest.mark.parametrize("family", ["opt", "llama", "phi3", "gpt_neox", "deepseek_v3", "qwen3_next"])
def test_a_token_reads_every_unit_once_and_never_jumps(
    family: str, whole_pack: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that a conversion reads out of the forwards is the one that a pass takes."""
    model = flashlm.load(whole_pack(family).pack, pin=0)
    stream = model.flash.stream
    restarts: list[int] = []
    restart = stream._restart_at
    monkeypatch.setattr(stream, "_restart_at", lambda position: (restarts.append(position), restart(position)))
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        model(ids)
        restarts.clear()
        for _ in range(3):
            model(ids[:, :1])
    assert not restarts
    record = model.flash.telemetry.records[-1]
    misses_bytes = record.miss_experts * model.flash.placement.expert_bytes
    row_bytes = record.bytes_read - model.flash.placement.ring_bytes - misses_bytes
    assert row_bytes == 0  # of the embeddings: looked up before


def test_dense_layers_and_shared_experts_are_streamed_beside_experts(whole_pack: Make) -> None:
    tiny = whole_pack("deepseek_v3")
    manifest = read_manifest(tiny.pack)
    modules = {each.module for each in manifest.units if each.kind == "linear"}
    assert "model.layers.0.mlp.down_proj" in modules
    assert "model.layers.1.mlp.shared_experts.down_proj" in modules
    assert "lm_head" in modules
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = flashlm.load(tiny.pack)(ids).logits
        assert torch.equal(flashlm.load(tiny.pack, pin=0)(ids).logits, expected)


def test_small_linear_layers_stay_in_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    manifest = convert(tmp_path / "source", tmp_path / "pack")
    assert {each.kind for each in manifest.units} == {"ffn"}


@pytest.mark.parametrize("family", ["gpt_bigcode", "modernbert-decoder"])
def test_layers_that_a_family_fills_by_name_stay_in_memory(family: str, tmp_path: Path) -> None:
    """transformers would fill their missing weights before loading, through the module around them."""
    save_tiny(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pack", min_linear_bytes=0)
    with torch.no_grad():
        assert flashlm.load(tmp_path / "pack")(torch.arange(3, 8)[None]).logits.isfinite().all()
