"""Packs that keep a source's groups: blocks whose parts lie whole, each in its own encoding, in every mode and placement."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashlm
from flashlm.calibration.dense import calibrate
from flashlm.calibration.evaluate import evaluate
from flashlm.calibration.experts import calibrate_experts
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, PackError
from flashlm.pack.description import describe
from flashlm.pack.manifest import Manifest, read_manifest, unit_path
from flashlm.pack.reorder import reorder
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import check_mode, make_plan
from flashlm.planner.plan_document import load_plan
from flashlm.planner.published import assume_sparsity
from flashlm.planner.shape import read_shape
from flashlm.probe.device_profile import EncodedRates, profile_path, save_profile
from flashlm.rows.products import multiplies_int8
from tests.cli.test_cli import flashlm as command
from tests.encoded_packs import save_encoded_pack
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import NUM_POSITIONS, save_tokenizer
from tests.engine.test_encodings import greedy, prompt
from tests.planner.profiles import make_profile

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


@torch.no_grad()
def units_of_a_batch(model: Any, manifest: Manifest) -> list[torch.Tensor]:
    """Return what streamed units make of a batch, the same as of its sequences alone; transformers' own parts may differ."""
    generator = torch.Generator().manual_seed(0)
    outputs = []
    for unit in manifest.units:
        module = model.get_submodule(unit.module)
        x = torch.randn(3, 5, unit.hidden_size, generator=generator)
        if unit.kind == "embedding":
            continue
        if unit.kind == "experts":
            index = torch.rand(15, unit.num_experts, generator=generator).argsort(dim=1)[:, : unit.num_active]
            weights = torch.rand(index.shape, generator=generator)
            together = module(x.flatten(0, 1), index, weights)
            alone = torch.cat(
                [module(x.flatten(0, 1)[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(15)]
            )
        else:
            together = module(x)
            alone = torch.cat([module(some[None]) for some in x])
        assert torch.equal(together, alone), unit.module
        outputs.append(together)
    return outputs


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
            outputs[-1].append(model(prompt(3, 5)).logits)
        outputs[-1] += units_of_a_batch(model, manifest)
    for other in outputs[1:]:
        for mine, first in zip(other, outputs[0], strict=True):
            assert torch.equal(mine, first)


def test_what_is_computed_can_be_watched_and_cut(encoded: Make) -> None:
    """Observers, selections and thresholds see neurons in file order, however their weights lie."""
    case = encoded("q4_k with q6_k")
    model = flashlm.load(case.pack, pin=0)
    layer: Any = model.model.layers[1].mlp
    seen: list[tuple[range, torch.Tensor]] = []
    layer.observer = lambda index, span, tokens, activated: seen.append((span, activated.clone()))
    for length in (3, 40):  # row kernels, and matrix products
        seen.clear()
        inputs: list[torch.Tensor] = []
        handle = case.reference.model.layers[1].mlp.register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0])
        )
        with torch.no_grad():
            model(prompt(1, length))
            case.reference(prompt(1, length))
        handle.remove()
        mlp: Any = case.reference.model.layers[1].mlp
        assert [span for span, _ in seen] == [range(0, 512), range(512, 768)]
        truth = mlp.act_fn(mlp.gate_proj(inputs[0][0]))
        torch.testing.assert_close(torch.cat([values for _, values in seen], dim=1), truth, rtol=1e-4, atol=1e-5)
        layer.selection = lambda tokens: torch.zeros(len(tokens), 768, dtype=torch.bool)
        with torch.no_grad():
            assert not layer(inputs[0]).any()
        layer.selection = None


@pytest.mark.parametrize("pin", [0, None])
def test_adapters_work(encoded: Make, tmp_path: Path, pin: int | None) -> None:
    case = encoded("q4_0")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(copy.deepcopy(case.reference), config).eval()
    reference.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(flashlm.load(case.pack, pin=pin), tmp_path)
    for shape in ((1, 1), (2, 40)):
        with torch.no_grad():
            mine, truth = ours(prompt(*shape)).logits, reference(prompt(*shape)).logits
        assert (mine - truth).abs().max() <= 256 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_what_reads_single_rows_is_refused_by_name(encoded: Make, text: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(encoded("opt q5_1").pack, tmp_path / "pack"))
    save_tokenizer(pack)
    manifest = read_manifest(pack)
    why = r"reads single rows, but those of .* don't lie by themselves: .*\(q5_1\)"
    with pytest.raises(ConfigError, match=f"mode sparse {why}"):
        flashlm.load(pack, mode="sparse")
    with pytest.raises(ConfigError, match=f"a calibration {why}"):
        calibrate(pack, text)
    with pytest.raises(ConfigError, match=f"mode sparse {why}"):
        check_mode(assume_sparsity(read_shape(pack)), "sparse")
    with pytest.raises(PackError, match="none lies by itself"):
        reorder(pack, manifest, [np.arange(unit.num_rows) for unit in manifest.ffns])
    write_calibration(pack, predicts_all=True)
    assert flashlm.load(pack, mode="auto").flash.mode == "hybrid"
    told = command("plan", pack, "--dram", "3GiB", "--mode", "sparse")
    assert (told.returncode, told.stderr.count("mode sparse reads single rows")) == (2, 1)
    (hybrid,) = evaluate(pack, text, modes=["hybrid"], window=64, max_tokens=128)
    assert hybrid.perplexity > 1.0


def test_routing_is_calibrated(encoded: Make, text: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(encoded("experts q4_1").pack, tmp_path / "pack"))
    save_tokenizer(pack)
    report = calibrate_experts(pack, text)
    assert report.row_reads is None
    assert flashlm.load(pack, expert_policy="pinned", pin=0).flash.expert_policy.name == "pinned"


def test_it_is_told_and_counted(encoded: Make, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(encoded("q4_k with q6_k").pack, tmp_path / "pack"))
    manifest = read_manifest(pack)
    info = describe(pack)
    assert set(info.encodings) == {"q4_k", "q5_k", "q6_k", "iq4_xs", "q5_0", "fp32"}  # the table is plain
    assert sum(info.encodings.values()) <= manifest.streamed_bytes
    assert verify(pack).problems == ()
    model = flashlm.load(pack)
    assert model.flash.exactness.endswith("of weights that were iq4_xs, q4_k, q5_0, q5_k, q6_k, as the source has them")
    assert sum(weight.numel() for weight in model.parameters()) == sum(
        weight.numel() for weight in encoded("q4_k with q6_k").reference.parameters()
    )
    path = unit_path(pack, manifest.ffns[1])
    raw = bytearray(path.read_bytes())
    raw[-4096] ^= 1
    path.write_bytes(raw)
    assert "block 1 (rows 512 to 767)" in verify(pack).problems[0]


def test_a_plan_goes_by_what_was_measured_of_each_encoding(encoded: Make) -> None:
    shape = read_shape(encoded("experts and dense").pack)
    profile = make_profile()
    assert shape.assumed(rates_of(profile, "float32")) == ("q4_0",)
    times = []
    for rate in (1.0, 2.0):
        one = EncodedRates(
            encoding="q4_0", matrix_gb_per_s=rate, down_gb_per_s=rate, expert_gb_per_s=rate, gemm_gflop_per_s=rate
        )
        rates = rates_of(profile.model_copy(update={"encoded": (one,)}), "float32")
        assert shape.assumed(rates) == ()
        plan = make_plan(shape, replace(rates, token_overhead_s=0.0, layer_overhead_s=0.0), 4 << 30)
        times.append((plan.compute_s, plan.prompt_s))
    assert times[0][0] > times[1][0]
    assert times[0][1] > times[1][1]


def test_transformers_opens_it_too(encoded: Make) -> None:
    pack = encoded("q4_0").pack
    model = AutoModelForCausalLM.from_pretrained(pack)
    ids = prompt(2, 7)
    assert torch.equal(greedy(model, ids, 8).sequences, greedy(flashlm.load(pack), ids, 8).sequences)


@pytest.mark.parametrize("name", ["opt q5_1", "q4_k with q6_k", "experts q4_1", "experts and dense"])
def test_activations_of_8_bits_are_near_and_as_independent(name: str, encoded: Make) -> None:
    case = encoded(name)
    manifest = read_manifest(case.pack)
    outputs = []
    for settings in ({}, {"pin": manifest.streamed_bytes // 2}, {"pin": 0}):
        model = flashlm.load(case.pack, activations="int8", **settings)
        assert model.flash.exactness.startswith("approximate: tokens are rounded to 8 bits")
        assert "(approximate)" in model.flash.describe()
        with torch.no_grad(), model.flash.phase("verify"):
            outputs.append([model(prompt(3, 5)).logits])
        with torch.no_grad():
            outputs[-1].append(model(prompt(2, 40)).logits)
        outputs[-1] += units_of_a_batch(model, manifest)
    for other in outputs[1:]:
        for mine, first in zip(other, outputs[0], strict=True):
            assert torch.equal(mine, first)
    exact = flashlm.load(case.pack)
    for unit, rounded in zip(units_of_a_batch(exact, manifest), outputs[0][2:], strict=True):
        error = (rounded - unit).norm() / unit.norm()
        assert 0 < error < 0.02
    if not manifest.experts and multiplies_int8(manifest.main.encodings[0]):
        hidden, first = torch.randn(1, 40, manifest.main.hidden_size), manifest.ffns[0].module
        with torch.no_grad():  # a prompt
            rounded, unit = model.get_submodule(first)(hidden), exact.get_submodule(first)(hidden)
        assert 0 < (rounded - unit).norm() / unit.norm() < 0.02


def test_activations_of_8_bits_are_refused_where_nothing_takes_them(tiny_pack: Callable[..., Any]) -> None:
    pack = tiny_pack("llama").pack
    with pytest.raises(ConfigError, match=r"activations='int8': all weights of .* are plain"):
        flashlm.load(pack, activations="int8")
    with pytest.raises(ConfigError, match=r"activations='int4' is unknown: choose one of exact, int8"):
        flashlm.load(pack, activations="int4")
    told = command("plan", pack, "--dram", "3GiB", "--activations", "int8")
    assert (told.returncode, "all weights" in told.stderr) == (2, True)


def test_activations_go_through_plans_and_commands(encoded: Make, text: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(encoded("q4_0").pack, tmp_path / "pack"))
    save_tokenizer(pack)
    save_profile(make_profile(), profile_path(pack))
    saved = tmp_path / "plan.json"
    command("plan", pack, "--dram", "3GiB", "--activations", "int8", "--save", saved)
    plan = load_plan(saved)
    assert (plan.activations, plan.is_exact) == ("int8", False)
    assert flashlm.load(pack, plan=saved).flash.decision.activations == "int8"
    assert flashlm.load(pack, plan=saved, activations="exact").flash.decision.activations == "exact"
    text_of = ("generate", pack, "--prompt", "w5 w6", "--max-new-tokens", 4)
    assert "approximate" in command(*text_of, "--activations", "int8", "--json").stdout
    perplexities = [
        evaluate(pack, text, modes=["hybrid"], max_tokens=64, activations=each) for each in ("exact", "int8")
    ]
    (exact,), (rounded,) = perplexities
    assert exact.perplexity != rounded.perplexity
    assert abs(rounded.perplexity / exact.perplexity - 1) < 0.01
