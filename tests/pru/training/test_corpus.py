"""A folder of text: its splits, and whether it is one of the published corpora."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashlm.errors import ConfigError
from flashlm.pru.training.corpus import PUBLISHED, SPLITS, Corpus, read_corpus, recognise
from flashlm.pru.training.encoding import WordEncoding


def published(name: str) -> Corpus:
    """Counts of a published corpus without its text."""
    lines, tokens, vocabulary = PUBLISHED[name]
    encoding = WordEncoding(["<eos>", *(f"w{number}" for number in range(vocabulary - 1))])
    return Corpus(
        folder=Path("text"),
        encoding=encoding,
        ids={split: np.zeros(1, np.int64) for split in SPLITS},
        num_lines=dict(zip(SPLITS, lines, strict=True)),
        num_words=dict(zip(SPLITS, tokens, strict=True)),
        fingerprint="",
    )


def test_counts_and_ids_follow_the_text(tmp_path: Path) -> None:
    for split, text in (("train", "a b\nc\n"), ("valid", "a\n\n"), ("test", "c c")):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    corpus = read_corpus(tmp_path)
    assert corpus.num_lines == {"train": 2, "valid": 2, "test": 1}
    assert corpus.num_words == {"train": 5, "valid": 3, "test": 3}
    assert {split: ids.tolist() for split, ids in corpus.ids.items()} == {
        "train": [0, 1, 2, 3, 2],
        "valid": [0, 2, 2],
        "test": [3, 3, 2],
    }


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"has no valid text: expected one of valid.txt"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_corpus_is_recognised_by_its_counts(name: str) -> None:
    assert recognise(published(name)) == (name, None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_corpus_close_to_a_published_one_is_warned_about(name: str) -> None:
    corpus = published(name)
    name_found, warning = recognise(
        replace(corpus, num_words=corpus.num_words | {"test": 1 + corpus.num_words["test"]})
    )
    assert name_found is None
    assert warning is not None
    assert f"close to {name} but not equal" in warning


def test_another_corpus_is_not_warned_about(corpus: Corpus) -> None:
    assert recognise(corpus) == (None, None)
