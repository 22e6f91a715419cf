"""Models from GGUF files give what transformers' own reading of the same file gives."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashlm
from flashlm.cli.plan import source_shape
from flashlm.conversion.convert import convert
from flashlm.conversion.sources.gguf_header import read_gguf_header
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, FlashError, PackError, UnsupportedModelError
from flashlm.pack.manifest import UnitEntry, read_manifest, unit_path
from flashlm.planner.shape import read_shape
from flashlm.rows.encodings import ENCODINGS
from tests.gguf_files import ARCHITECTURES, Extra, q4_0, save_gguf

# transformers 5.23 makes neither config nor experts of files of gpt-oss.
_NOT_OF_TRANSFORMERS = ("gpt-oss",)
TOKENS = torch.tensor([[3, 17, 42, 5, 90, 8, 23, 11]])
MORE_TOKENS = torch.cat([TOKENS, TOKENS + 1, TOKENS + 2], dim=1)  # than a sliding window has


def check_same(wanted: PreTrainedModel, found: PreTrainedModel) -> None:
    for tokens in (TOKENS, MORE_TOKENS):
        with torch.no_grad():
            logits, mine = wanted(tokens).logits, found(tokens).logits
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(found.generate(TOKENS, **asked), wanted.generate(TOKENS, **asked))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_models_logits(architecture: str, tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "tiny.gguf", architecture, q4_0)
    convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0)
    assert read_manifest(tmp_path / "pack").quantised == ("q4_0",)
    check_same(model, flashlm.load(tmp_path / "pack"))
    if architecture not in _NOT_OF_TRANSFORMERS:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="tiny.gguf", config=model.config, dtype=torch.float32
        )
        check_same(theirs.eval(), flashlm.load(tmp_path / "pack"))


WIDE = {"hidden_size": 256, "intermediate_size": 512}
GROUPED = tuple(name for name, each in ENCODINGS.items() if not each.is_plain and name != "fp8_block")


def mixed(name: str) -> str:
    """As files called Q4_K_M are: a type for each tensor."""
    ends = {
        "gate_proj.weight": "q4_k",
        "up_proj.weight": "q5_k",
        "down_proj.weight": "q6_k",
        "q_proj.weight": "iq4_xs",
        "k_proj.weight": "q5_1",
        "v_proj.weight": "q8_0",
        "o_proj.weight": "fp16",
        "embed_tokens.weight": "q6_k",
        "lm_head.weight": "q8_0",
    }
    return next((encoding for end, encoding in ends.items() if name.endswith(end)), "q4_0")


def unit_matrices(pack: Path, entry: UnitEntry) -> list[np.ndarray]:
    """The parts of a unit as they lie in its file, by blocks: rows of bytes."""
    layout, content = entry.layout, np.fromfile(unit_path(pack, entry), dtype=np.uint8)
    parts: list[list[np.ndarray]] = [[] for _ in layout.parts]
    for block in range(layout.num_blocks):
        rows, start = len(layout.rows_of(block)), layout.offset_of(block)
        if not layout.is_by_block:
            parts[0].append(content[start : start + rows * layout.row_bytes].reshape(rows, -1))
            continue
        for index, part in enumerate(layout.block_parts(rows)):
            at = start + part.offset_bytes
            parts[index].append(content[at : at + part.num_bytes].reshape(part.num_rows, -1))
    is_down = [layout.is_by_block and name == "down" for name in layout.parts]
    return [np.concatenate(some, axis=int(down)) for some, down in zip(parts, is_down, strict=True)]


def dequantized(rows: np.ndarray, encoding: str) -> torch.Tensor:
    """What the reference library makes of rows of bytes."""
    plain = ENCODINGS[encoding].dtype
    if plain is not None:
        return torch.from_numpy(rows.copy()).view(plain).float()
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType[encoding.upper()]))


def weights_of(model: PreTrainedModel, entry: UnitEntry) -> list[torch.Tensor]:
    names = ("gate_proj", "up_proj", "down_proj") if entry.kind == "ffn" else ("",)
    return [model.get_submodule(f"{entry.module}.{name}".rstrip(".")).weight for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("types", [*GROUPED, "mixed", "fp16", "bf16", "fp32"])
def test_every_type_keeps_its_values_to_the_bit(types: str, tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "tiny.gguf", "llama", mixed if types == "mixed" else lambda name: types, **WIDE)
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0)
    assert verify(tmp_path / "pack").problems == ()
    for entry in manifest.units:
        if types in ("fp16", "bf16", "fp32"):
            assert set(entry.encodings) == {types}
            if entry.kind == "ffn":
                continue  # rows that lie by themselves
        found = zip(unit_matrices(tmp_path / "pack", entry), entry.encodings, weights_of(model, entry), strict=True)
        for rows, encoding, weight in found:
            assert torch.equal(dequantized(rows, encoding), weight)
    check_same(model, flashlm.load(tmp_path / "pack"))


def test_types_that_are_not_multiplied_with_can_be_written_anew(tmp_path: Path) -> None:
    model = save_gguf(tmp_path / "tiny.gguf", "llama", lambda name: "q3_k" if "proj" in name else "q4_0", **WIDE)
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q\.weight in Q3_K, which .* --quantize q8_0"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0)
    assert not (tmp_path / "pack").exists()
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack", quantize="q8_0", min_linear_bytes=0)
    assert manifest.quantised == ("q8_0",)
    assert any(note.startswith("quantised to q8_0 from q3_k and q4_0 by flashlm") for note in manifest.source.notes)
    with torch.no_grad():
        wanted, found = model(TOKENS).logits, flashlm.load(tmp_path / "pack")(TOKENS).logits
    assert (wanted - found).norm() < 0.02 * wanted.norm()


def test_settings_beside_the_encodings(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama", q4_0)
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack", dtype="bf16", block_rows=32)
    assert (manifest.dtype, manifest.ffns[0].block_rows, manifest.quantised) == ("bfloat16", 32, ("q4_0",))
    assert "kept as the source has them, in q4_0: 2 of 2 streamed units" in manifest.source.notes
    again: list[str] = []
    convert(tmp_path / "tiny.gguf", tmp_path / "pack", dtype="bf16", block_rows=32, announce=again.append)
    assert again == [f"{tmp_path / 'pack'} is already finished: nothing to do"]
    with pytest.raises(ConfigError, match="another source or with other settings"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")


def test_a_plan_before_conversion_knows_the_packs_bytes(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "qwen3moe", mixed, hidden_size=256, moe_intermediate_size=256, vocab_size=2048)
    convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    planned, pack = source_shape(str(tmp_path)), read_shape(tmp_path / "pack")
    assert [unit.kind for unit in planned.units] == ["embedding", "experts", "experts", "linear"]
    assert planned.units == pack.units
    assert (planned.resident_bytes, planned.matrix_bytes) == (pack.resident_bytes, pack.matrix_bytes)
    assert planned.outline == pack.outline
    assert "q6_k" in planned.outline


def stretched(factor: float, width: int, theta: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3's scaling, frequency by frequency."""
    found = []
    for index in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / width)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1] * 4, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32, "attention_factor": 1.19, "partial_rotary_factor": 1.0}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROTARY: dict[str, tuple[str, dict[str, Any], Extra]] = {
    "llama3": ("llama", LLAMA3, {"rope_freqs.weight": stretched(32.0, 64, 500000.0)}),
    "longrope": (
        "phi3",
        LONG,
        {
            "rope_factors_short.weight": np.array(LONG["short_factor"], dtype=np.float32),
            "rope_factors_long.weight": np.array(LONG["long_factor"], dtype=np.float32),
            "phi3.rope.scaling.original_context_length": 32,
            "phi3.rope.scaling.attn_factor": 1.19,
        },
    ),
    "yarn": (
        "qwen2",
        YARN,
        {
            "qwen2.rope.scaling.type": "yarn",
            "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 32,
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_scaling_that_transformers_leaves_out_is_taken(kind: str, tmp_path: Path) -> None:
    architecture, rope, extra = ROTARY[kind]
    settings: dict[str, Any] = {"rope_parameters": rope}
    if kind == "llama3":
        settings |= {"head_dim": 64}
    if kind == "longrope":
        settings |= {"original_max_position_embeddings": 32}
    model = save_gguf(tmp_path / "tiny.gguf", architecture, q4_0, extra=extra, **settings)
    convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    found = flashlm.load(tmp_path / "pack")
    assert all(found.config.rope_parameters[key] == pytest.approx(value) for key, value in rope.items())
    check_same(model, found)


def test_linear_scaling_by_its_old_name_is_taken(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = save_gguf(tmp_path / "tiny.gguf", "llama", extra={"llama.rope.scale_linear": 4.0}, rope_parameters=rope)
    convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    check_same(model, flashlm.load(tmp_path / "pack"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)},
            r"rope_freqs\.weight\) that are not those of Llama 3\.1 or 3\.2",
        ),
        ({"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "not known here: 'dynamic' by 2.0"),
        ({"llama.rope.scaling.type": "yarn"}, "not known here: 'yarn' by None"),
    ],
)
def test_rotary_scaling_of_no_known_kind_is_refused(extra: Extra, message: str, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama", extra=extra)
    with pytest.raises(UnsupportedModelError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")


def test_layers_for_further_tokens_are_left_out_only_where_the_file_states_them(tmp_path: Path) -> None:
    beyond = {"blk.2.ffn_norm.weight": np.ones(64, dtype=np.float32)}
    save_gguf(tmp_path / "tiny.gguf", "qwen35", extra=beyond)
    with pytest.raises(UnsupportedModelError, match=r"1 tensors that have no place .* first blk\.2\.ffn_norm\.weight"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    stated = {"qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    save_gguf(tmp_path / "tiny.gguf", "qwen35", extra=beyond | stated)
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    assert any(
        "1 tensors that transformers ignores too, first blk.2.ffn_norm" in note for note in manifest.source.notes
    )


def test_a_tokenizer_that_makes_its_library_panic_is_left_out(tmp_path: Path) -> None:
    """Its errors are no `Exception`."""
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["t1 t2"]}
    save_gguf(tmp_path / "tiny.gguf", "llama", extra=tokenizer)
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    assert any(note.startswith("no tokenizer: transformers makes none") for note in manifest.source.notes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "phi3.rope.dimension_count",
            "16",
            r"no config can be made of .*tiny\.gguf, of architecture 'phi3': TypeError",
        ),
        ("phi3.block_count", 0, "one list of 0 layers expected, got none"),
        ("phi3.attention.head_count", 1 << 31, "no config can be made of"),
        ("tokenizer.ggml.eos_token_id", [2, 3], r"eos_token_id is \[2, 3\], a number expected"),
    ],
)
def test_metadata_that_no_model_has_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "phi3", extra={key: value})
    with pytest.raises(FlashError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.ffn_up.weight", "token_embd.weight"])
def test_scales_that_are_no_numbers_are_refused(name: str, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama")
    place = read_gguf_header(tmp_path / "tiny.gguf").tensors[name].offset + 3 * 18
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    raw[place : place + 2] = np.array(np.nan, dtype=np.float16).tobytes()
    (tmp_path / "tiny.gguf").write_bytes(raw)
    with pytest.raises(PackError, match=f"{name} holds a scale that is no finite number"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("used", [0, 5])
def test_more_experts_for_a_token_than_there_are_are_refused(used: int, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "qwen3moe", extra={"qwen3moe.expert_used_count": used})
    with pytest.raises(PackError, match=f"says that a token uses {used} of 4 experts"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")


def test_a_gguf_file_is_told_from_a_pack(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama")
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        with pytest.raises(PackError, match=rf"Convert .*: flashlm convert {path} PACK"):
            flashlm.load(path)


def test_scales_of_types_that_are_decoded_are_looked_at(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "llama", lambda name: "q3_k" if "k_proj" in name else "q4_0", **WIDE)
    found = read_gguf_header(tmp_path / "tiny.gguf").tensors["blk.1.attn_k.weight"]
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    raw[found.offset + 108 : found.offset + 110] = np.array(np.inf, dtype=np.float16).tobytes()
    (tmp_path / "tiny.gguf").write_bytes(raw)
    with pytest.raises(PackError, match=r"blk\.1\.attn_k\.weight holds a scale that is no finite number"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_list_in_groups_whose_elements_change_places_is_refused(tmp_path: Path) -> None:
    """No program writes one; read as rows it would be another list."""
    save_gguf(tmp_path / "tiny.gguf", "qwen35", linear_num_value_heads=32, linear_num_key_heads=2)
    header = read_gguf_header(tmp_path / "tiny.gguf")
    dt = header.tensors["blk.0.ssm_dt.bias"]
    raw = (tmp_path / "tiny.gguf").read_bytes()
    info = struct.pack("<Q", len(dt.name)) + dt.name.encode() + struct.pack("<IQI", 1, 32, 0)
    assert info in raw
    (tmp_path / "tiny.gguf").write_bytes(raw.replace(info, info[:-4] + struct.pack("<I", 8)))
    with pytest.raises(UnsupportedModelError, match=r"ssm_dt\.bias in Q8_0, grouped across rows that change places"):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack")


def test_a_conversion_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "qwen3moe", num_hidden_layers=4)

    def stop(done: int, total: int, what: str) -> None:
        if what == "experts-00002.rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0, progress=stop)
    said: list[str] = []
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0, announce=said.append)
    assert ", going on after" in said[0]
    whole = convert(tmp_path / "tiny.gguf", tmp_path / "whole", min_linear_bytes=0)
    assert manifest.weights_fingerprint == whole.weights_fingerprint
    assert verify(tmp_path / "pack").problems == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_of_odd_sizes_leave_gaps_between_blocks_of_a_table(is_tied: bool, tmp_path: Path) -> None:
    """Blocks of 2310-byte rows join at no size that a block may have: each is padded, and so are a table's."""
    settings = {"hidden_size": 2816, "head_dim": 64, "vocab_size": 2048, "tie_word_embeddings": is_tied}
    model = save_gguf(
        tmp_path / "tiny.gguf", "llama", lambda name: "q6_k" if "down" not in name else "q4_0", **settings
    )
    manifest = convert(tmp_path / "tiny.gguf", tmp_path / "pack", min_linear_bytes=0)
    table = next(entry for entry in manifest.units if entry.table or entry.kind == "embedding")
    assert not table.layout.joins
    assert table.layout.num_blocks > 1
    found = flashlm.load(tmp_path / "pack")
    tokens = torch.arange(0, 2048, 127)[None]
    with torch.no_grad():
        wanted = model(tokens).logits
        torch.testing.assert_close(found(tokens).logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
