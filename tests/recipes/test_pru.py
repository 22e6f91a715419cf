"""The recurrent model's recipes: a corpus cut to size, runs compared in turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flashlm.pru.training.corpus import read_corpus

RECIPE = Path(__file__).parents[2] / "recipes" / "pru"
sys.path.insert(0, str(RECIPE))

import compare  # noqa: E402  (of the recipe, which is no package)
import cut_corpus  # noqa: E402

TEXT = "the cat sat on the mat\n\nthe dog sat by the <unk> cat\na rare bird sat\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(TEXT * 4)
    return folder


def call(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def test_a_cut_has_exactly_the_tokens_and_words_asked_for(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    sizes = ("--train-tokens", 37, "--valid-tokens", 9, "--test-tokens", 8, "--vocabulary", 5)
    call(cut_corpus, monkeypatch, text, out, *sizes)
    corpus = read_corpus(out)
    assert [len(corpus.ids[split]) for split in ("train", "valid", "test")] == [37, 9, 8]
    assert corpus.encoding.vocab_size == 5
    assert (out / "valid.txt").read_text() == "the cat sat <unk> the <unk>\n\n\n"


@pytest.mark.parametrize("is_split", [False, True])
def test_runs_are_compared_in_turns_and_taken_up(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_split: bool
) -> None:
    recipes = []
    for arch in ("pru", "lstm"):
        path = tmp_path / f"{arch}.toml"
        path.write_text(
            f'[model]\narch = "{arch}"\nhidden_size = 8\nembedding_size = 8\ngroups = 2\n'
            "[training]\nbptt = 8\nbatch_size = 2\neval_batch_size = 1\n"
        )
        recipes.append(path)
    for epochs in (1, 2) if is_split else (2,):
        call(
            compare,
            monkeypatch,
            *("--data", text, "--out", tmp_path / "out", "--epochs", epochs, "--seeds", "1,2"),
            *("--set", "dropout=0.1", "--test"),
            *recipes,
        )
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"machine", "commit", "torch", "threads", "corpus"} <= set(written)
    results = written["runs"]
    assert [row["run"] for row in results] == ["pru-seed1", "lstm-seed1", "pru-seed2", "lstm-seed2"]
    assert all(row["epochs"] == len(row["valid_perplexity"]) == 2 for row in results)
    assert results[0]["valid_perplexity"] != results[2]["valid_perplexity"]
    assert (tmp_path / "out" / "results.md").read_text().count(
        "\n"
    ) == 6 + 5  # a line a run, a line a recipe, their heads
    assert all(row["test"]["perplexity"] > 1 for row in results)
    assert (tmp_path / "out" / "valid.png").read_bytes().startswith(b"\x89PNG")
