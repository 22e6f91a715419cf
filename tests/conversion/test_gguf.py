"""Models from GGUF files give what transformers' own reading of the same file gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashlm
from flashlm.cli.plan import source_shape
from flashlm.conversion.convert import convert
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError, UnsupportedModelError
from flashlm.pack.manifest import UnitEntry, read_manifest, unit_path
from flashlm.planner.shape import read_shape
from flashlm.rows.encodings import ENCODINGS
from tests.gguf_files import ARCHITECTURES, q4_0, save_gguf

# transformers 5.23 makes neither config nor experts of files of gpt-oss.
_NOT_OF_TRANSFORMERS = ("gpt-oss",)
TOKENS = torch.tensor([[3, 17, 42, 5, 90, 8, 23, 11]])


def check_same(wanted: PreTrainedModel, found: PreTrainedModel) -> None:
    with torch.no_grad():
        logits, mine = wanted(TOKENS).logits, found(TOKENS).logits
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
        if types in ("fp16", "bf16", "fp32") and entry.kind == "ffn":
            assert set(entry.encodings) == {types}
            continue
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
