"""Perplexity: by hand, in every mode; sparse token by token is the masked dense model; calibrated packs are ordered."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flashlm
from flashlm.calibration.capture import masked, streamed_layers
from flashlm.calibration.dense import calibrate
from flashlm.calibration.evaluate import evaluate, read_token_ids
from flashlm.conversion.verify import verify
from flashlm.pack.manifest import read_manifest
from tests.engine.calibrations import write_calibration
from tests.engine.conftest import TinyPack

WINDOW = 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    steps = torch.randint(1, 7, (700,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 90 + 4
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{int(token)}" for token in steps))
    return path


@pytest.fixture(params=["opt", "llama"])
def pack(request: pytest.FixtureRequest, tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> Path:
    pack = Path(shutil.copytree(tiny_pack(request.param, "float32").pack, tmp_path / "pack"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(pack)
    return pack


def _by_hand(pack: Path, text: Path, max_tokens: int, *, is_masked: bool) -> float:
    ids = read_token_ids(pack, text, max_tokens=max_tokens)
    sparse = flashlm.load(pack, dram="3GiB", mode="sparse", context=160)
    selections = [layer.bound.predict if is_masked else None for layer in streamed_layers(sparse)]
    model = flashlm.load(pack, dram="3GiB", mode="hybrid", context=160)
    layers = streamed_layers(model)
    total, count = 0.0, 0
    with torch.no_grad(), masked(layers, selections, [0.0] * len(layers)):
        for start in range(0, len(ids), WINDOW):
            some = ids[start : start + WINDOW]
            if len(some) > 1:
                total += float(model(some[None], labels=some[None]).loss) * (len(some) - 1)
                count += len(some) - 1
    return math.exp(total / count)


def test_perplexity_is_that_of_the_windows_by_hand(pack: Path, text: Path) -> None:
    write_calibration(pack)
    hybrid, naive, sparse = evaluate(
        pack, text, modes=["hybrid", "naive", "sparse"], dram="3GiB", window=WINDOW, max_tokens=100
    )
    assert hybrid.num_tokens == sparse.num_tokens == 39 + 39 + 19
    assert hybrid.nll == naive.nll
    assert hybrid.perplexity == pytest.approx(_by_hand(pack, text, 100, is_masked=False), rel=1e-4)
    assert sparse.perplexity == pytest.approx(_by_hand(pack, text, 100, is_masked=True), rel=1e-4)
    assert abs(sparse.perplexity / hybrid.perplexity - 1) > 1e-3  # random predictors do some harm
    assert sparse.num_passes == sparse.num_tokens
    assert sparse.hit_share is not None
    assert hybrid.hit_share is None


def test_a_calibrated_pack_is_ordered_and_runs_sparse(pack: Path, text: Path) -> None:
    before = read_manifest(pack)
    report = calibrate(pack, text, rank=8, dram="3GiB", max_ppl_increase=0.05)
    manifest = read_manifest(pack)
    assert all(entry.order_checksum is not None for entry in manifest.layers)
    assert manifest.layers[0].checksums != before.layers[0].checksums
    assert verify(pack).problems == ()
    hybrid, sparse = evaluate(pack, text, modes=["hybrid", "sparse"], dram="3GiB", window=WINDOW, max_tokens=200)
    assert sparse.exactness.startswith("approximate")
    assert abs(sparse.perplexity / hybrid.perplexity - 1) < 0.2
    assert report.evaluation.dense_perplexity > 1
