"""A pack is the checkpoint's model, and where its rows live changes no bit of what it computes."""

from __future__ import annotations

import pytest
import torch

import flashlm
from flashlm.rows.products import BlockGemm

FAMILIES = [
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "falcon",
    "persimmon",
    "gpt_neox",
    "gpt2",
    "nemotron",
    "olmo2",
    "stablelm",
]
NUM_NEW_TOKENS = 64
DTYPES = ["float32", "bfloat16", "float16"]


def prompt(model, batch_size, num_tokens):
    generator = torch.Generator().manual_seed(batch_size * 100 + num_tokens)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (batch_size, num_tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def greedy(model, inputs, num_new_tokens=NUM_NEW_TOKENS):
    return model.generate(**inputs, max_new_tokens=num_new_tokens, min_new_tokens=num_new_tokens, do_sample=False)


def half_of(pack):
    return flashlm.pack.manifest.read_manifest(pack).streamed_bytes // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_in_fp32(family, tiny_pack):
    tiny = tiny_pack(family, "float32")
    reference = tiny.reference("float32")
    streamed = flashlm.load(tiny.pack, pin=half_of(tiny.pack))
    assert streamed.flash.placement.pinned_bytes
    assert streamed.flash.placement.streamed_bytes
    for batch_size in (1, 3):
        for num_tokens in (1, 40):
            inputs = prompt(reference, batch_size, num_tokens)
            assert torch.equal(greedy(streamed, inputs), greedy(reference, inputs)), (batch_size, num_tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_within_rounding_of_transformers_in_16_bits(family, dtype, tiny_pack):
    """torch itself rounds after every step; our error against fp32 on the same weights may not exceed its error."""
    tiny = tiny_pack(family, dtype)
    rounded = tiny.reference(dtype)
    exact = tiny.reference(dtype).to(torch.float32)
    streamed = flashlm.load(tiny.pack, pin=half_of(tiny.pack))
    for batch_size, num_tokens in ((1, 1), (3, 1), (1, 40), (3, 40)):
        inputs = prompt(exact, batch_size, num_tokens)
        with torch.no_grad():
            truth = exact(**inputs).logits
            theirs = (rounded(**inputs).logits.float() - truth).abs().max()
            ours = (streamed(**inputs).logits.float() - truth).abs().max()
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert ours <= 1.5 * theirs + eps * truth.abs().max(), (batch_size, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_placement_changes_no_bit(family, dtype, tiny_pack, whole_pack):
    """Everything pinned, half, nothing, and naive: the same logits for prompts and for every decoded token."""
    outputs = [_placed(make(family, dtype).pack) for make in (tiny_pack, whole_pack)]
    for mine, first in zip(
        outputs[1], outputs[0], strict=True
    ):  # nor does it matter whether linear layers are streamed
        assert torch.equal(mine, first)


def _placed(pack):
    """Return the logits that a pack gives with every placement."""
    placements = [{}, {"pin": half_of(pack)}, {"pin": 0}, {"mode": "naive"}]
    outputs = []
    for arguments in placements:
        model = flashlm.load(pack, **arguments)
        logits = []
        for batch_size, num_tokens in ((1, 1), (3, 40)):
            out = model.generate(
                **prompt(model, batch_size, num_tokens),
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits.append(torch.stack(out.logits))
        outputs.append((model.flash.placement, logits))
    pinned = [placement.pinned_bytes for placement, _ in outputs]
    assert pinned[0] > pinned[1] > pinned[2] == pinned[3] == 0
    for _, logits in outputs[1:]:
        for mine, first in zip(logits, outputs[0][1], strict=True):
            assert torch.equal(mine, first)
    return outputs[0][1]


@pytest.mark.parametrize("strategy", ["native", "widen"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_matrix_products_agree_with_float64(strategy, dtype, tiny_pack):
    """The way that this processor would not choose is right too."""
    model = flashlm.load(tiny_pack("llama", dtype).pack, pin=0)
    layer = model.get_submodule(model.flash.manifest.ffns[0].module)
    element = getattr(torch, dtype)
    tokens = torch.randn(24, layer.layout.hidden_size, generator=torch.Generator().manual_seed(0)).to(element)
    gemm = BlockGemm(element if strategy == "native" else None)
    with layer._bound.stream.unit(0) as runs:
        place = next(runs).place
        gate, up, down = (part.clone() for part in gemm.parts(layer.layout, place, layer.layout.block_rows))
        hidden = gemm.project(gemm.prepare(tokens, layer.layout), up, None)
        output = torch.zeros(tokens.shape)
        gemm.accumulate(hidden, down, output)
    assert gate.shape == up.shape
    exact_hidden = tokens.double() @ up.double().T
    eps = torch.finfo(torch.float32 if strategy == "widen" else element).eps
    size = layer.layout.hidden_size + layer.layout.block_rows
    bound = size * eps * (tokens.double().abs() @ up.double().abs().T)
    assert ((hidden.double() - exact_hidden).abs() <= bound).all()
    out_bound = size * eps * (hidden.double().abs() @ down.double().abs())
    assert ((output.double() - hidden.double() @ down.double()).abs() <= out_bound).all()
