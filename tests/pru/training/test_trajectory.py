"""The whole training regime, pinned by a recorded trajectory: validation losses of six epochs of a small text.

The numbers were recorded from this trainer in November 2026, when it was held against the authors' own loops: their `train`,
`evaluate` and main loop for the PRU and AWD-LSTM's for the LSTM, same weights and draws, fp64; validation losses agreed
within 8e-10 and 4.3e-7. Whatever changes window lengths, dropouts, regularisers, clipping, the
scaling of the learning rate, weight decay, the rule that starts averaging or the mean itself, changes these numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashlm.pru.training.corpus import Corpus
from flashlm.pru.training.trainer import Trainer
from tests.pru.training.conftest import small_recipe

# Another instruction set in torch's kernels moved them by 6e-12 and 7e-10 at most. (At higher learning rates epochs after
# the fourth are chaotic: differences of 1e-15 grow to 1e-2.)
TOLERANCE = 1e-7
REGIME = {"nonmono": 1, "clip": 1.0, "batch_size": 2, "bptt": 10, "alpha": 0.2, "beta": 0.1, "epochs": 6}
DROPOUTS = {"dropout": 0.1, "dropouth": 0.1, "dropouti": 0.1, "dropoute": 0.05, "weight_dropout": 0.2}
RECORDED = {
    ("pru", 3.0): [3.12584126224884, 3.22840534925075, 3.46593456983828, 2.48848668510335, 2.33806561182752, 2.18266603293],
    ("lstm", 5.0): [3.26901292425726, 3.65933464387477, 3.97249211089464, 2.81463088029655, 2.72284140464, 2.6429397430],
}  # fmt: skip


@pytest.mark.parametrize(("arch", "lr"), RECORDED)
def test_six_epochs_of_the_advanced_regime_are_the_recorded_ones(
    corpus: Corpus,
    tmp_path: Path,
    arch: str,
    lr: float,
    default_dtype: Callable[[torch.dtype], AbstractContextManager[None]],
) -> None:
    recipe = small_recipe("awd", arch, lr=lr, **REGIME, **DROPOUTS)
    recipe = replace(recipe, model={**recipe.model, "num_layers": 2, "embedding_size": 16})
    notes: list[str] = []
    with default_dtype(torch.float64):
        reached = Trainer(corpus, recipe, tmp_path, note=notes.append).run()
    assert reached.valid_losses == pytest.approx(RECORDED[arch, lr], rel=0, abs=TOLERANCE)
    told = [note for note in notes if "loss curve" not in note]
    assert told[3] == "no better for 1 epochs: averaging from here"  # after the third epoch
