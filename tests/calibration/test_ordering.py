"""A calibrated pack in another row order is the same sparse model, and its old calibration is refused elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flashlm
from flashlm.calibration import ordering
from flashlm.calibration.ordering import order_pack
from flashlm.conversion.verify import verify
from flashlm.errors import ConfigError
from flashlm.pack.manifest import read_manifest
from tests.engine.calibrations import evaluation, write_calibration
from tests.engine.conftest import TinyPack


@pytest.fixture(params=["opt", "llama"])
def pack(request: pytest.FixtureRequest, tiny_pack: Callable[..., TinyPack], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_pack(request.param, "float32").pack, tmp_path / "pack"))
    write_calibration(folder, evaluation=evaluation(has_passed=True))
    return folder


def _orders(pack: Path) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.permutation(entry.num_rows) for entry in read_manifest(pack).layers]


def _logits(pack: Path, mode: str) -> torch.Tensor:
    model = flashlm.load(pack, dram="3GiB", mode=mode, context=64)
    with torch.no_grad(), model.flash.phase("verify"):  # ten tokens at once that are no prompt
        return model(torch.arange(3, 13)[None]).logits


def test_the_sparse_model_stays_the_same(pack: Path) -> None:
    wanted = {mode: _logits(pack, mode) for mode in ("sparse", "hybrid")}
    assert not torch.allclose(wanted["sparse"], wanted["hybrid"], atol=1e-3)
    order_pack(pack, _orders(pack))
    for mode, logits in wanted.items():
        torch.testing.assert_close(_logits(pack, mode), logits, rtol=1e-4, atol=1e-5)
    assert verify(pack).problems == ()


def test_stopped_before_the_end_sparse_is_refused_and_auto_is_exact(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = _logits(pack, "hybrid")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ordering, "write_sparsity", stop)
    with pytest.raises(KeyboardInterrupt):
        order_pack(pack, _orders(pack))
    assert verify(pack).problems == ()  # half ordered is whole; the calibration, which fits no more, is gone
    with pytest.raises(ConfigError, match="has no predictors"):
        _logits(pack, "sparse")
    torch.testing.assert_close(_logits(pack, "auto"), wanted, rtol=1e-4, atol=1e-5)
