"""Packs that keep a source's groups: blocks whose parts lie whole, each in its own encoding, in every mode and placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import flashlm
from flashlm.pack.manifest import read_manifest
from tests.encoded_packs import save_encoded_pack
from tests.engine.conftest import NUM_POSITIONS
from tests.engine.test_encodings import greedy, prompt

# Families, sizes of whole groups, and what of them is kept. Blocks of 32 or 256 neurons, the last one shorter or whole.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]], int | None]] = {
    "q4_0": ("llama", {"hidden_size": 64, "intermediate_size": 160}, {"ffn": ("q4_0",) * 3, "linear": ("q4_0",)}, 64),
    "opt q5_1": (
        "opt",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96},
        {"ffn": ("q5_1",) * 2, "linear": ("q8_0",)},
        64,
    ),
    "q4_k with q6_k": (
        "llama",
        {"hidden_size": 256, "intermediate_size": 768},
        {"ffn": ("q4_k", "q4_k", "q6_k"), "linear": ("q5_k",), "model.layers.1.mlp": ("iq4_xs", "q5_0", "q4_k")},
        512,
    ),
    "with plain parts": (
        "llama",
        {"hidden_size": 128, "intermediate_size": 384},
        {"ffn": ("fp16", "fp8_block", "fp32"), "model.layers.1.mlp": ("bf16", "fp16", "fp32"), "linear": ("fp16",)},
        128,
    ),
    "experts q4_1": (
        "qwen3_moe",
        {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 96},
        {"experts": ("q4_1", "q4_1", "q5_0"), "linear": ("iq4_nl",)},
        None,
    ),
    "experts mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}, {"experts": ("mxfp4",) * 3}, None),
    "experts and dense": (
        "deepseek_v3",
        {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 16, "intermediate_size": 96,
         "moe_intermediate_size": 64},
        {"experts": ("q4_0",) * 3, "linear": ("q4_0",)},
        None,
    ),
}  # fmt: skip
SHAPES = ((1, 1), (3, 1), (1, 40), (3, 40))


@dataclass(frozen=True)
class EncodedPack:
    """A pack and the model of its weights."""

    pack: Path
    reference: PreTrainedModel


Make = Callable[[str], EncodedPack]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, EncodedPack] = {}

    def make(name: str) -> EncodedPack:
        if name not in made:
            family, sizes, kept, block_rows = CASES[name]
            folder = tmp_path_factory.mktemp("encoded")
            sizes = {"max_position_embeddings": NUM_POSITIONS, **sizes}
            model = save_encoded_pack(folder, family, kept, block_rows=block_rows, **sizes)
            made[name] = EncodedPack(folder / "pack", model)
        return made[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_model_of_what_the_bytes_mean(name: str, encoded: Make) -> None:
    case = encoded(name)
    manifest = read_manifest(case.pack)
    assert any(unit.arrangement == "block" for unit in manifest.units)
    streamed = flashlm.load(case.pack, pin=manifest.streamed_bytes // 2)
    for shape in SHAPES:
        ours, theirs = greedy(streamed, prompt(*shape), 8), greedy(case.reference, prompt(*shape), 8)
        assert torch.equal(ours.sequences, theirs.sequences), shape
        mine, truth = torch.stack(ours.logits), torch.stack(theirs.logits)
        assert (mine - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * truth.abs().max(), shape


@pytest.mark.parametrize("name", CASES)
def test_placement_and_company_change_no_bit(name: str, encoded: Make) -> None:
    pack = encoded(name).pack
    manifest = read_manifest(pack)
    placements: list[dict[str, Any]] = [{}, {"pin": manifest.streamed_bytes // 2}, {"pin": 0}]
    if not manifest.experts:
        placements.append({"mode": "naive"})
    outputs = []
    for settings in placements:
        model = flashlm.load(pack, check="all", **settings)
        outputs.append([torch.stack(greedy(model, prompt(*shape), 6).logits) for shape in ((1, 1), (3, 40))])
        with torch.no_grad(), model.flash.phase("verify"):
            together = model(prompt(3, 5)).logits
            alone = torch.cat([model(ids[None]).logits for ids in prompt(3, 5)])
        assert torch.equal(together, alone)
        outputs[-1].append(together)
    for other in outputs[1:]:
        for mine, first in zip(other, outputs[0], strict=True):
            assert torch.equal(mine, first)
