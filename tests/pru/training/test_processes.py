"""Several processes under torchrun (gloo) do what one does, and go on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = ["hidden_size=16", "embedding_size=8", "groups=2", "bptt=12", "batch_size=4", "lr=5", "init=per_group"]
PLAIN = ["dropout=0", "dropouth=0", "dropouti=0"]


def train(
    text: Path, out: Path, num_processes: int, epochs: int, options: list[str]
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m"]
    if num_processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
    command = [*launcher, "flashlm", "pru", "train", "--data", str(text), "--out", str(out), "--device", "cpu"]
    command += ["--epochs", str(epochs), "--json"]
    command += [part for option in [*OPTIONS, *options] for part in ("--set", option)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def weights(out: Path) -> dict[str, torch.Tensor]:
    (place,) = (out / "checkpoints").iterdir()
    return load_file(place / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume(text_folder: Path, tmp_path: Path) -> None:
    one = train(text_folder, tmp_path / "one", 1, 2, PLAIN)
    two = train(text_folder, tmp_path / "two", 2, 1, PLAIN)
    assert two.returncode == 0, two.stderr
    resumed = train(text_folder, tmp_path / "two", 2, 2, PLAIN)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from" in resumed.stderr
    expected = weights(tmp_path / "one")
    for name, value in weights(tmp_path / "two").items():
        # fp32 sums in another order, over some 40 steps
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    perplexities = [json.loads(run.stdout)["best_valid_perplexity"] for run in (one, resumed)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)

    alone = train(text_folder, tmp_path / "two", 1, 3, PLAIN)
    assert alone.returncode == 2
    assert "was written by 2 processes and can't be resumed by 1" in alone.stderr
    uneven = train(text_folder, tmp_path / "uneven", 2, 1, ["batch_size=5"])
    assert "batch_size=5 must be divisible by the 2 processes" in uneven.stderr
