"""Families whose FFN goes by other names, whose activation is a class or a function of their own, or has weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import flashlm
from flashlm.calibration.dense import calibrate
from flashlm.conversion.convert import convert
from flashlm.errors import ConfigError
from flashlm.pack.manifest import read_manifest
from tests import tiny_models

# Family, activation of its pack.
CASES = {
    "apertus": "xielu",  # two learned numbers a layer, which stay resident
    "bloom": None,  # a GELU class of its own; adds the residual inside the module
    "lfm2": "silu",  # w1, w2, w3 around a function
    "lfm3": "silu",
    "modernbert-decoder": "gelu",  # Wi holds the gate and the input
    "mpt": "gelu",  # torch's class; adds the residual inside the module
    "olmo_hybrid": "silu",  # transformers joins three convolutions on loading
}
FEW_TOKENS = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}


def ids_of(batch_size, num_tokens):
    generator = torch.Generator().manual_seed(batch_size * 100 + num_tokens)
    return torch.randint(3, tiny_models.VOCAB, (batch_size, num_tokens), generator=generator)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.filterwarnings("ignore")
def test_family_is_equal_to_transformers_and_placement_changes_no_bit(family, tmp_path):
    tiny_models.save_tiny(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pack", dtype="float32", block_rows=16)
    manifest = read_manifest(tmp_path / "pack")
    assert len(manifest.layers) == 4
    assert CASES[family] in (None, manifest.activation)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    half = flashlm.load(tmp_path / "pack", pin=manifest.streamed_bytes // 2)
    none = flashlm.load(tmp_path / "pack", pin=0)
    assert half.flash.placement.pinned_bytes
    for batch_size, num_tokens in ((1, 1), (3, 40)):
        ids = ids_of(batch_size, num_tokens)
        with torch.no_grad():
            wanted, first, second = (model(ids).logits for model in (reference, half, none))
        assert (wanted - first).abs().max() <= 2e-5 * wanted.abs().max()
        assert torch.equal(first, second)
    ids = ids_of(1, 9)
    greedy = [model.generate(ids, attention_mask=torch.ones_like(ids), **FEW_TOKENS) for model in (reference, none)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", CASES)
@pytest.mark.filterwarnings("ignore")
def test_family_is_within_rounding_in_16_bits(family, dtype, tmp_path):
    tiny_models.save_tiny(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pack", dtype=dtype)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype).eval()
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype).eval().to(torch.float32)
    streamed = flashlm.load(tmp_path / "pack", pin=0)
    for batch_size, num_tokens in ((1, 1), (3, 40)):
        ids = ids_of(batch_size, num_tokens)
        with torch.no_grad():
            truth = exact(ids).logits
            theirs = (rounded(ids).logits.float() - truth).abs().max()
            ours = (streamed(ids).logits.float() - truth).abs().max()
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert ours <= 1.5 * theirs + eps * truth.abs().max(), (batch_size, num_tokens)


@pytest.mark.filterwarnings("ignore")
def test_an_activation_with_weights_is_not_calibrated(tmp_path):
    """Predictors would take the activation with the weights that it begins with."""
    tiny_models.save_tiny("apertus", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "pack")
    with pytest.raises(ConfigError, match="xielu, has weights of its own"):
        calibrate(tmp_path / "pack")


@pytest.mark.parametrize("num_active", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_llama_4_runs_the_chosen_experts_alone(num_active, tmp_path):
    """Its own module runs all experts on all tokens, most of them zeros."""
    tiny_models.save_tiny("llama4_text", tmp_path / "source", num_experts_per_tok=num_active)
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype="float32")
    assert [entry.num_active for entry in manifest.experts] == [num_active] * 4
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    least = flashlm.load(tmp_path / "pack", pin=0)
    whole = flashlm.load(tmp_path / "pack")
    for batch_size, num_tokens in ((1, 1), (3, 1), (3, 40)):
        ids = ids_of(batch_size, num_tokens)
        with torch.no_grad():
            wanted, first, second = (model(ids).logits for model in (reference, least, whole))
        assert (wanted - first).abs().max() <= 2e-5 * wanted.abs().max()
        assert torch.equal(first, second)
    ids = ids_of(1, 9)
    greedy = [model.generate(ids, attention_mask=torch.ones_like(ids), **FEW_TOKENS) for model in (reference, least)]
    assert torch.equal(*greedy)
    assert (
        least.flash.telemetry.records[-1].miss_experts + least.flash.telemetry.records[-1].hit_experts == 4 * num_active
    )


@pytest.mark.parametrize("family", ["llama4", "mllama", "qwen3_5_moe"])
@pytest.mark.filterwarnings("ignore")
def test_the_text_model_of_a_release_with_vision_is_converted(family, tmp_path):
    """A release holds a vision tower, which the causal language model does not have."""
    config = tiny_models.small_config(family)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "source")
    lines = []
    convert(tmp_path / "source", tmp_path / "pack", dtype="float32", announce=lines.append)
    assert any("tensors that transformers ignores too, first m" in line for line in lines)
    ids = ids_of(2, 12)
    with torch.no_grad():
        wanted, found = whole(input_ids=ids).logits, flashlm.load(tmp_path / "pack", pin=0)(ids).logits
    assert (wanted - found).abs().max() <= 2e-5 * wanted.abs().max()
