"""Experts of every layout end up as rows, one block each, with the weights that transformers itself would load."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from flashlm.conversion.convert import convert
from flashlm.conversion.experts_source import ExpertWeight
from flashlm.conversion.verify import verify
from flashlm.errors import PackError, UnsupportedModelError
from flashlm.pack.manifest import unit_path
from tests.models import EXPERT_FAMILIES, save_checkpoint
from tests.pack.packs import all_bytes


def read_parts(pack, manifest, index):
    """All experts of a layer as (experts, rows, parts, hidden)."""
    entry, layout = manifest.experts[index], manifest.experts[index].layout
    raw = torch.frombuffer(bytearray(unit_path(pack, entry).read_bytes()), dtype=torch.uint8)
    experts = []
    for expert in range(entry.num_experts):
        start = layout.offset_of(expert)
        block = raw[start : start + layout.block_rows * layout.row_stride_bytes].view(layout.block_rows, -1)
        experts.append(block[:, : layout.row_bytes].reshape(-1))
    elements = torch.stack(experts).view(getattr(torch, manifest.dtype))
    return elements.view(entry.num_experts, layout.block_rows, layout.num_parts, layout.hidden_size)


def wanted_parts(module):
    """The same of a module that transformers has loaded, by what the interface's flags say."""
    inner = module.gate_up_proj if module.has_gate else module.up_proj
    outer = module.down_proj
    if module.is_transposed:
        inner, outer = inner.transpose(1, 2), outer.transpose(1, 2)
    parts = [inner]
    if module.has_gate:
        parts = list(inner.chunk(2, dim=1)) if module.is_concatenated else [inner[:, 0::2], inner[:, 1::2]]
    return torch.stack([*parts, outer.transpose(1, 2)], dim=2).detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_what_transformers_loads(family, dtype, tmp_path):
    save_checkpoint(tmp_path / "source", family, max_shard_size="60KB")
    manifest = convert(tmp_path / "source", tmp_path / "pack", dtype=dtype)
    assert manifest.format_version == 5
    assert json.loads((tmp_path / "pack" / "config.json").read_text())["quantization_config"]["format_version"] == 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    for index, entry in enumerate(manifest.experts):
        wanted = wanted_parts(model.get_submodule(entry.module))
        assert torch.equal(read_parts(tmp_path / "pack", manifest, index), wanted)
    verify(tmp_path / "pack").raise_for_problems()


def test_a_checkpoint_of_joined_experts_gives_the_same_pack_as_one_of_single_experts(tmp_path):
    model = save_checkpoint(tmp_path / "single", "mixtral")
    shutil.copytree(tmp_path / "single", tmp_path / "joined")
    save_file({name: weight.clone() for name, weight in model.state_dict().items()},
              tmp_path / "joined" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    packs = [tmp_path / f"{name}-pack" for name in ("single", "joined")]
    for name, pack in zip(("single", "joined"), packs, strict=True):
        convert(tmp_path / name, pack)
    first, second = ({k: v for k, v in all_bytes(pack).items() if not k.endswith("manifest.json")} for pack in packs)
    assert first == second


def test_a_missing_expert_is_named(tmp_path):
    model = save_checkpoint(tmp_path / "source", "olmoe")
    path = tmp_path / "source" / "model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PackError, match=r"layers\.1\.mlp\.experts\.gate_up_proj needs 8 tensors .*up_proj.*, found 7"):
        convert(tmp_path / "source", tmp_path / "pack")
    assert model.config.num_experts == 8


@pytest.mark.parametrize(
    ("sources", "operations"),
    [
        (["e.*.w1"], [MergeModulelist(dim=1)]),
        (["e.*.w1", "e.*.w3"], [Concatenate(dim=0), MergeModulelist(dim=0)]),
        (["e.w1", "e.w3"], [Concatenate(dim=0)]),
        (["e.w1"], [Transpose(0, 2)]),
        (["e.*.w1", "e.w3"], [MergeModulelist(dim=0), Concatenate(dim=1)]),
    ],
)
def test_an_operation_across_experts_is_refused(sources, operations):
    weight = ExpertWeight(name="e.gate_up_proj", shape=(4, 6, 8))
    with pytest.raises(UnsupportedModelError, match="one expert at a time"):
        weight.add(sources[0], WeightConverter(sources, "e.gate_up_proj", operations), SimpleNamespace())


def test_a_damaged_expert_is_named(tmp_path):
    save_checkpoint(tmp_path / "source", "qwen3_moe")
    manifest = convert(tmp_path / "source", tmp_path / "pack")
    path = unit_path(tmp_path / "pack", manifest.experts[1])
    raw = bytearray(path.read_bytes())
    raw[manifest.experts[1].layout.offset_of(5) + 7] ^= 1
    path.write_bytes(raw)
    (problem,) = verify(tmp_path / "pack").problems
    assert "experts-00001.rows: expert 5" in problem
