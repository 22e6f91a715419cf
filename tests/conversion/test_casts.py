"""A conversion to fewer bits refuses weights that would become infinite, and says which became zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashlm.conversion.casts import CastCounts
from flashlm.conversion.convert import convert
from flashlm.errors import PackError
from flashlm.pack.description import describe
from flashlm.pack.manifest import read_manifest
from tests.models import save_checkpoint
from tests.pack.packs import all_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Around the ends of every type's range, zeros of both signs, NaN.
EDGES = [0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 3.38e38, 3.4e38, 1e300, float("inf"), float("nan"),
         6e-8, 2.9e-8, 1.2e-38, 9.3e-41, 4.5e-41, 1e-45, 4e-46, 1e-300]  # fmt: skip


@given(
    values=st.lists(st.sampled_from(EDGES + [-value for value in EDGES]), min_size=1, max_size=8),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
)
def test_every_cast_is_judged_by_what_it_does(values: list[float], source: torch.dtype, target: torch.dtype) -> None:
    before = torch.tensor(values, dtype=torch.float64).to(source).view(1, -1)
    after = before.to(target)
    casts = CastCounts()
    if (torch.isinf(after) & torch.isfinite(before)).any():
        with pytest.raises(PackError, match="too large for"):
            casts.check(after, before, "weight")
        return
    casts.check(after, before, "weight")
    zeroed = int(((after == 0) & (before != 0)).sum())
    assert casts.zeroed == ({"weight": zeroed} if zeroed else {})


def _with(source: Path, name: str, value: float, count: int) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[:count] = value
    save_file(tensors, path, metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.down_proj.weight"
RESIDENT = "model.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(("dtype", "tiny"), [("fp16", -1e-9), ("bf16", 1e-42)])
def test_weights_that_become_zero_are_counted_and_the_worst_is_named(dtype: str, tiny: float, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    _with(tmp_path / "source", RESIDENT, tiny, 5)
    _with(tmp_path / "source", LAYER, tiny, 7)
    lines: list[str] = []
    convert(tmp_path / "source", tmp_path / "pack", dtype=dtype, announce=lines.append)
    (line,) = [line for line in lines if "became zero" in line]
    assert line.startswith("warning: 12 weights that are not zero became zero")
    assert f"in 2 tensors, most (7) in {LAYER}" in line
    (note,) = read_manifest(tmp_path / "pack").source.notes
    assert line == f"warning: {note}"
    assert json.loads(json.dumps(describe(tmp_path / "pack").to_dict()))["notes"] == [note]
    convert(tmp_path / "source", tmp_path / "exact", dtype="fp32")
    assert read_manifest(tmp_path / "exact").source.notes == ()


def test_experts_that_become_zero_are_counted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "qwen3_moe")
    _with(tmp_path / "source", EXPERT, 1e-9, 9)
    convert(tmp_path / "source", tmp_path / "pack", dtype="fp16")
    (note,) = read_manifest(tmp_path / "pack").source.notes
    assert note.startswith("9 weights that are not zero became zero in float16, in 1 tensors")


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", RESIDENT), ("llama", LAYER), ("qwen3_moe", EXPERT), ("llama", "model.norm.weight")],
)
@pytest.mark.parametrize(("dtype", "huge"), [("fp16", 1e6), ("bf16", 3.4e38)])
def test_weights_that_would_become_infinite_are_refused(
    family: str, name: str, dtype: str, huge: float, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "source", family)
    _with(tmp_path / "source", name, huge, 1)
    with pytest.raises(PackError, match=f"holds {huge:g}".replace("+", r"\+") + ", too large for"):
        convert(tmp_path / "source", tmp_path / "pack", dtype=dtype)
    assert not (tmp_path / "pack" / "flash" / "manifest.json").exists()


def test_what_float32_cannot_hold_gets_advice_that_can_be_followed() -> None:
    source = torch.tensor([1.0, -1e300], dtype=torch.float64)
    with pytest.raises(
        PackError, match=r"holds -1e\+300, too large for float32 .*: a pack has nothing wider"
    ) as caught:
        CastCounts().check(source.to(torch.float32), source, "weight")
    assert "--dtype" not in str(caught.value)


def test_an_interrupted_conversion_remembers_what_became_zero(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama")
    _with(tmp_path / "source", RESIDENT, 1e-9, 5)
    convert(tmp_path / "source", tmp_path / "whole", dtype="fp16")

    def interrupt(done: int, total: int, what: str) -> None:
        if "layer-00001" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "pack", dtype="fp16", progress=interrupt)
    convert(tmp_path / "source", tmp_path / "pack", dtype="fp16")
    assert all_bytes(tmp_path / "pack") == all_bytes(tmp_path / "whole")
    assert "5 weights" in read_manifest(tmp_path / "pack").source.notes[0]
