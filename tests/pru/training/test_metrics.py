"""The metrics file, the curve, TensorBoard."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flashlm.errors import ConfigError
from flashlm.pru.training.metrics import Metrics, read_metrics


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add("train", step=5, epoch=1, loss=1.0)
    metrics.add("valid", step=9, epoch=1, loss=1.0)
    metrics.add("train", step=10, epoch=2, loss=1.0)
    metrics.path.write_text(metrics.path.read_text() + '{"kind": "tra')  # a kill in the middle of a line
    metrics.rewind(9, 1)  # a checkpoint from before the validation
    assert [(row["kind"], row["step"]) for row in read_metrics(metrics.path)] == [("train", 5)]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add("train", step=5, epoch=1, cross_entropy=2.0)
    metrics.add("valid", step=9, epoch=1, loss=1.0)
    assert metrics.draw()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_where_it_is_missing_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Metrics(tmp_path / "metrics.jsonl", has_tensorboard=True)
