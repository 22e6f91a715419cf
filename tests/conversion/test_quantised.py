"""Safetensors in MXFP4 and FP8 keep their bytes and give what transformers' own dequantisation gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import flashlm
from flashlm.conversion.convert import convert
from flashlm.conversion.sources.quantised import join_scales
from flashlm.conversion.sources.safetensors import open_checkpoint
from flashlm.conversion.sources.tensors import EncodedTensor, RowsRead
from flashlm.conversion.verify import verify
from flashlm.errors import PackError
from flashlm.planner.shape import read_shape
from flashlm.storage.ranges import RangeReader
from flashlm.storage.reader import AlignedBuffer
from tests.conversion.test_gguf import check_same
from tests.models import save_checkpoint

GPT_OSS = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
FP8_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": WIDE,
    "qwen3_moe": WIDE | {"moe_intermediate_size": 128},
    "deepseek_v3": WIDE
    | {"moe_intermediate_size": 128, "head_dim": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 64, "v_head_dim": 128,
       "q_lora_rank": 128, "kv_lora_rank": 128, "num_key_value_heads": 4},
}  # fmt: skip


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_quantisation(folder: Path, content: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": content}))


def save_mxfp4(folder: Path) -> None:
    """gpt-oss as it is released: experts as bytes of two elements and scales, other weights in bf16."""
    save_checkpoint(folder, "gpt_oss", dtype=torch.bfloat16, **GPT_OSS)
    random = torch.Generator().manual_seed(0)

    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = state.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=random)
            state[f"{name}_scales"] = torch.randint(118, 123, shape, dtype=torch.uint8, generator=random)

    change_weights(folder, change)
    set_quantisation(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def save_fp8(folder: Path, family: str, scale_dtype: torch.dtype = torch.float32) -> None:
    """As DeepSeek and Qwen release them: matrices in e4m3 with a scale for each tile, what is left in bf16."""
    save_checkpoint(folder, family, dtype=torch.bfloat16, **FP8_FAMILIES[family])

    def change(state: dict[str, torch.Tensor]) -> None:
        for name, weight in list(state.items()):
            is_left = weight.ndim != 2 or any(word in name for word in ("embed", "lm_head", "mlp.gate.", "norm"))
            if is_left:
                continue
            rows, width = weight.shape
            tiles = torch.zeros(-(-rows // 128) * 128, width)
            tiles[:rows] = weight
            tiles = tiles.view(-1, 128, width // 128, 128)
            scales = (tiles.abs().amax(dim=(1, 3)) / 448).to(scale_dtype)
            scaled = tiles / scales.float()[:, None, :, None]
            state[name] = scaled.view(-1, width)[:rows].to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scales

    change_weights(folder, change)
    set_quantisation(folder, FP8)


def dequantised(folder: Path) -> PreTrainedModel:
    """The model in fp32, by transformers' own dequantisation."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = load_file(folder / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in state if name.endswith("_blocks")]:
        blocks, scales = state.pop(f"{name}_blocks"), state.pop(f"{name}_scales")
        state[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    model.load_state_dict(state)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mxfp4_experts_give_the_models_logits(dtype: str, tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "source")
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype=dtype, min_linear_bytes=0)
    assert manifest.quantised == ("mxfp4",)
    assert verify(tmp_path / "pack").problems == ()
    found = flashlm.load(tmp_path / "pack")
    if dtype == "fp32":
        check_same(dequantised(tmp_path / "source"), found)
    found(torch.tensor([[1, 2, 3]]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FP8_FAMILIES)
def test_fp8_tiles_give_the_models_logits(family: str, tmp_path: Path) -> None:
    save_fp8(tmp_path / "source", family)
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype="fp32", min_linear_bytes=0)
    assert manifest.quantised == ("fp8_block",)
    config = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config, dtype=torch.float32)
    # transformers leaves what is not quantised in bf16
    check_same(wanted.eval().float(), flashlm.load(tmp_path / "pack"))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3", "deepseek_v3"])
def test_a_quantised_config_alone_says_what_a_pack_will_hold(family: str, tmp_path: Path) -> None:
    if family == "gpt_oss":
        save_mxfp4(tmp_path / "source")
    else:
        save_fp8(tmp_path / "source", family)
    convert(tmp_path / "source", tmp_path / "pack")
    planned, pack = read_shape(tmp_path / "source" / "config.json"), read_shape(tmp_path / "pack")
    assert planned.units == pack.units
    assert planned.quantised == pack.quantised != ()


def decoded(entry: EncodedTensor, rows: range) -> torch.Tensor:
    read = RowsRead([(entry, rows)])
    with RangeReader() as reader:
        return entry.values(read.read(reader, AlignedBuffer(read.room_bytes))[0])


rows_of = st.builds(
    lambda start, count, step: range(start, start + count * step, step),
    st.integers(0, 150),
    st.integers(1, 25),
    st.integers(1, 2),
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    rows=rows_of, seed=st.integers(0, 2**16), scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8])
)
def test_fp8_rows_are_elements_times_their_tiles_scale(
    tmp_path: Path, rows: range, seed: int, scale_dtype: torch.dtype
) -> None:
    """Two matrices of 200 rows: the last tiles of each are not whole."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 127, (2, 200, 256), dtype=torch.uint8, generator=random).view(torch.float8_e4m3fn)
    if scale_dtype == torch.uint8:
        scales = torch.randint(100, 150, (2, 2, 2), dtype=torch.uint8, generator=random)
        wide = (scales.float() - 127).exp2()
    else:
        scales = torch.rand((2, 2, 2), generator=random).to(scale_dtype)
        wide = scales.float()
    save_file({"w": weight, "w_scale_inv": scales}, tmp_path / "model.safetensors")
    entry = join_scales(open_checkpoint(tmp_path), FP8).tensors["w"]
    wanted = weight.float() * wide.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)
    assert torch.equal(decoded(entry, rows), wanted.view(400, 256)[rows.start : rows.stop : rows.step])


@quick
@given(rows=rows_of, seed=st.integers(0, 2**16))
def test_mxfp4_rows_are_what_transformers_makes_of_them(tmp_path: Path, rows: range, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (2, 100, 3, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(0, 255, (2, 100, 3), dtype=torch.uint8, generator=random)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    entry = join_scales(open_checkpoint(tmp_path), {"quant_method": "mxfp4"}).tensors["w"]
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).reshape(200, 96)
    assert torch.equal(decoded(entry, rows), wanted[rows.start : rows.stop : rows.step])


def no_scales(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight_scale_inv"]


def not_a_number(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight_scale_inv"][1, 0] = torch.nan


def below_zero(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight_scale_inv"][1, 0] = -1


def too_few(state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    state[name] = state[name][:2].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_scales, r"mlp\.up_proj\.weight in 8 bits without scales: .*weight_scale_inv is missing"),
        (not_a_number, r"mlp\.up_proj\.weight_scale_inv holds the scale nan"),
        (below_zero, r"holds the scale -1"),
        (too_few, r"weight_scale_inv as torch.float32 with shape \[2, 2\], \[3, 2\] expected"),
    ],
)
def test_damaged_scales_are_refused_before_anything_is_written(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    save_fp8(tmp_path / "source", "qwen3")
    change_weights(tmp_path / "source", change)
    with pytest.raises(PackError, match=message):
        convert(tmp_path / "source", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_fp8_in_other_tiles_or_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save_fp8(tmp_path / "source", "qwen3")
    set_quantisation(tmp_path / "source", FP8 | {"weight_block_size": None})
    with pytest.raises(PackError, match=r"FP8 with weight_block_size None.*convert the model that it was made from"):
        convert(tmp_path / "source", tmp_path / "pack")
    set_quantisation(tmp_path / "source", FP8)
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(tmp_path / "source", lambda state: state.update({name: state[name][:, :200].contiguous()}))
    with pytest.raises(PackError, match=r"200 inputs, no multiple of the 128 of a tile"):
        convert(tmp_path / "source", tmp_path / "pack")
    set_quantisation(tmp_path / "source", {"quant_method": "awq"})
    with pytest.raises(PackError, match=r"already quantized \(awq\)"):
        convert(tmp_path / "source", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_mxfp4_without_scales_or_with_one_that_is_no_number_is_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "source")
    name = "model.layers.1.mlp.experts.down_proj_scales"

    def no_number(state: dict[str, torch.Tensor]) -> None:
        state[name][3, 5, 1] = 255

    change_weights(tmp_path / "source", no_number)
    with pytest.raises(PackError, match=r"mlp\.experts\.down_proj_scales holds the scale nan"):
        convert(tmp_path / "source", tmp_path / "pack")
    change_weights(tmp_path / "source", lambda state: state.pop(name))
    with pytest.raises(PackError, match=r"down_proj_blocks without its scales"):
        convert(tmp_path / "source", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_mxfp4_beside_the_same_weight_in_plain_elements_is_refused(tmp_path: Path) -> None:
    save_mxfp4(tmp_path / "source")
    name = "model.layers.1.mlp.experts.down_proj"
    change_weights(tmp_path / "source", lambda state: state.update({name: torch.zeros(4, 96, 64)}))
    with pytest.raises(PackError, match=rf"holds {name} in two ways, the second as {name}_blocks"):
        convert(tmp_path / "source", tmp_path / "pack")
