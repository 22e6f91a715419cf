"""A small text of our own: lines walk through a ring of words, so that there is something to learn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from flashlm.pru.training.corpus import Corpus, read_corpus
from flashlm.pru.training.settings import Recipe, preset_settings

NUM_LINES = {"train": 120, "valid": 20, "test": 20}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for split, num_lines in NUM_LINES.items():
        lines = []
        for _ in range(num_lines):
            word = draw.randrange(20)
            line = []
            for _ in range(draw.randrange(3, 12)):
                line.append(f"w{word}")
                word = (word * 3 + 1 + draw.randrange(2)) % 20
            lines.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path) -> Corpus:
    return read_corpus(text_folder)


def small_recipe(preset: str = "standard", arch: str = "pru", **training: object) -> Recipe:
    settings = {"bptt": 12, "batch_size": 4, "lr": 10.0, "epochs": 3, **training}
    model = {"arch": arch, "hidden_size": 16, "embedding_size": 8, "groups": 2, "init": "per_group"}
    return Recipe(name=preset, preset=preset, model=model, training=preset_settings(preset, **settings))
