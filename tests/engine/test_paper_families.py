"""The paper's five families and those beyond it, end to end on tiny random models: convert, calibrate, run sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flashlm
from flashlm.calibration.capture import masked, streamed_layers
from flashlm.calibration.dense import calibrate
from flashlm.conversion.convert import convert
from flashlm.pack.manifest import read_manifest
from flashlm.sparsity.calibration_document import read_sparsity
from tests.engine.conftest import save_tokenizer
from tests.models import save_checkpoint

DRAM = "3GiB"
# (family, what its config says beyond the defaults, whether its zeros are exact)
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("opt", {}, True),
    ("falcon", {"activation": "relu"}, True),
    ("persimmon", {}, True),
    ("phi", {"hidden_act": "relu"}, True),
    ("llama", {"hidden_act": "fatrelu"}, True),
    ("nemotron", {}, True),
    ("mistral", {}, False),
    ("qwen3", {}, False),
    ("llama", {}, False),
]


@pytest.mark.parametrize(("family", "settings", "is_exact"), CASES)
def test_calibrated_and_run_sparse(
    family: str, settings: dict[str, Any], is_exact: bool, text: Path, tmp_path: Path
) -> None:
    source, pack = tmp_path / "source", tmp_path / "pack"
    save_checkpoint(source, family, max_position_embeddings=160, **settings)
    save_tokenizer(source)
    convert(source, pack, dtype="float32", block_rows=16)
    report = calibrate(pack, text, rank=8, dram=DRAM, max_ppl_increase=0.05)
    sparsity = read_sparsity(pack, read_manifest(pack))
    assert sparsity is not None
    for layer, stored in zip(report.layers, sparsity.layers, strict=True):
        assert (stored.activation_threshold == 0.0) == is_exact
        assert 0.0 < layer.active_share < 1.0
        assert layer.predictor.recall > 0.8

    # The same tokens with the same rows, dense arithmetic under a mask on one side, rows fetched from flash on the other.
    model = flashlm.load(pack, dram=DRAM, mode="sparse", context=160)
    dense = flashlm.load(pack, dram=DRAM, mode="hybrid", context=160)
    predictors = model.flash.calibration.load_predictors()
    tokens = torch.arange(3, 15)[None]
    thresholds = [layer.activation_threshold for layer in sparsity.layers]
    selections = [predictor.predict for predictor in predictors]
    as_drafted = model.flash.phase("verify")  # several tokens at once with predicted rows: a prompt takes them all
    with torch.no_grad(), as_drafted, masked(streamed_layers(dense), selections, thresholds):
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    generated = model.generate(tokens, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert generated.shape == (1, 24)
    assert model.flash.telemetry.records[-1].miss_rows + model.flash.telemetry.records[-1].hit_rows > 0
