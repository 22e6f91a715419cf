"""FATReLU: a Llama of ProSparse's kind converts, runs like its own definition, and fires only above its threshold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashlm
from flashlm.conversion.convert import convert
from flashlm.errors import UnsupportedModelError
from flashlm.pack.manifest import read_manifest
from flashlm.structure.activations import FatReLU
from tests.engine.calibrations import write_calibration
from tests.models import save_checkpoint


def test_fatrelu_is_a_threshold() -> None:
    values = torch.tensor([-1.0, 0.0, 0.005, 0.01, 0.011, 2.0])
    assert FatReLU()(values).tolist() == pytest.approx([0, 0, 0, 0, 0.011, 2.0])


def test_a_fatrelu_llama_runs_in_every_mode(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_checkpoint(tmp_path / "source", "llama", hidden_act="fatrelu", hidden_act_param=0.01)
    convert(tmp_path / "source", tmp_path / "pack", dtype="fp32", block_rows=16)
    assert read_manifest(tmp_path / "pack").activation == "fatrelu"
    write_calibration(tmp_path / "pack", predicts_all=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    assert isinstance(plain.model.layers[0].mlp.act_fn, FatReLU)
    tokens = torch.arange(3, 11)[None]
    asked = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    wanted = plain.generate(tokens, **asked)
    for mode in ("hybrid", "naive", "sparse"):
        model = flashlm.load(tmp_path / "pack", dram="3GiB", mode=mode, context=32)
        assert torch.equal(model.generate(tokens, **asked), wanted), mode


def test_another_threshold_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", "llama", hidden_act="fatrelu", hidden_act_param=0.05)
    with pytest.raises(UnsupportedModelError, match=r"hidden_act_param=0\.05"):
        convert(tmp_path / "source", tmp_path / "pack")
