"""Packs of q8_0: the model with the dequantised weights, in every mode and placement, beside rows of another encoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashlm
from flashlm.calibration.dense import calibrate
from flashlm.calibration.experts import calibrate_experts as count_experts
from flashlm.calibration.trigger import read_trigger
from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.engine.flash_linear import FlashLinear
from flashlm.errors import ConfigError, PackError
from flashlm.pack.description import describe
from flashlm.pack.manifest import Manifest, read_manifest, unit_path
from flashlm.planner.shape import read_shape
from flashlm.probe.device_profile import profile_path, save_profile
from tests.cli.test_cli import flashlm as command
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import NUM_POSITIONS, TinyPack, save_tokenizer
from tests.engine.test_experts import Routes
from tests.models import EXPERT_FAMILIES, save_checkpoint
from tests.pack.packs import change_manifest
from tests.planner.profiles import make_profile

Make = Callable[..., TinyPack]
# Widths of whole groups, rows that are no multiple of a block; wide, so that matrices have several blocks.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 288},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
    "qwen3_moe": {"hidden_size": 64, "head_dim": 16},
    "deepseek_v3": {
        "hidden_size": 64,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "v_head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
    },
}
FAMILIES = sorted(SIZES)


@pytest.fixture(scope="module")
def q8_pack(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[str, str], TinyPack] = {}

    def make(family: str, dtype: str = "float32") -> TinyPack:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"q8-{family}-{dtype}")
            save_checkpoint(folder / "source", family, max_position_embeddings=NUM_POSITIONS, **SIZES[family])
            settings = {"min_linear_bytes": 0, "block_rows": None if family in EXPERT_FAMILIES else 16}
            convert(folder / "source", folder / "pack", dtype=dtype, quantize="q8_0", **settings)
            made[family, dtype] = TinyPack(folder / "source", folder / "pack")
        return made[family, dtype]

    return make


def through_q8_0(weight: torch.Tensor) -> torch.Tensor:
    """Quantise along the last axis by the reference, and back."""
    kind = gguf.GGMLQuantizationType.Q8_0
    flat = weight.detach().float().reshape(-1, weight.shape[-1]).contiguous().numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)).view(weight.shape)


def dequantised(tiny: TinyPack, manifest: Manifest) -> PreTrainedModel:
    """The checkpoint's model in fp32, its streamed weights as a pack of q8_0 has them: down along each neuron's column."""
    model = tiny.reference("float32")
    with torch.no_grad():
        for unit in manifest.units:
            if unit.kind == "embedding":  # a token reads one row: fewer bits would gain nothing
                assert unit.layout.plain is not None
                continue
            assert set(unit.encodings) == {"q8_0"}, unit.module
            module: Any = model.get_submodule(unit.module)
            if unit.kind == "linear":
                along_rows, along_columns = [module.weight], []
            elif unit.kind == "experts":
                along_rows, along_columns = [module.gate_up_proj], [module.down_proj]
            elif manifest.model_type == "opt":
                layer = model.get_submodule(unit.module.rpartition(".")[0])
                along_rows, along_columns = [layer.fc1.weight], [layer.fc2.weight]
            else:
                along_rows = [module.gate_proj.weight, module.up_proj.weight]
                along_columns = [module.down_proj.weight]
            for weight in along_rows:
                weight.copy_(through_q8_0(weight))
            for weight in along_columns:
                weight.copy_(through_q8_0(weight.transpose(-1, -2)).transpose(-1, -2))
    return model


def prompt(num_sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_sequences * 100 + length)
    return torch.randint(3, 96, (num_sequences, length), generator=generator)


def greedy(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int = 24) -> Any:
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_of_the_dequantised_weights(family: str, q8_pack: Make) -> None:
    tiny = q8_pack(family)
    manifest = read_manifest(tiny.pack)
    reference = dequantised(tiny, manifest)
    streamed = flashlm.load(tiny.pack, pin=manifest.streamed_bytes // 2)
    assert streamed.flash.placement.streamed_bytes or manifest.experts
    for shape in ((1, 1), (3, 1), (1, 40), (3, 40)):
        ours, theirs = greedy(streamed, prompt(*shape)), greedy(reference, prompt(*shape))
        assert torch.equal(ours.sequences, theirs.sequences), shape
        mine, truth = torch.stack(ours.logits), torch.stack(theirs.logits)
        assert (mine - truth).abs().max() <= 64 * torch.finfo(torch.float32).eps * truth.abs().max(), shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_16_bits_it_is_within_rounding(family: str, dtype: str, q8_pack: Make) -> None:
    """As in test_parity: torch's error in 16 bits bounds ours; resident weights are rounded to these, rows are not."""
    tiny = q8_pack(family, dtype)
    manifest = read_manifest(tiny.pack)
    exact = dequantised(tiny, manifest)
    streamed_names = {f"{unit.module}." for unit in manifest.units if unit.layout.plain is None}
    for name, weight in exact.named_parameters():
        if not name.startswith(tuple(streamed_names)):
            weight.data = weight.data.to(getattr(torch, dtype)).float()
    rounded = dequantised(tiny, manifest).to(getattr(torch, dtype))
    streamed = flashlm.load(tiny.pack, pin=0)
    for shape in ((1, 1), (3, 1), (1, 40), (3, 40)):
        with torch.no_grad():
            routes = Routes(exact) if manifest.experts else None  # rounding can send a token to another expert
            truth = exact(prompt(*shape)).logits
            errors = []
            for model in (rounded, streamed):
                if routes is not None:
                    routes.impose(model)
                errors.append((model(prompt(*shape)).logits.float() - truth).abs().max())
            if routes is not None:
                routes.release()
        theirs, ours = errors
        assert ours <= 1.5 * theirs + torch.finfo(getattr(torch, dtype)).eps * truth.abs().max(), shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_placement_changes_no_bit(family: str, dtype: str, q8_pack: Make) -> None:
    pack = q8_pack(family, dtype).pack
    manifest = read_manifest(pack)
    placements: list[dict[str, Any]] = [
        {},
        {"pin": manifest.streamed_bytes // 2},
        {"pin": 0},
        {"check": "all", "pin": 0},
    ]
    if not manifest.experts:
        placements.append({"mode": "naive"})
    outputs = []
    for settings in placements:
        model = flashlm.load(pack, **settings)
        matrices = [model.get_submodule(unit.module) for unit in manifest.units if unit.kind == "linear"]
        assert all(isinstance(each, FlashLinear) for each in matrices)  # wherever it lies: torch knows no such weight
        outputs.append([torch.stack(greedy(model, prompt(*shape), 6).logits) for shape in ((1, 1), (3, 40))])
        with torch.no_grad(), model.flash.phase("verify"):
            outputs[-1].append(model(prompt(2, 5)).logits)
    for other in outputs[1:]:
        for mine, first in zip(other, outputs[0], strict=True):
            assert torch.equal(mine, first)


def test_one_unit_may_be_quantised_beside_another(tmp_path: Path) -> None:
    """What does not fit stays in the pack's dtype, and is told; matrices of one pack go different ways."""
    lines: list[str] = []
    save_checkpoint(tmp_path / "source", "qwen3_moe", hidden_size=64, head_dim=12)
    manifest = convert(
        tmp_path / "source", tmp_path / "pack", quantize="q8_0", min_linear_bytes=0, announce=lines.append
    )
    assert {unit.encodings[0] for unit in manifest.units} == {"q8_0", "bf16"}
    (told,) = [line for line in lines if line.startswith("left in bfloat16, not q8_0: 2 streamed units")]
    assert "rows of 48 elements" in told
    assert told in manifest.source.notes
    assert "quantised to q8_0 from float32 by flashlm: 5 of 7 streamed units" in manifest.source.notes
    assert "left in bfloat16, since a token reads one row of it: model.embed_tokens" in manifest.source.notes
    assert dict(describe(tmp_path / "pack").rows())["streamed rows"].count(" in ") == 2
    outputs = []
    for pin in (0, None):
        model = flashlm.load(tmp_path / "pack", pin=pin)
        assert model.flash.exactness.endswith("of weights that were quantised to q8_0")
        outputs.append(torch.stack(greedy(model, prompt(2, 40), 4).logits))
        kinds = [
            type(model.get_submodule(unit.module)) is FlashLinear for unit in manifest.units if unit.kind == "linear"
        ]
    assert not all(kinds)  # a plain matrix that is pinned is an ordinary layer
    assert torch.equal(*outputs)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_all_rows_of_mode_sparse_give_hybrid_to_the_bit(activations: str, q8_pack: Make, tmp_path: Path) -> None:
    tiny = q8_pack("opt")
    pack = Path(shutil.copytree(tiny.pack, tmp_path / "pack"))
    write_calibration(pack, predicts_all=True)
    sparse = flashlm.load(pack, dram="3GiB", mode="sparse", context=160, activations=activations)
    hybrid = flashlm.load(pack, mode="hybrid", context=160, activations=activations)
    assert sparse.flash.mode == "sparse"
    assert torch.equal(*(torch.stack(greedy(model, prompt(1, 9), 8).logits) for model in (sparse, hybrid)))
    manifest = read_manifest(pack)
    weight, _ = read_trigger(pack, manifest, 1)
    reference: Any = dequantised(tiny, manifest)
    assert torch.equal(weight, reference.model.decoder.layers[1].fc1.weight)


@pytest.mark.parametrize("family", ["opt", "qwen3_moe"])
def test_calibrations_are_made_and_used(family: str, q8_pack: Make, tmp_path: Path, text: Path) -> None:
    """Rows are laid down in another order on the way: their bytes as they are."""
    pack = Path(shutil.copytree(q8_pack(family).pack, tmp_path / "pack"))
    save_tokenizer(pack)
    with torch.no_grad():
        before = flashlm.load(pack, dram="3GiB")(prompt(2, 40)).logits
    if family == "opt":
        calibrate(pack, text, rank=8, dram="3GiB")
        assert all(unit.order_checksum for unit in read_manifest(pack).ffns)
    else:
        count_experts(pack, text)
    verify(pack).raise_for_problems()
    model = flashlm.load(pack, dram="3GiB", mode="sparse" if family == "opt" else "experts", context=160)
    assert torch.isfinite(torch.stack(greedy(model, prompt(1, 9), 8).logits)).all()
    assert (model(prompt(2, 40)).logits - before).abs().max() < 1e-4  # prompts are exact; sums in another order


@pytest.mark.parametrize("pin", [0, None])
def test_adapters_work_on_quantised_layers(q8_pack: Make, tmp_path: Path, pin: int | None) -> None:
    tiny = q8_pack("llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(dequantised(tiny, read_manifest(tiny.pack)), config).eval()
    reference.save_pretrained(tmp_path)
    ours = peft.PeftModel.from_pretrained(flashlm.load(tiny.pack, pin=pin, dram="3GiB"), tmp_path)
    for shape in ((1, 1), (2, 40)):
        with torch.no_grad():
            mine, truth = ours(prompt(*shape)).logits, reference(prompt(*shape)).logits
        assert (mine - truth).abs().max() <= 256 * torch.finfo(torch.float32).eps * truth.abs().max()
    with pytest.raises(ConfigError):
        ours.merge_adapter()


def test_a_flipped_bit_is_found(q8_pack: Make, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(q8_pack("llama").pack, tmp_path / "pack"))
    verify(pack).raise_for_problems()
    path = unit_path(pack, read_manifest(pack).ffns[1])
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1  # of a scale
    path.write_bytes(raw)
    assert "block 0 (rows 0 to 15)" in verify(pack).problems[0]
    with pytest.raises(PackError, match="block 0"):
        flashlm.load(pack, pin=None)


FFN = 5  # embeddings and four of attention come first


def _set(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["units"][FFN].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(encodings=["q8_0", "q8_0"]), "3 parts need as many encodings"),
        (_set(encodings=["q8_0", "q8_0", "bf16"]), "rows of bf16 in a pack of float32|strides"),
        (_set(encodings=["q8_0", "q8_0", "fp32"]), "strides"),
        (_set(encodings=["q4_0"] * 3), "encodings"),
        (_set(hidden_size=250), "not whole groups"),
    ],
)
def test_encodings_that_can_not_be_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, q8_pack: Make, tmp_path: Path
) -> None:
    pack = Path(shutil.copytree(q8_pack("llama").pack, tmp_path / "pack"))
    assert read_manifest(pack).units[FFN].kind == "ffn"
    change_manifest(pack, change)
    with pytest.raises(PackError, match=message):
        read_manifest(pack)


def test_plan_counts_bytes_by_encoding_and_says_what_it_assumes(q8_pack: Make, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(q8_pack("llama", "bfloat16").pack, tmp_path / "pack"))
    save_profile(make_profile(), profile_path(pack))
    told = command("plan", pack, "--dram", "4GiB")
    assert "ASSUMED for q8_0: as many bytes a second as measured for bfloat16" in " ".join(told.stdout.split())
    assert '"rates": "ASSUMED for q8_0' in command("plan", pack, "--dram", "4GiB", "--json").stdout
    before, after = (read_shape(q8_pack("llama").source, quantize=quantize) for quantize in (None, "q8_0"))
    for shape in (before, after):
        assert shape.matrix_weights == before.matrix_weights
    ratio = 34 / 64  # bytes of a group over those of 32 elements in 16 bits
    pairs = zip(before.units, after.units, strict=True)
    assert all(new.layout.row_bytes == ratio * old.layout.row_bytes for old, new in pairs)
    with pytest.raises(ConfigError, match="q9"):
        read_shape(q8_pack("llama").source, quantize="q9")


def test_the_command_quantises(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama", hidden_size=64)
    told = command("convert", tmp_path / "source", tmp_path / "pack", "--quantize", "q8_0").stdout
    assert "quantised to q8_0 from float32 by flashlm" in " ".join(told.split())
    with pytest.raises(ConfigError, match="quantize is 'q3_7'"):
        convert(tmp_path / "source", tmp_path / "other", quantize="q3_7")
    with pytest.raises(ConfigError, match=r"another conversion|different|other settings"):
        convert(tmp_path / "source", tmp_path / "pack")


def test_infinite_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "source", "llama", hidden_size=64)
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight[3:4, 5:6], np.inf)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(PackError, match=r"layers.1.mlp.down_proj.weight can't be quantised"):
        convert(tmp_path / "source", tmp_path / "pack", quantize="q8_0")


def test_transformers_opens_it_too(q8_pack: Make) -> None:
    tiny = q8_pack("llama")
    model = AutoModelForCausalLM.from_pretrained(tiny.pack)
    ids = prompt(2, 7)
    assert torch.equal(greedy(model, ids, 8).sequences, greedy(flashlm.load(tiny.pack), ids, 8).sequences)
